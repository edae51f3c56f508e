//! How large a sandbox's virtual machine is.
//!
//! Annotations of the pod win over CRI's sandbox resources, which win over the configuration. The
//! guest's overhead is added to the pod's memory before rounding up to a template's size, so that
//! a container that reaches its own limit is killed inside the guest, never the VMM on the host.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::config::{Config, DISK_MIB};
use crate::mesh::{self, sidecar};
use crate::net_limits::NET_LIMITS;
use crate::policy::tenant;
use crate::services;
use crate::vmm::DiskLimits;

/// Annotation: vCPUs, a whole number.
pub const VCPUS: &str = "io.joey.vcpus";
/// Annotation: memory of the pod, as `512Mi` or `2Gi`.
pub const MEMORY: &str = "io.joey.memory";
/// Annotation: size of the pod's writable disk, as `512Mi` or `20Gi`.
pub const DISK: &str = "io.joey.disk";
/// Annotations: most bytes and requests a second of the pod's disks, read and written. They may be changed
/// while the pod runs, by an update of its task (`joey limit`).
pub const DISK_LIMITS: [&str; 4] = [
    "io.joey.disk.read-bytes",
    "io.joey.disk.write-bytes",
    "io.joey.disk.read-operations",
    "io.joey.disk.write-operations",
];
/// Annotations: most bytes that an emptyDir on the pod's disk may hold, by the volume's name after it.
pub const EMPTY_DIR: &str = "io.joey.empty-dir.";
/// The others.
const KNOWN: [&str; 7] =
    [VCPUS, MEMORY, DISK, tenant::ANNOTATION, mesh::MODE, mesh::DNS, services::ANNOTATION];
const PREFIX: &str = "io.joey.";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";
const CRI_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// A sandbox's size: one of the node's template sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizing {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory of the machine, overhead included.
    pub memory_mib: u32,
}

/// An annotation that cannot be followed.
#[derive(Debug, thiserror::Error)]
#[error("annotation {name} = {value:?}: {reason}")]
pub struct SizingError {
    /// The annotation.
    pub name: String,
    /// What it says.
    pub value: String,
    /// What it must be.
    pub reason: String,
}

/// Sizes a sandbox from its annotations.
pub fn size(config: &Config, notes: &HashMap<String, String>) -> Result<Sizing, SizingError> {
    for (name, value) in notes {
        let known = || KNOWN.iter().chain(&DISK_LIMITS).chain(&NET_LIMITS).chain(&sidecar::OWN);
        let volumes = name.starts_with(EMPTY_DIR);
        if name.starts_with(PREFIX) && !volumes && !known().any(|known| known == name) {
            let known = known().copied().collect::<Vec<_>>().join(", ");
            return Err(bad(name, value, format!("unknown; known are {known}, {EMPTY_DIR}VOLUME")));
        }
    }
    Ok(Sizing { vcpus: vcpus(config, notes)?, memory_mib: memory(config, notes)? })
}

/// QEMU's THROTTLE_VALUE_MAX.
const MOST_A_SECOND: u64 = 1_000_000_000_000_000;
/// A writable disk consists of whole block groups of its file system.
const DISK_STEP_MIB: u64 = 128;

/// Size of a sandbox's writable disk, in MiB.
pub fn disk_mib(config: &Config, notes: &HashMap<String, String>) -> Result<u64, SizingError> {
    let (least, most) = (*DISK_MIB.start(), config.max_disk_mib);
    let wanted = match notes.get(DISK) {
        None => config.default_disk_mib,
        Some(value) => mib(value).filter(|mib| (least..=most).contains(mib)).ok_or_else(|| {
            bad(DISK, value, format!("must be like 512Mi or 20Gi, from {least}Mi to {most}Mi"))
        })?,
    };
    Ok(wanted.next_multiple_of(DISK_STEP_MIB))
}

/// The most bytes that emptyDirs may hold, by the volumes' names.
pub fn empty_dirs(notes: &HashMap<String, String>) -> Result<BTreeMap<String, u64>, SizingError> {
    let limit = |(name, value): (&String, &String)| {
        let volume = name.strip_prefix(EMPTY_DIR)?.to_owned();
        let bytes = mib(value).and_then(|mib| mib.checked_mul(1 << 20)).ok_or_else(|| {
            bad(name, value, "must be like 512Mi or 20Gi: the volume's sizeLimit".to_owned())
        });
        Some(bytes.map(|bytes| (volume, bytes)))
    };
    notes.iter().filter_map(limit).collect()
}

/// What annotations make of the limits of a sandbox's disks: those that they do not name stay.
pub fn disk_limits(
    notes: &HashMap<String, String>,
    before: DiskLimits,
) -> Result<DiskLimits, SizingError> {
    let mut limits = before;
    let fields = [
        &mut limits.read_bytes,
        &mut limits.write_bytes,
        &mut limits.read_operations,
        &mut limits.write_operations,
    ];
    for (name, field) in DISK_LIMITS.into_iter().zip(fields) {
        if let Some(value) = notes.get(name) {
            *field = rate(value).ok_or_else(|| {
                let reason = "must be a number a second, like 500, 64Ki or 50Mi; 0: no limit";
                bad(name, value, reason.to_owned())
            })?;
        }
    }
    Ok(limits)
}

/// A number, perhaps of Ki, Mi or Gi, that QEMU can keep.
fn rate(value: &str) -> Option<u64> {
    let units = [("Ki", 10), ("Mi", 20), ("Gi", 30), ("", 0)];
    let (digits, shift) =
        units.into_iter().find_map(|(unit, shift)| Some((value.strip_suffix(unit)?, shift)))?;
    let whole = digits.bytes().all(|byte| byte.is_ascii_digit());
    let number = digits.parse::<u64>().ok().filter(|_| whole)?.checked_mul(1 << shift)?;
    Some(number).filter(|number| *number <= MOST_A_SECOND)
}

fn vcpus(config: &Config, notes: &HashMap<String, String>) -> Result<u32, SizingError> {
    let quota = number(notes, CPU_QUOTA)?.filter(|&quota| quota > 0);
    let period = number(notes, CPU_PERIOD)?.filter(|&period| period > 0).unwrap_or(100_000);
    // The kubelet's smallest share, 2, means "asked for nothing".
    let shares = number(notes, CPU_SHARES)?.filter(|&shares| shares > 2);
    let (name, wanted) = if let Some(value) = notes.get(VCPUS) {
        let whole = value.parse::<u64>().ok().filter(|&count| count > 0);
        (VCPUS, whole.ok_or_else(|| bad(VCPUS, value, "must be a whole number from 1".into()))?)
    } else if let Some(quota) = quota {
        (CPU_QUOTA, quota.unsigned_abs().div_ceil(period.unsigned_abs()))
    } else if let Some(shares) = shares {
        (CPU_SHARES, shares.unsigned_abs().div_ceil(1024))
    } else {
        (VCPUS, config.default_vcpus.into())
    };
    round_up(name, notes, wanted, &config.template_vcpus, "vCPUs")
}

fn memory(config: &Config, notes: &HashMap<String, String>) -> Result<u32, SizingError> {
    let cri = number(notes, CRI_MEMORY)?.filter(|&bytes| bytes > 0);
    let (name, wanted) = if let Some(value) = notes.get(MEMORY) {
        (MEMORY, mib(value).ok_or_else(|| bad(MEMORY, value, "must be like 512Mi or 2Gi".into()))?)
    } else if let Some(bytes) = cri {
        (CRI_MEMORY, bytes.unsigned_abs().div_ceil(1 << 20))
    } else {
        (MEMORY, config.default_memory_mib.into())
    };
    let whole = wanted.saturating_add(config.guest_overhead_mib.into());
    round_up(name, notes, whole, &config.template_memory_mib, "MiB with the guest's overhead")
}

fn round_up(
    name: &str,
    notes: &HashMap<String, String>,
    wanted: u64,
    sizes: &[u32],
    unit: &str,
) -> Result<u32, SizingError> {
    sizes.iter().copied().find(|&size| u64::from(size) >= wanted).ok_or_else(|| {
        let most = sizes.last().copied().unwrap_or(0);
        let value = notes.get(name).map_or("", String::as_str);
        bad(name, value, format!("comes to {wanted} {unit}; this node's most is {most}"))
    })
}

fn mib(text: &str) -> Option<u64> {
    let (digits, factor) = match text.strip_suffix("Gi") {
        Some(digits) => (digits, 1024),
        None => (text.strip_suffix("Mi")?, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(factor).filter(|&mib| mib > 0)
}

fn number(notes: &HashMap<String, String>, name: &str) -> Result<Option<i64>, SizingError> {
    let parse = |text: &String| {
        text.parse::<i64>().map_err(|_| bad(name, text, "must be a whole number".into()))
    };
    notes.get(name).map(parse).transpose()
}

fn bad(name: &str, value: &str, reason: String) -> SizingError {
    SizingError { name: name.to_owned(), value: value.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sized(notes: &[(&str, &str)]) -> Result<(u32, u32), String> {
        let notes = notes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let sizing = size(&Config::default(), &notes).map_err(|error| error.to_string())?;
        Ok((sizing.vcpus, sizing.memory_mib))
    }

    #[test]
    fn sizes() {
        assert_eq!(sized(&[]), Ok((1, 256)));
        assert_eq!(sized(&[(VCPUS, "3"), (MEMORY, "512Mi")]), Ok((4, 1024)));
        assert_eq!(sized(&[(CPU_QUOTA, "150000"), (CPU_PERIOD, "100000")]), Ok((2, 256)));
        assert_eq!(sized(&[(CPU_QUOTA, "-1"), (CPU_SHARES, "2")]), Ok((1, 256)));
        assert_eq!(sized(&[(CRI_MEMORY, "67108864")]), Ok((1, 128)));
    }

    #[test]
    fn disks() {
        let sized = |value: &str| {
            let notes = HashMap::from([(DISK.to_owned(), value.to_owned())]);
            disk_mib(&Config::default(), &notes).map_err(|error| error.to_string())
        };
        assert_eq!(disk_mib(&Config::default(), &HashMap::new()).unwrap(), 10 * 1024);
        assert_eq!(sized("20Gi"), Ok(20 * 1024));
        assert_eq!(sized("257Mi"), Ok(384));
        let small = Config { max_disk_mib: 12 * 1024, ..Config::default() };
        let notes = HashMap::from([(DISK.to_owned(), "20Gi".to_owned())]);
        let error = disk_mib(&small, &notes).unwrap_err().to_string();
        assert!(error.contains("to 12288Mi"), "{error}");
        let notes = HashMap::from([(format!("{EMPTY_DIR}cache"), "2Gi".to_owned())]);
        assert_eq!(empty_dirs(&notes).unwrap(), BTreeMap::from([("cache".to_owned(), 2 << 30)]));
        assert!(size(&Config::default(), &notes).is_ok());
        for value in ["255Mi", "257Gi", "20G", "-1Gi", ""] {
            let error = sized(value).unwrap_err();
            assert!(error.contains(DISK) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn memory_always_leaves_the_overhead() {
        let config = Config::default();
        for wanted in 1..=16_384 - config.guest_overhead_mib {
            let (_, given) = sized(&[(MEMORY, &format!("{wanted}Mi"))]).unwrap();
            assert!(given >= wanted + config.guest_overhead_mib);
        }
    }

    #[test]
    fn refusals_name_annotation_and_value() {
        for (name, value) in [("io.joey.cpus", "2"), (VCPUS, "0"), (VCPUS, "9"), (MEMORY, "1G")] {
            let error = sized(&[(name, value)]).unwrap_err();
            assert!(error.contains(name) && error.contains(value), "{error}");
        }
    }
}

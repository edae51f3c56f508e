//! A container's OCI specification, as the guest gets it: mounts of the host replaced by volumes, host-only parts
//! removed, and everything that a VM pod cannot have refused by name.
//!
//! | module | decides |
//! | --- | --- |
//! | [`checks`] | what of the specification no VM pod can have |
//! | [`devices`] | which devices of the host a container gets |
//! | [`mounts`] | how the content of each mount gets into the guest |
//!
//! Pure but for one look at each mount's source, which the caller lends ([`Facts::look`]).

mod checks;
mod devices;
mod mounts;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use joey_protocol::limits::MAX_SPEC;
use oci_spec::runtime::Spec;

pub use self::mounts::{Shared, Source, Volume, WriteBack};
use crate::volumes::direct::{Direct, MountInfoError};

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";

/// What a path of the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Socket, FIFO or device.
    Special,
    /// Not there.
    Missing,
}

/// What the plan needs to know of the sandbox and the host.
pub struct Facts<'a> {
    /// The VMM's process, whose namespaces CRI names when it means the pod's.
    pub vmm_pid: u32,
    /// Content of pod files that containerd does not make (Sandbox API).
    pub pod_files: &'a BTreeMap<String, Vec<u8>>,
    /// The most bytes that emptyDirs on the pod's disk may hold, by name.
    pub empty_dirs: &'a BTreeMap<String, u64>,
    /// Tells what a path of the host is, following links.
    pub look: &'a dyn Fn(&Path) -> Kind,
    /// Tells which path of its file system is mounted at a path.
    pub mounted: &'a dyn Fn(&Path) -> Option<PathBuf>,
    /// Finds what a CSI driver has left for a path: a disk that the guest mounts itself.
    pub direct: &'a dyn Fn(&Path) -> Result<Option<Direct>, MountInfoError>,
    /// Finds the description of the disk, if the mount at this path is one of joey-snapshotter's.
    pub described: &'a dyn Fn(&Path) -> Option<PathBuf>,
}

/// Why a container cannot be a VM pod's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} {value:?}: {reason}")]
pub struct Refusal {
    /// Field of the specification.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// Why not, and what to do.
    pub reason: String,
}

fn refuse(field: &'static str, value: impl ToString, reason: impl ToString) -> Refusal {
    Refusal { field, value: value.to_string(), reason: reason.to_string() }
}

/// What is to be done for a container.
#[derive(Debug)]
pub struct Plan {
    /// The specification for the guest, JSON.
    pub spec: Vec<u8>,
    /// Whether the root is mounted read-only.
    pub read_only_root: bool,
    /// What is copied in or shared.
    pub volumes: Vec<Volume>,
    /// Images as volumes: their names for the guest, and descriptions of their disks.
    pub images: Vec<(String, PathBuf)>,
    /// Block devices of the host that the container has.
    pub devices: Vec<BlockDevice>,
    /// What is brought back.
    pub write_back: Vec<WriteBack>,
}

/// A block device of the host that is given to a container (`volumeDevices`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Its numbers on the host, major and minor.
    pub numbers: (i64, i64),
    /// Whether the container may write to it.
    pub writable: bool,
}

impl Plan {
    /// Plans a container.
    ///
    /// # Errors
    /// [`Refusal`] names the field and the value.
    pub fn new(spec: &Spec, facts: &Facts<'_>) -> Result<Self, Refusal> {
        let mut spec = spec.clone();
        checks::hooks(&spec)?;
        checks::annotations(&spec)?;
        checks::profiles(&spec)?;
        checks::namespaces(&spec, facts)?;
        let devices = devices::of_host(&mut spec)?;
        let mut plan = Self {
            spec: Vec::new(),
            read_only_root: spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false),
            volumes: Vec::new(),
            images: Vec::new(),
            devices,
            write_back: Vec::new(),
        };
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in &mut mounts {
            plan.mount(mount, facts)?;
        }
        mounts.extend(plan.pod_files(&mounts, facts));
        spec.set_mounts(Some(mounts));
        plan.spec = serde_json::to_vec(&spec)
            .map_err(|error| refuse("config.json", "", format!("cannot be encoded: {error}")))?;
        if plan.spec.len() > MAX_SPEC {
            return Err(refuse(
                "config.json",
                format!("{} bytes", plan.spec.len()),
                format!("larger than {MAX_SPEC} bytes: shorten arguments or environment"),
            ));
        }
        Ok(plan)
    }
}

/// Whether this is CRI's sandbox container.
#[must_use]
pub fn is_sandbox(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    annotations.and_then(|all| all.get(CONTAINER_TYPE)).is_some_and(|typ| typ == "sandbox")
}

/// The sysctls of the sandbox container: the pod's.
#[must_use]
pub fn sandbox_sysctls(spec: &Spec) -> Vec<(String, String)> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.sysctl().clone()).unwrap_or_default();
    all.into_iter().collect()
}

//! A pod's place in the node's policy: the number by which its packets are known, whose it is, and which
//! addresses are its own.
//!
//! Taken before any packet can pass, and given back knowing nothing but the record, which names it before it
//! is taken. Numbers are told apart by the moment they were given, so giving back twice, or after somebody
//! else got the number, takes nothing from anybody.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

use joey_ebpf::netlink::Socket;
use joey_ebpf::policy::abi::{Limit, Pod, PodId, name_digest};
use joey_ebpf::policy::maps::{Lock, MapError, Maps, directory};
use nix::time::{ClockId, clock_gettime};

use super::read;
use crate::mesh::Mesh;
use crate::net_limits::NetLimits;
use crate::sandbox::record::PodNetwork;

/// Why a pod has no place in the policy, or still one.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// The maps are not there or cannot be locked.
    #[error("the node's policy below {dir}: {step}: {source}")]
    Policy {
        /// `bpf_dir`.
        dir: PathBuf,
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A map refused.
    #[error(transparent)]
    Map(#[from] MapError),
    /// What is to be undone could not be written down first.
    #[error("write down the pod's place in the node's policy: {0}")]
    Record(io::Error),
    /// The node's own addresses are unknown.
    #[error("the node's own addresses: {0}")]
    Addresses(String),
}

/// Who asks for a place.
#[derive(Debug, Clone, Default)]
pub struct Applicant {
    /// Whose it is; empty: nobody's, who reaches and is reached by shared services alone.
    pub tenant: String,
    /// Kubernetes namespace and name, where CRI gave them.
    pub pod: Option<(String, String)>,
    /// How it is in a mesh.
    pub mesh: Mesh,
}

fn open(bpf_dir: &Path) -> Result<(Maps, Lock), AdmissionError> {
    Ok((maps(bpf_dir)?, lock(bpf_dir)?))
}

fn maps(bpf_dir: &Path) -> Result<Maps, AdmissionError> {
    let (dir, step) = (bpf_dir.to_owned(), "open its maps");
    Maps::open(bpf_dir).map_err(|source| AdmissionError::Policy { dir, step, source })
}

fn lock(bpf_dir: &Path) -> Result<Lock, AdmissionError> {
    let (dir, step) = (bpf_dir.to_owned(), "lock it");
    Lock::take(bpf_dir).map_err(|source| AdmissionError::Policy { dir, step, source })
}

/// Gives a pod with this hardware address and these addresses a place, after `record` has written it down.
/// `node` are the node's own addresses, which may speak with its pods.
pub(super) fn admit(
    bpf_dir: &Path,
    applicant: &Applicant,
    mac: [u8; 6],
    mut addresses: Vec<IpAddr>,
    node: &[IpAddr],
    mut record: impl FnMut(&PodNetwork) -> io::Result<()>,
) -> Result<PodId, AdmissionError> {
    if addresses.iter().any(IpAddr::is_ipv6) {
        addresses.push(link_local(mac).into());
    }
    let maps = maps(bpf_dir)?;
    maps.put_node_addresses(node)?;
    // The lock is for names that are new: whoever waits for it waits for all others that start.
    let number = |name: &str| match maps.known_number(name)? {
        Some(number) => Ok(number),
        None => Ok::<_, AdmissionError>(maps.number_of(&lock(bpf_dir)?, name)?),
    };
    let tenant = number(&applicant.tenant)?;
    let (name, space) = match &applicant.pod {
        Some((namespace, name)) => (name_digest(namespace, name), number(namespace)?),
        None => (0, 0),
    };
    loop {
        let (id, table) = maps.vacancy(tenant)?;
        let since = now();
        let place = PodNetwork {
            bpf_dir: bpf_dir.to_owned(),
            maps: directory(bpf_dir),
            id,
            since,
            addresses: addresses.clone(),
            tenant: applicant.tenant.clone(),
        };
        record(&place).map_err(AdmissionError::Record)?;
        let pod = Pod { since, name, tenant, space, table, limited: false, mac };
        if maps.add_pod(id, &pod, &addresses)? {
            return Ok(id);
        }
        // Another pod was quicker.
    }
}

/// Gives a place back; fine if it was never taken, or given back, or is somebody else's now.
pub(super) fn dismiss(place: &PodNetwork) -> Result<(), AdmissionError> {
    // Another version's maps, whose layout is not known here: they go with the last pods that have them.
    if place.maps != directory(&place.bpf_dir) {
        return Ok(());
    }
    let (maps, lock) = match open(&place.bpf_dir) {
        // Nothing is loaded, so nothing is left.
        Err(AdmissionError::Policy { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(());
        }
        other => other?,
    };
    match maps.pod(place.id)? {
        Some(pod) if pod.since == place.since => {
            Ok(maps.remove_pod(&lock, place.id, &place.addresses)?)
        }
        _ => Ok(()),
    }
}

/// Changes how many packets a pod may send and get.
pub(super) fn limit_packets(place: &PodNetwork, limits: &NetLimits) -> Result<(), AdmissionError> {
    let (maps, lock) = open(&place.bpf_dir)?;
    let Some(pod) = maps.pod(place.id)?.filter(|pod| pod.since == place.since) else {
        return Ok(());
    };
    let packets = [limits.egress_packets, limits.ingress_packets];
    maps.put_limit(place.id, Limit { packets })?;
    let pod = Pod { limited: limits.limits_packets(), ..pod };
    Ok(maps.change_pod(&lock, place.id, &pod, &place.addresses)?)
}

/// The addresses of the namespace that the calling thread is in, but those that only it can use.
///
/// # Errors
/// The kernel does not list them.
pub fn own_addresses() -> Result<Vec<IpAddr>, AdmissionError> {
    let fail = |error: &dyn std::fmt::Display| AdmissionError::Addresses(error.to_string());
    let mut socket = Socket::open().map_err(|error| fail(&error))?;
    let addresses = read::addresses(&mut socket).map_err(|error| fail(&error))?;
    let mut own: Vec<IpAddr> = addresses.into_iter().filter(|ip| !ip.is_loopback()).collect();
    // The devices of many pods may have one and the same.
    own.sort_unstable();
    own.dedup();
    Ok(own)
}

/// The address that the guest's kernel makes of the hardware address (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    let word = |high, low| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xFE80, 0, 0, 0, word(a ^ 2, b), word(c, 0xFF), word(0xFE, d), word(e, f))
}

/// Monotonic nanoseconds. Flows are seen by the coarse clock, which is never ahead of this one.
fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from);
    time.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_link_local_address_is_known() {
        let ip = link_local([0x02, 0x11, 0x22, 0x33, 0x44, 0x55]);
        assert_eq!(ip.to_string(), "fe80::11:22ff:fe33:4455");
    }
}

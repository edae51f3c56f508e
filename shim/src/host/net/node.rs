//! The node's own addresses, which may speak with its pods, and who keeps them in the policy's map.
//!
//! A daemon that does says so by a lock on a directory beside the map, which goes with the process and with the
//! map. While nobody has it, each pod's start lists the addresses itself.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use joey_ebpf::netlink::Socket;
use joey_ebpf::policy::maps::directory;
use nix::fcntl::{Flock, FlockArg};

use super::{AdmissionError, read};

/// As long as it lives, its process keeps the node's own addresses in the map.
#[derive(Debug)]
pub struct Keeper {
    _place: Flock<File>,
}

impl Keeper {
    /// To be called when the map holds them; `None` if another process keeps them, or a pod that starts looks just
    /// now.
    ///
    /// # Errors
    /// The policy is not loaded, or the kernel refuses.
    pub fn take(bpf_dir: &Path) -> io::Result<Option<Self>> {
        let path = place(bpf_dir);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        match Flock::lock(File::open(path)?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Self { _place: lock })),
            Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
            Err((_, error)) => Err(error.into()),
        }
    }
}

/// Whether somebody keeps them.
pub(super) fn are_kept(bpf_dir: &Path) -> bool {
    let Ok(place) = File::open(place(bpf_dir)) else { return false };
    let looked = Flock::lock(place, FlockArg::LockSharedNonblock);
    matches!(looked, Err((_, nix::Error::EWOULDBLOCK)))
}

fn place(bpf_dir: &Path) -> PathBuf {
    directory(bpf_dir).join("keeper")
}

/// The device on which kube-proxy in its IPVS mode has the addresses of all Services, so that the kernel takes their
/// packets (`defaultDummyDevice` in Kubernetes' `pkg/proxy/ipvs`). They are the Services', not the node's.
const IPVS: &str = "kube-ipvs0";

/// The addresses of the namespace that the calling thread is in, but those that only it can use, and Services'.
///
/// # Errors
/// The kernel does not list them.
pub fn own_addresses() -> Result<Vec<IpAddr>, AdmissionError> {
    let fail = |error: &dyn std::fmt::Display| AdmissionError::Addresses(error.to_string());
    let mut socket = Socket::open().map_err(|error| fail(&error))?;
    // Index 0 is no device's.
    let services = nix::net::if_::if_nametoindex(IPVS).unwrap_or(0);
    let addresses = read::addresses(&mut socket, services).map_err(|error| fail(&error))?;
    let mut own: Vec<IpAddr> = addresses.into_iter().filter(|ip| !ip.is_loopback()).collect();
    // The devices of many pods may have one and the same.
    own.sort_unstable();
    own.dedup();
    Ok(own)
}

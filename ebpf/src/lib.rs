//! Joey's eBPF programs, compiled into this crate: those that judge packets, loaded once per node and attached per
//! pod, and those that a guest's kernel runs ([`guest`]), loaded by the agent before there is a pod.
//!
//! Loading (feature `loader`) verifies and pins a program and is done by `joey ebpf load`. Attaching
//! opens the pin and speaks netlink, nothing else: it is on the start path of every pod.

use std::path::{Path, PathBuf};

pub mod attach;
#[cfg(feature = "loader")]
pub mod guest;
#[cfg(feature = "loader")]
pub mod loader;
pub mod lookup;
pub mod map;
pub mod netlink;
pub mod policy;
pub mod route;
pub mod shape;
mod sys;

/// Where the wire's program is pinned below `bpf_dir`.
///
/// The name holds the object's digest: another version of Joey pins beside it, and what is attached
/// keeps what it has.
#[must_use]
pub fn pinned_path(bpf_dir: &Path) -> PathBuf {
    bpf_dir.join(concat!("wire-", env!("JOEY_WIRE_DIGEST")))
}

//! Attaching the policy's programs to a pod's devices.
//!
//! The filter's classid tells the program which pod it judges for. The kernel hands on 16 bits of it,
//! which is why a [`PodId`] has as many. (An interface's index would not tell: every pod has a network
//! namespace of its own, and most of them the same index in it.)

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::abi::{PodId, Side};
use super::maps::directory;
use crate::attach::run;
use crate::netlink::Message;
use crate::sys;

const NAME: &str = "joey-policy";

/// The programs that judge what either side sends.
#[derive(Debug)]
pub struct Programs {
    /// For what enters the tap.
    pub from_vm: OwnedFd,
    /// For what enters the pod's interface.
    pub to_vm: OwnedFd,
}

/// Where the program that judges what `sender` sends is pinned. As with the wire, the name holds the
/// object's digest.
pub(super) fn pinned_path(bpf_dir: &Path, sender: Side) -> PathBuf {
    directory(bpf_dir).join(match sender {
        Side::Vm => concat!("from_vm-", env!("JOEY_POLICY_DIGEST")),
        Side::Peer => concat!("to_vm-", env!("JOEY_POLICY_DIGEST")),
    })
}

/// Opens the programs; `NotFound` when this version's were not loaded on this node yet.
pub fn open(bpf_dir: &Path) -> io::Result<Programs> {
    let program = |side| sys::open_pin(&pinned_path(bpf_dir, side));
    Ok(Programs { from_vm: program(Side::Vm)?, to_vm: program(Side::Peer)? })
}

/// The request that has `program` judge what enters `index`, a device of `pod`; to be sent after
/// [`crate::attach::carry`]. It has the wire's place among filters, and [`crate::attach::detach`] takes
/// it off.
#[must_use]
pub fn attach(index: u32, program: BorrowedFd<'_>, pod: PodId) -> Message {
    let step = format!("attach the policy of pod {pod} to interface {index}");
    run(step, index, program, NAME, Some(pod.into()))
}

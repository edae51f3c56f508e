//! Attaching the policy's programs to a pod's devices.
//!
//! The filter's classid tells the program which pod it judges for. The kernel hands on 16 bits of it,
//! which is why a [`PodId`] has as many. (An interface's index would not tell: every pod has a network
//! namespace of its own, and most of them the same index in it.)

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use super::abi::PodId;
use super::maps::directory;
use crate::attach::run;
use crate::netlink::Message;
use crate::sys;

const NAME: &str = "joey-policy";

/// The pinned programs.
#[derive(Debug)]
pub struct Programs {
    /// Judges what enters the tap.
    pub from_vm: OwnedFd,
    /// Judges what enters the pod's interface.
    pub to_vm: OwnedFd,
}

/// Names of the pins in [`directory`], in the order of [`Programs`]' fields. They hold the object's digest:
/// another version of Joey pins beside, and what is attached keeps what it has.
pub const PINS: [&str; 2] = [
    concat!("from_vm-", env!("JOEY_POLICY_DIGEST")),
    concat!("to_vm-", env!("JOEY_POLICY_DIGEST")),
];

/// Opens the programs; `NotFound` when this version's were not loaded on this node yet.
pub fn open(bpf_dir: &Path) -> io::Result<Programs> {
    let [from_vm, to_vm] = PINS.map(|pin| sys::open_pin(&directory(bpf_dir).join(pin)));
    Ok(Programs { from_vm: from_vm?, to_vm: to_vm? })
}

/// The request that has `program` judge what enters `index`, a device of `pod`; to be sent after
/// [`crate::attach::carry`]. It has the wire's place among filters, and [`crate::attach::detach`] takes
/// it off.
#[must_use]
pub fn attach(index: u32, program: BorrowedFd<'_>, pod: PodId) -> Message {
    let step = format!("attach the policy of pod {pod} to interface {index}");
    run(step, index, program, NAME, Some(pod.into()))
}

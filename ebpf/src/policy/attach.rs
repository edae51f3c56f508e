//! Attaching the policy's programs to a pod's devices.
//!
//! The filter's classid tells the program which pod it judges for. The kernel hands on 16 bits of it,
//! which is why a [`PodId`] has as many. (An interface's index would not tell: every pod has a network
//! namespace of its own, and most of them the same index in it.)

use std::os::fd::BorrowedFd;

use super::abi::PodId;
use crate::attach::run;
use crate::netlink::Message;

const NAME: &str = "joey-policy";

/// The request that has `program` judge what enters `index`, a device of `pod`; to be sent after
/// [`crate::attach::carry`]. It has the wire's place among filters, and [`crate::attach::detach`] takes
/// it off.
#[must_use]
pub fn attach(index: u32, program: BorrowedFd<'_>, pod: PodId) -> Message {
    let step = format!("attach the policy of pod {pod} to interface {index}");
    run(step, index, program, NAME, Some(pod.into()))
}

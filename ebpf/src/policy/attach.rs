//! Attaching the policy's programs to a pod's devices.
//!
//! The filter's classid tells the program which pod it judges for. The kernel hands on 16 bits of it,
//! which is why a [`PodId`] has as many. (An interface's index would not tell: every pod has a network
//! namespace of its own, and most of them the same index in it.)

use std::os::fd::{AsRawFd as _, BorrowedFd};

use super::abi::PodId;
use crate::attach::{ACT_DIRECT, TCA_BPF_FD, TCA_BPF_FLAGS, TCA_BPF_NAME, filter};
use crate::netlink::Message;

const TCA_BPF_CLASSID: u16 = 3;
const NAME: &str = "joey-policy";

/// The request that has `program` judge what enters `index`, a device of `pod`; to be sent after
/// [`crate::attach::carry`]. It has the wire's place among filters, and [`crate::attach::detach`] takes
/// it off.
#[must_use]
pub fn attach(index: u32, program: BorrowedFd<'_>, pod: PodId) -> Message {
    let fd = program.as_raw_fd().unsigned_abs();
    let step = format!("attach the policy of pod {pod} to interface {index}");
    Message::new(step, libc::RTM_NEWTFILTER, libc::NLM_F_CREATE, &filter(index))
        .text(libc::TCA_KIND, "bpf")
        .nest(libc::TCA_OPTIONS, |options| {
            options
                .number(TCA_BPF_FD, fd)
                .text(TCA_BPF_NAME, NAME)
                .number(TCA_BPF_CLASSID, pod.into())
                .number(TCA_BPF_FLAGS, ACT_DIRECT)
        })
}

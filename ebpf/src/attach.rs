//! Attaching the pinned wire to two devices of a pod's network namespace, by netlink only.
//!
//! Invariant: a device is paired with the one whose index is [`partner`] of its own, so the filters
//! carry no state that could be stale. Every operation can be repeated.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::netlink::{Message, NetlinkError, Socket};
use crate::sys;

/// Length of the kernel's `struct tcmsg`.
const TCMSG: usize = 20;
/// Handle and parent of the qdisc that carries filters for what enters a device.
const CLSACT: u32 = 0xFFFF_FFF1;
const CLSACT_HANDLE: u32 = 0xFFFF_0000;
const INGRESS: u32 = 0xFFFF_FFF2;
const EGRESS: u32 = 0xFFFF_FFF3;
/// After the filters others may have put on the pod's interface.
const PRIORITY: u32 = 1000;
const HANDLE: u32 = 1;
const NAME: &str = "joey-wire";
const TCA_BPF_CLASSID: u16 = 3;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const ACT_DIRECT: u32 = 1;
/// Of which packets of a device a program decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hook {
    /// Those that enter it.
    Enters,
    /// Those that leave it.
    Leaves,
}

/// Difference between the indices of two paired devices; `bpf/wire.bpf.c` has the same number.
const PARTNER: u32 = 0x4000_0000;

/// The index that the partner of device `index` has to have.
#[must_use]
pub fn partner(index: u32) -> u32 {
    index ^ PARTNER
}

/// Opens the wire's program; `NotFound` when this version's was not loaded on this node yet.
pub fn open(bpf_dir: &Path) -> io::Result<OwnedFd> {
    sys::open_pin(&crate::pinned_path(bpf_dir))
}

/// The requests that send all that enters `index` to its partner, to be sent as one batch after
/// [`carry`].
#[must_use]
pub fn attach(index: u32, program: &OwnedFd) -> Message {
    let step = format!("attach the wire to interface {index}");
    run(step, index, Hook::Enters, program.as_fd(), NAME, None)
}

/// The request that has `program` run, and decide, on all that enters or leaves `index`. Of a classid the kernel hands it 16 bits.
pub(crate) fn run(
    step: String,
    index: u32,
    hook: Hook,
    program: BorrowedFd<'_>,
    name: &str,
    classid: Option<u32>,
) -> Message {
    let fd = program.as_raw_fd().unsigned_abs();
    Message::new(step, libc::RTM_NEWTFILTER, libc::NLM_F_CREATE, &filter(index, hook))
        .text(libc::TCA_KIND, "bpf")
        .nest(libc::TCA_OPTIONS, |options| {
            let options = options.number(TCA_BPF_FD, fd).text(TCA_BPF_NAME, name);
            let options = match classid {
                Some(classid) => options.number(TCA_BPF_CLASSID, classid),
                None => options,
            };
            options.number(TCA_BPF_FLAGS, ACT_DIRECT)
        })
}

/// Makes a device able to carry filters. One that others made is used as it is.
pub fn carry(socket: &mut Socket, index: u32) -> Result<(), NetlinkError> {
    let step = format!("add the clsact qdisc to interface {index}");
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let header = tcmsg(index, CLSACT_HANDLE, CLSACT, 0);
    let add = Message::new(step, libc::RTM_NEWQDISC, flags, &header).text(libc::TCA_KIND, "clsact");
    ignore(socket.request(add), &[libc::EEXIST])
}

/// Takes the wire off a device, and the qdisc too unless somebody else's filter is on it.
///
/// Fine when nothing is attached or the device is gone.
pub fn detach(socket: &mut Socket, index: u32) -> Result<(), NetlinkError> {
    // The kernel answers EINVAL where there is no qdisc for filters at all.
    let gone = [libc::ENOENT, libc::ENODEV, libc::EINVAL];
    for hook in [Hook::Enters, Hook::Leaves] {
        let step = format!("detach the wire from interface {index}");
        let delete = Message::new(step, libc::RTM_DELTFILTER, 0, &filter(index, hook));
        ignore(socket.request(delete.text(libc::TCA_KIND, "bpf")), &gone)?;
    }
    for parent in [INGRESS, EGRESS] {
        let step = format!("list the filters of interface {index}");
        let list = Message::new(step, libc::RTM_GETTFILTER, 0, &tcmsg(index, 0, parent, 0));
        match socket.dump(list) {
            Ok(filters) if filters.is_empty() => {}
            Ok(_) => return Ok(()),
            Err(error) => return ignore(Err(error), &gone),
        }
    }
    let step = format!("remove the clsact qdisc of interface {index}");
    let header = tcmsg(index, CLSACT_HANDLE, CLSACT, 0);
    let delete = Message::new(step, libc::RTM_DELQDISC, 0, &header).text(libc::TCA_KIND, "clsact");
    ignore(socket.request(delete), &gone)
}

fn ignore(result: Result<(), NetlinkError>, fine: &[i32]) -> Result<(), NetlinkError> {
    match result {
        Err(error) if error.errno().is_some_and(|errno| fine.contains(&errno)) => Ok(()),
        other => other,
    }
}

/// The header of a request about Joey's filter of what enters or leaves a device.
fn filter(index: u32, hook: Hook) -> [u8; TCMSG] {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    let parent = match hook {
        Hook::Enters => INGRESS,
        Hook::Leaves => EGRESS,
    };
    tcmsg(index, HANDLE, parent, PRIORITY << 16 | u32::from(protocol))
}

pub(crate) fn tcmsg(index: u32, handle: u32, parent: u32, info: u32) -> [u8; TCMSG] {
    let mut header = [0; TCMSG];
    for (place, value) in header.chunks_exact_mut(4).skip(1).zip([index, handle, parent, info]) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
    header
}

//! Shaping: how many bits a second leave a device, by a TBF qdisc at its root (tc-tbf(8),
//! `net/sched/sch_tbf.c`).
//!
//! What is too early waits instead of being dropped, so TCP reaches the limit; a packet that is larger than the
//! bucket is sent in parts. Earliest departure times would cost less with many queues, but need the fq qdisc on
//! the device, which not every kernel has. Every operation can be repeated.

use std::time::Duration;

use crate::attach::tcmsg;
use crate::netlink::{Message, NetlinkError, Socket};

/// `TC_H_ROOT`.
const ROOT: u32 = 0xFFFF_FFFF;
/// By which the qdisc is known as Joey's: "jy:".
const HANDLE: u32 = 0x6A79_0000;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// `TC_LINKLAYER_ETHERNET`.
const ETHERNET: u8 = 1;
/// How much of a second's bytes may leave at once after a pause, so that a second's are at most 2 % too many. What
/// the kernel could not send in time is lost beyond that: with 250 ticks a second and processors that others
/// use, whoever is to send waits for some ticks, and 5 ms let a stream have 83 % of 100 Mbit/s on a busy machine.
const BURST: Duration = Duration::from_millis(20);
/// A few full packets at least: at 1 Mbit/s, these.
const LEAST_BURST: u64 = 8 << 10;
/// How much of a second's bytes may wait beside: what a stream has under way that halves its speed when a packet
/// is lost, and reaches the limit nevertheless.
const QUEUE: Duration = Duration::from_millis(50);
/// The largest packet that a guest hands over at once, as segments, and some: below 10 Mbit/s more than that only
/// waits longer.
const LEAST_QUEUE: u64 = 80 << 10;

/// Has no more than `bits` a second leave a device, or as many as it can if 0.
///
/// # Errors
/// The kernel refuses, as one without `CONFIG_NET_SCH_TBF` does.
pub fn shape(socket: &mut Socket, index: u32, bits: u64) -> Result<(), NetlinkError> {
    if bits == 0 {
        return unshape(socket, index);
    }
    let rate = (bits / 8).max(1);
    let part = |of: Duration| u64::try_from(u128::from(rate) * of.as_nanos() / 1_000_000_000);
    let bytes = |of, least| {
        let bytes = part(of).unwrap_or(u64::MAX).clamp(least, u32::MAX.into());
        u32::try_from(bytes).unwrap_or(u32::MAX)
    };
    let burst = bytes(BURST, LEAST_BURST);
    let limit = bytes(QUEUE, LEAST_QUEUE).saturating_add(burst);
    let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    let header = tcmsg(index, HANDLE, ROOT, 0);
    let step = format!("limit interface {index} to {bits} bits a second");
    let request = Message::new(step, libc::RTM_NEWQDISC, flags, &header)
        .text(libc::TCA_KIND, "tbf")
        .nest(libc::TCA_OPTIONS, |options| {
            options
                .attribute(TCA_TBF_PARMS, &parameters(rate, limit))
                .attribute(TCA_TBF_RATE64, &rate.to_ne_bytes())
                .number(TCA_TBF_BURST, burst)
        });
    socket.request(request)
}

/// `struct tc_tbf_qopt`: rate and peak rate as `struct tc_ratespec`, limit, buffer, mtu.
fn parameters(rate: u64, limit: u32) -> [u8; 36] {
    let mut bytes = [0; 36];
    bytes[1] = ETHERNET;
    bytes[8..12].copy_from_slice(&u32::try_from(rate).unwrap_or(u32::MAX).to_ne_bytes());
    bytes[24..28].copy_from_slice(&limit.to_ne_bytes());
    bytes
}

/// Takes Joey's limit off a device. Fine when there is none, or no device.
pub fn unshape(socket: &mut Socket, index: u32) -> Result<(), NetlinkError> {
    let step = format!("take the limit off interface {index}");
    let delete = Message::new(step, libc::RTM_DELQDISC, 0, &tcmsg(index, HANDLE, ROOT, 0));
    match socket.request(delete.text(libc::TCA_KIND, "tbf")) {
        // No qdisc at all, another one, or no device.
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => {
            Ok(())
        }
        other => other,
    }
}

//! A fake VM: a network namespace whose tap is joined to the wire's by one thread, as QEMU's main loop joins a
//! guest's device to it without vhost: same headers, same offloads, one system call a packet.
//!
//! What the wire sees is what a VM would have it see; nothing is emulated, so it is far faster.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::Result;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::group::Door;
use super::netns::{Frames, NetNs};
use crate::sys;

/// Packets that are taken from one side before the other has its turn, as in QEMU's `net/tap.c`.
const TURN: usize = 50;
/// `struct virtio_net_hdr`.
const HEADER: usize = 10;
/// In it, `VIRTIO_NET_HDR_GSO_UDP_L4` and the flag `VIRTIO_NET_HDR_GSO_ECN`.
const UDP: u8 = 5;
const ECN: u8 = 0x80;
/// The largest packet, its header and some.
const BUFFER: usize = 70_000;

/// What was handed to the VM, counted as the frames that they are on a wire.
#[derive(Debug, Default)]
struct Counted {
    packets: AtomicU64,
    bytes: AtomicU64,
}

/// Joins the two until it is dropped.
#[derive(Debug)]
pub struct Vm {
    counted: Arc<Counted>,
    /// Closing it ends the thread.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Vm {
    /// Joins the wire's tap to a new device `eth0` in `guest`, in the group behind `door`.
    pub fn start(guest: &NetNs, wire: OwnedFd, door: Door) -> Result<Self> {
        let own = guest.inside(|| Ok(sys::make_tap("eth0")?))?;
        let flags = OFlag::from_bits_truncate(fcntl(&wire, FcntlArg::F_GETFL)?);
        fcntl(&wire, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        sys::offload(&wire)?;
        sys::offload(&own)?;
        let (end, stop) = nix::unistd::pipe()?;
        let counted = Arc::new(Counted::default());
        let counting = counted.clone();
        let thread = thread::Builder::new().name("fake-vm".to_owned()).spawn(move || {
            door.enter();
            splice(wire.into(), own.into(), &end, &counting);
        })?;
        Ok(Self { counted, stop: Some(stop), thread: Some(thread) })
    }

    /// What the VM has received. One packet that stands for several segments counts as these.
    #[must_use]
    pub fn received(&self) -> Frames {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Frames { packets: of(&self.counted.packets), bytes: of(&self.counted.bytes) }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn splice(mut wire: File, mut guest: File, stop: &OwnedFd, counted: &Counted) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let wait = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = [wait(wire.as_fd()), wait(guest.as_fd()), wait(stop.as_fd())];
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            return;
        }
        let [to_vm, from_vm, ended] = fds.map(|fd| fd.any().unwrap_or(true));
        if ended {
            return;
        }
        if to_vm && pass(&mut wire, &mut guest, &mut buffer, Some(counted)).is_err() {
            return;
        }
        if from_vm && pass(&mut guest, &mut wire, &mut buffer, None).is_err() {
            return;
        }
    }
}

/// Passes what is there, a turn's worth at most; fails when the source is gone.
fn pass(
    from: &mut File,
    to: &mut File,
    buffer: &mut [u8],
    counted: Option<&Counted>,
) -> io::Result<()> {
    for _ in 0..TURN {
        let length = match from.read(buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            // The device is down.
            Err(error) if error.raw_os_error() == Some(nix::libc::EIO) => return Ok(()),
            Err(error) => return Err(error),
        };
        if let Some(counted) = counted {
            let frames = frames(&buffer[..length]);
            counted.packets.fetch_add(frames.packets, Ordering::Relaxed);
            counted.bytes.fetch_add(frames.bytes, Ordering::Relaxed);
        }
        // One that the other side does not take is lost, as on a wire.
        let _ = to.write(&buffer[..length]);
    }
    Ok(())
}

/// The frames that a packet with its header (`struct virtio_net_hdr`) stands for.
fn frames(packet: &[u8]) -> Frames {
    let Some((header, frame)) = packet.split_at_checked(HEADER) else { return Frames::default() };
    let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    // Not `hdr_len`, which is only how much of it the kernel has in one piece.
    let (kind, segment, transport) = (header[1] & !ECN, word(4), usize::from(word(6)));
    let length = frame.len() as u64;
    if kind == 0 || segment == 0 {
        return Frames { packets: 1, bytes: length };
    }
    let headers = match kind {
        UDP => 8,
        _ => frame.get(transport + 12).map_or(20, |offset| u64::from(offset >> 4) * 4),
    } + transport as u64;
    let packets = length.saturating_sub(headers).div_ceil(segment.into()).max(1);
    Frames { packets, bytes: length + (packets - 1) * headers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_counts_as_its_segments() {
        let mut packet = vec![0; HEADER + 54 + 2500];
        assert_eq!(frames(&packet), Frames { packets: 1, bytes: 2554 });
        packet[1] = 1 | ECN;
        packet[4..6].copy_from_slice(&1000_u16.to_le_bytes());
        packet[6] = 34;
        packet[HEADER + 34 + 12] = 5 << 4;
        assert_eq!(frames(&packet), Frames { packets: 3, bytes: 2554 + 2 * 54 });
        assert_eq!(frames(&[0; 4]), Frames::default());
    }
}

//! All unsafe code of the harness: entering namespaces on the way to exec, a file system without power, what a packet
//! capture has lost, and taps.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;
use nix::sched::{CloneFlags, setns};

// linux/fs/ext4/ext4.h.
nix::ioctl_read!(ext4_shutdown, b'X', 125, u32);
// linux/if_tun.h.
nix::ioctl_readwrite_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int!(tun_set_offload, b'T', 208);
/// `TUN_F_CSUM`, `TUN_F_TSO4`, `TUN_F_TSO6` and `TUN_F_TSO_ECN`: what QEMU asks for when a guest's driver takes it.
const OFFLOADS: u64 = 0b1111;

/// What is in memory only is lost, the log included.
const EXT4_GOING_FLAGS_NOLOGFLUSH: u32 = 2;

/// Stops the ext4 file system that `folder` is on as a loss of power would: nothing is written to its disk any more.
pub fn lose_power(folder: &File) -> nix::Result<()> {
    let mut how = EXT4_GOING_FLAGS_NOLOGFLUSH;
    // SAFETY: the kernel reads one u32, which outlives the call.
    unsafe { ext4_shutdown(folder.as_raw_fd(), &mut how) }.map(drop)
}

/// Makes `command`'s process join the given namespaces, in order, before it executes.
pub fn join_before_exec(command: &mut Command, namespaces: Vec<(File, CloneFlags)>) {
    let join = move || {
        for (file, kind) in &namespaces {
            setns(file, *kind)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only calls setns(2) on descriptors that it owns; it
    // neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(join);
    }
}

/// Makes a tap in the calling thread's network namespace, with the headers that a VMM's taps have.
pub(crate) fn make_tap(name: &str) -> io::Result<OwnedFd> {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let tun = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/net/tun")?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *to = from.cast_signed();
    }
    let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = kind as libc::c_short;
    // SAFETY: the kernel reads and writes one ifreq, which outlives the call.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw mut request) }?;
    Ok(tun.into())
}

/// Has the reader of a tap get packets as large as the stack makes them, checksums left to it.
pub(crate) fn offload(tap: impl AsFd) -> nix::Result<()> {
    // SAFETY: the argument is a number.
    unsafe { tun_set_offload(tap.as_fd().as_raw_fd(), OFFLOADS) }.map(drop)
}

/// Frames that a packet socket could not keep since it was asked last.
pub fn packet_losses(socket: &OwnedFd) -> io::Result<u64> {
    // `struct tpacket_stats`: packets, drops.
    let mut statistics = [0_u32; 2];
    let mut length = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to the numbers, which live until the call returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            statistics.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(statistics[1].into())
}

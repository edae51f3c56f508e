//! All unsafe code of the harness: entering namespaces on the way to exec, a file system without power, and what a
//! packet capture has lost.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;
use nix::sched::{CloneFlags, setns};

// linux/fs/ext4/ext4.h.
nix::ioctl_read!(ext4_shutdown, b'X', 125, u32);
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

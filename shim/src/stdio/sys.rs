//! Descriptors under fixed numbers for a child.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::fcntl::{FcntlArg, fcntl};
use tokio::process::Command;

/// Gives the child of `command` these descriptors as 3, 4 and 5. They live as long as `command`.
pub(super) fn pass_from_3(command: &mut Command, fds: [OwnedFd; 3]) -> io::Result<()> {
    let mut moved = Vec::new();
    for fd in fds {
        // Above the numbers that are set below, or one could overwrite another.
        let number = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(10))?;
        // SAFETY: the number was just made and nothing else owns it.
        moved.push(unsafe { OwnedFd::from_raw_fd(number) });
    }
    let pass = move || {
        for (number, fd) in (3..).zip(&moved) {
            // SAFETY: dup2 takes any numbers and is async-signal-safe.
            if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure calls dup2 only, and allocates nothing.
    unsafe { command.pre_exec(pass) };
    Ok(())
}

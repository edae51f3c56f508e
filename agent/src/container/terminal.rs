//! The terminal of a process: a new pair of the container's own devpts.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::paths::{self, Missing};
use super::{Error, sys};

/// Opens a pair, makes its far end this process's stdio and controlling terminal, and gives the near
/// one. Runs inside the new root, as leader of a session.
pub(crate) fn open(width: u16, height: u16) -> Result<OwnedFd, Error> {
    let open = || -> io::Result<OwnedFd> {
        let master = File::options().read(true).write(true).open("/dev/pts/ptmx")?;
        let master = OwnedFd::from(master);
        let slave = sys::pty_peer(master.as_fd())?;
        if width > 0 && height > 0 {
            sys::set_window_size(master.as_fd(), width, height)?;
        }
        sys::take_terminal(slave.as_fd())?;
        for fd in 0..=2 {
            sys::duplicate_to(slave.as_raw_fd(), fd)?;
        }
        Ok(master)
    };
    open().map_err(|error| {
        Error::failed(format!("opening a terminal in the container's /dev/pts: {error}"))
    })
}

/// Puts this process's terminal on `/dev/console`.
pub(crate) fn bind_console(root: BorrowedFd<'_>) -> Result<(), Error> {
    let bind = || -> io::Result<()> {
        let target = paths::open_or_create(root, Path::new("dev/console"), Missing::File)?;
        let copy = sys::clone_tree(sys::standard(0), Path::new(""), false)?;
        sys::attach(copy.as_fd(), target.as_fd())
    };
    bind().map_err(|error| Error::failed(format!("making /dev/console: {error}")))
}

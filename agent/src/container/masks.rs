//! Paths that a container may not see, or not write.
//!
//! Runs inside the new root. One empty read-only tmpfs serves all hidden directories of a container,
//! and one descriptor of `/dev/null`, checked to be the real one, all hidden files.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::makedev;

use super::mount_options;
use super::paths;
use super::{Error, sys};

fn missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR))
}

fn failed(what: &str, path: &str, error: io::Error) -> Error {
    Error::failed(format!("{what} {path:?}: {error}"))
}

/// Makes every path read-only; what is not there needs nothing.
pub(crate) fn make_read_only(root: BorrowedFd<'_>, names: &[String]) -> Result<(), Error> {
    for name in names {
        let one = || -> io::Result<()> {
            let target = paths::open(root, Path::new(name))?;
            let copy = sys::clone_tree(target.as_fd(), Path::new(""), true)?;
            sys::set_mount_attributes(copy.as_fd(), &mount_options::read_only(), false)?;
            sys::attach(copy.as_fd(), target.as_fd())
        };
        match one() {
            Err(error) if missing(&error) => {}
            result => result.map_err(|error| failed("making read-only", name, error))?,
        }
    }
    Ok(())
}

/// Hides every path: a directory behind an empty one, anything else behind `/dev/null`.
pub(crate) fn hide(root: BorrowedFd<'_>, null: &File, names: &[String]) -> Result<(), Error> {
    let mut empty: Option<OwnedFd> = None;
    for name in names {
        let mut one = || -> io::Result<()> {
            let target = paths::open(root, Path::new(name))?;
            let is_directory = File::from(target.try_clone()?).metadata()?.is_dir();
            let cover = match (is_directory, &empty) {
                (false, _) => sys::clone_tree(null.as_fd(), Path::new(""), false)?,
                (true, Some(empty)) => sys::clone_tree(empty.as_fd(), Path::new(""), false)?,
                (true, None) => {
                    let fs = sys::fs_open(c"tmpfs")?;
                    sys::fs_set(fs.as_fd(), c"nr_inodes", Some(c"2"))?;
                    let made = sys::fs_mount(fs.as_fd(), mount_options::read_only().set)?;
                    // A detached mount cannot be copied from before it is attached somewhere.
                    sys::attach(made.as_fd(), target.as_fd())?;
                    empty = Some(made);
                    return Ok(());
                }
            };
            sys::attach(cover.as_fd(), target.as_fd())
        };
        match one() {
            Err(error) if missing(&error) => {}
            result => result.map_err(|error| failed("hiding", name, error))?,
        }
    }
    Ok(())
}

/// Opens `/dev/null` and makes sure that it is the kernel's.
pub(crate) fn open_null() -> Result<File, Error> {
    let open = || -> io::Result<File> {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let data = null.metadata()?;
        match data.file_type().is_char_device() && data.rdev() == makedev(1, 3) {
            true => Ok(null),
            false => Err(io::Error::other("it is not the null device")),
        }
    };
    open().map_err(|error| Error::failed(format!("opening /dev/null: {error}")))
}

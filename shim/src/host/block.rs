//! Block devices of the host, by their numbers.

use std::fs::{self, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

/// Opens a block device. Gives its size, too, in bytes.
pub(crate) fn open(numbers: (i64, i64), writable: bool) -> io::Result<(OwnedFd, u64)> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(writable)
        .custom_flags(libc::O_NONBLOCK)
        .open(node(numbers)?)?;
    let meta = file.metadata()?;
    let found = (major(meta.rdev()).cast_signed(), minor(meta.rdev()).cast_signed());
    if !meta.file_type().is_block_device() || found != numbers {
        let (major, minor) = numbers;
        return Err(io::Error::other(format!("its node is not block device {major}:{minor}")));
    }
    let bytes = file.seek(SeekFrom::End(0))?;
    Ok((file.into(), bytes))
}

/// udev's link, or the kernel's own name for it.
fn node((major, minor): (i64, i64)) -> io::Result<PathBuf> {
    let link = PathBuf::from(format!("/dev/block/{major}:{minor}"));
    if link.exists() {
        return Ok(link);
    }
    let text = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| io::Error::other("the kernel knows no name of it"))?;
    Ok(Path::new("/dev").join(name))
}

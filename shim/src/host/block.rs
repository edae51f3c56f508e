//! Block devices of the host, by their numbers.

use std::fs::{self, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

/// Bytes that a disk's size is counted in.
const SECTOR: u64 = 512;

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

/// A block device or file that was opened by its path.
pub(crate) struct Opened {
    /// It.
    pub(crate) file: OwnedFd,
    /// Its size.
    pub(crate) bytes: u64,
    /// The same for the same device, whatever its path.
    pub(crate) key: String,
}

/// Opens a block device, or a file that is one disk.
pub(crate) fn open_path(path: &Path, writable: bool) -> io::Result<Opened> {
    let mut file =
        OpenOptions::new().read(true).write(writable).custom_flags(libc::O_NONBLOCK).open(path)?;
    let meta = file.metadata()?;
    let key = if meta.file_type().is_block_device() {
        format!("device {}:{}", major(meta.rdev()), minor(meta.rdev()))
    } else if meta.is_file() {
        format!("file {}:{}", meta.dev(), meta.ino())
    } else {
        return Err(io::Error::other("neither a block device nor a file"));
    };
    let bytes = file.seek(SeekFrom::End(0))?;
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
        return Err(io::Error::other(format!("{bytes} bytes are not whole sectors of {SECTOR}")));
    }
    Ok(Opened { file: file.into(), bytes, key })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_device_or_a_file_of_whole_sectors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        for (bytes, fits) in [(0, false), (1000, false), (1024, true)] {
            fs::File::create(&path).unwrap().set_len(bytes).unwrap();
            assert_eq!(open_path(&path, true).is_ok(), fits, "{bytes}");
        }
        assert_eq!(open_path(&path, false).unwrap().bytes, 1024);
        assert!(open_path(directory.path(), false).is_err());
        assert!(open_path(Path::new("/dev/null"), false).is_err());
        assert!(open_path(&directory.path().join("none"), false).is_err());
    }
}

//! Device nodes and links of a container's `/dev`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, SFlag, makedev, mkdirat, mknodat, umask};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};

use super::paths;
use super::{Error, Kind};

/// What every container gets.
const DEFAULT: [(&str, u64, u64); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

fn ignore_existing(result: nix::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Fills `/dev` below `root`.
pub(crate) fn fill(root: BorrowedFd<'_>, devices: &[LinuxDevice]) -> Result<(), Error> {
    let old = umask(Mode::empty());
    let result = fill_with_umask(root, devices);
    umask(old);
    result
}

fn fill_with_umask(root: BorrowedFd<'_>, devices: &[LinuxDevice]) -> Result<(), Error> {
    let mode = Mode::from_bits_truncate(0o755);
    ignore_existing(mkdirat(root, "dev", mode))
        .map_err(|error| Error::failed(format!("making /dev: {error}")))?;
    let dev = paths::open(root, Path::new("dev"))
        .map_err(|error| Error::failed(format!("opening /dev: {error}")))?;
    standard(dev.as_fd())?;
    devices.iter().try_for_each(|device| make(root, device))
}

/// Puts what every container gets into a new `/dev`.
pub(crate) fn fill_standard(dev: BorrowedFd<'_>) -> Result<(), Error> {
    let old = umask(Mode::empty());
    let result = standard(dev);
    umask(old);
    result
}

fn standard(dev: BorrowedFd<'_>) -> Result<(), Error> {
    for (name, major, minor) in DEFAULT {
        let mode = Mode::from_bits_truncate(0o666);
        ignore_existing(mknodat(dev, name, SFlag::S_IFCHR, mode, makedev(major, minor)))
            .map_err(|error| Error::failed(format!("making device /dev/{name}: {error}")))?;
    }
    for (target, name) in LINKS {
        ignore_existing(symlinkat(target, dev, name))
            .map_err(|error| Error::failed(format!("making link /dev/{name}: {error}")))?;
    }
    Ok(())
}

fn make(root: BorrowedFd<'_>, device: &LinuxDevice) -> Result<(), Error> {
    let path = device.path();
    let bad = |why: String| Error::new(Kind::Invalid, format!("making device {path:?}: {why}"));
    let relative = paths::relative(path).map_err(bad)?;
    let (Some(relative), Some(name)) = (relative, path.file_name()) else {
        return Err(bad("it has no name".into()));
    };
    if Path::new("/dev") == path.parent().unwrap_or(Path::new(""))
        && (DEFAULT.iter().any(|(known, ..)| name == *known) || name == "console" || name == "ptmx")
    {
        return Ok(());
    }
    let kind = match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        LinuxDeviceType::A => return Err(bad("type \"a\" is for rules, not for nodes".into())),
    };
    let number = |number: i64| {
        u64::try_from(number).map_err(|_| bad(format!("{number} is no device number")))
    };
    let (major, minor) = match kind {
        SFlag::S_IFIFO => (0, 0),
        _ => (number(device.major())?, number(device.minor())?),
    };
    let create = || -> io::Result<()> {
        let mode = Mode::from_bits_truncate(0o755);
        let parent = relative.parent().unwrap_or(Path::new(""));
        let parent = match parent.as_os_str().is_empty() {
            true => root.try_clone_to_owned()?,
            false => paths::create_directories(root, parent, mode)?,
        };
        let mode = Mode::from_bits_truncate(device.file_mode().unwrap_or(0o666) & 0o7777);
        ignore_existing(mknodat(parent.as_fd(), name, kind, mode, makedev(major, minor)))?;
        let (uid, gid) = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
        if (uid, gid) != (0, 0) {
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            fchownat(parent.as_fd(), name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    };
    create().map_err(|error| Error::failed(format!("making device {path:?}: {error}")))
}

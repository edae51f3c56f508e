//! Paths inside a container's root, which no symbolic link and no `..` can leave.
//!
//! A path of the specification is resolved below the root's descriptor with `openat2` and
//! `RESOLVE_IN_ROOT`: a link to `/x` or to `../..` is followed inside the root. What is missing is
//! created on the way. A mount point that names `..` itself is refused: no honest one does.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::Mode;

use super::sys;

const RESOLVE_IN_ROOT: u64 = 0x10;
const RESOLVE_NO_MAGICLINKS: u64 = 0x02;
/// Tries of one component that another process keeps swapping.
const TRIES: usize = 8;

/// What to create at the end of a path where nothing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

/// Checks a mount point and gives it relative to the root; `None` for the root itself.
pub(crate) fn relative(path: &Path) -> Result<Option<PathBuf>, String> {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(format!("{path:?} leads out of the container's root"));
            }
        }
    }
    Ok(if clean.as_os_str().is_empty() { None } else { Some(clean) })
}

/// Opens an existing path (`O_PATH`) below `root`, following links inside it.
pub(crate) fn open(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    open_with(root, path, libc::O_PATH)
}

/// Opens an existing path below `root` with the given flags.
pub(crate) fn open_with(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: libc::c_int,
) -> io::Result<OwnedFd> {
    let resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS;
    for _ in 0..TRIES {
        match sys::open_at2(root, path, flags, 0, resolve) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => continue,
            result => return result,
        }
    }
    sys::open_at2(root, path, flags, 0, resolve)
}

/// Opens `path` (relative, as [`relative`] gives it), creating what is missing.
pub(crate) fn open_or_create(
    root: BorrowedFd<'_>,
    path: &Path,
    missing: Missing,
) -> io::Result<OwnedFd> {
    match open(root, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => return result,
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => {
            create_directories(root, parent, Mode::from_bits_truncate(0o755))?
        }
        _ => root.try_clone_to_owned()?,
    };
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    create_one(root, parent.as_fd(), path, Path::new(name), missing)
}

/// `mkdir -p` below `root`; gives the last directory.
pub(crate) fn create_directories(
    root: BorrowedFd<'_>,
    path: &Path,
    mode: Mode,
) -> io::Result<OwnedFd> {
    match open_with(root, path, libc::O_PATH | libc::O_DIRECTORY) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => return result,
    }
    let mut so_far = PathBuf::new();
    let mut directory = root.try_clone_to_owned()?;
    for component in path.components() {
        let Component::Normal(name) = component else {
            continue;
        };
        so_far.push(name);
        directory = match open_with(root, &so_far, libc::O_PATH | libc::O_DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match nix::sys::stat::mkdirat(&directory, Path::new(name), mode) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                open_with(root, &so_far, libc::O_PATH | libc::O_DIRECTORY)?
            }
            result => result?,
        };
    }
    Ok(directory)
}

fn create_one(
    root: BorrowedFd<'_>,
    parent: BorrowedFd<'_>,
    path: &Path,
    name: &Path,
    missing: Missing,
) -> io::Result<OwnedFd> {
    let made = match missing {
        Missing::Directory => {
            nix::sys::stat::mkdirat(parent, name, Mode::from_bits_truncate(0o755))
        }
        Missing::File => nix::sys::stat::mknodat(
            parent,
            name,
            nix::sys::stat::SFlag::S_IFREG,
            Mode::from_bits_truncate(0o644),
            0,
        ),
    };
    match made {
        Ok(()) | Err(Errno::EEXIST) => open(root, path),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_cannot_leave_the_root() {
        assert_eq!(relative(Path::new("/a/./b")), Ok(Some("a/b".into())));
        assert_eq!(relative(Path::new("a")), Ok(Some("a".into())));
        assert_eq!(relative(Path::new("/")), Ok(None));
        assert!(relative(Path::new("../..")).is_err());
        assert!(relative(Path::new("/a/../../b")).is_err());
    }

    #[test]
    fn links_are_followed_inside_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::os::unix::fs::symlink("../../../../etc2", root.join("up")).unwrap();
        std::os::unix::fs::symlink("/deep/er", root.join("abs")).unwrap();
        std::fs::create_dir_all(root.join("etc2")).unwrap();
        std::fs::create_dir_all(root.join("deep/er")).unwrap();
        let fd = std::fs::File::open(&root).unwrap();
        let missing = Missing::Directory;
        open_or_create(fd.as_fd(), Path::new("up/made"), missing).unwrap();
        open_or_create(fd.as_fd(), Path::new("abs/file"), Missing::File).unwrap();
        open_or_create(fd.as_fd(), Path::new("x/y/z"), missing).unwrap();
        assert!(root.join("etc2/made").is_dir());
        assert!(root.join("deep/er/file").is_file());
        assert!(root.join("x/y/z").is_dir());
    }
}

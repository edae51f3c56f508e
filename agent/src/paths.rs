//! Resolution that cannot leave a root, for everything the host names by a relative path.
//!
//! Writers refuse symlinks on the way: nothing that the host copies in needs one followed, and a
//! container that shares the directory could plant one. Readers follow links, inside the root only.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat, mkdirat};

use crate::sys;

const WRITING: u64 =
    libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS;
const READING: u64 = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
const DIRECTORY: libc::c_int = libc::O_DIRECTORY | libc::O_RDONLY | libc::O_NOFOLLOW;
/// Longest path below a volume.
const PATH_MAX: usize = 4096;

/// Whether a path is relative and goes only downwards.
pub(crate) fn is_inside(path: &Path) -> bool {
    let text = path.as_os_str().as_encoded_bytes();
    !text.is_empty()
        && text.len() < PATH_MAX
        && !text.contains(&0)
        && path.components().all(|part| matches!(part, Component::Normal(_)))
}

/// Opens a file or directory of the guest as a place only.
pub(crate) fn open_path(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

/// Opens a part of a volume as a place only. Links lead where they lead inside the volume. What is missing is
/// made, as directories of the volume's mode: so the kubelet does for a `subPath`.
pub(crate) fn part(volume: OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    if !is_inside(path) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let place = |path: &Path| sys::open_below(volume.as_fd(), path, libc::O_PATH, 0, READING);
    let mode = Mode::from_bits_truncate(nix::sys::stat::fstat(&volume)?.st_mode & 0o777);
    let mut done = PathBuf::new();
    let mut above = volume.try_clone()?;
    for name in path {
        done.push(name);
        above = match place(&done) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                mkdirat(&above, name, mode)?;
                fchmodat(&above, name, mode, FchmodatFlags::FollowSymlink)?;
                place(&done)?
            }
            found => found?,
        };
    }
    Ok(above)
}

/// Opens the directory that holds `path`, making what is missing, and gives its last name.
pub(crate) fn make_parents<'p>(
    root: BorrowedFd<'_>,
    path: &'p Path,
) -> io::Result<(OwnedFd, &'p Path)> {
    let mut names: Vec<&Path> = path.iter().map(Path::new).collect();
    let Some(last) = names.pop().filter(|_| is_inside(path)) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let mut directory = sys::open_below(root, Path::new("."), DIRECTORY, 0, WRITING)?;
    for name in names {
        make_directory(directory.as_fd(), name)?;
        directory = sys::open_below(directory.as_fd(), name, DIRECTORY, 0, WRITING)?;
    }
    Ok((directory, last))
}

/// Makes a directory unless there is one.
pub(crate) fn make_directory(parent: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
    match mkdirat(parent, name, Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(nix::Error::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens `name` in a directory, for writing or as a directory; a symlink there is refused.
pub(crate) fn open_entry(
    directory: BorrowedFd<'_>,
    name: &Path,
    flags: libc::c_int,
) -> io::Result<OwnedFd> {
    let mode = if flags & libc::O_CREAT == 0 { 0 } else { 0o600 };
    sys::open_below(directory, name, flags | libc::O_NOFOLLOW | libc::O_NONBLOCK, mode, WRITING)
}

/// Opens a file for reading; links lead where they lead inside the root.
pub(crate) fn open_to_read(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    sys::open_below(root, path, libc::O_RDONLY | libc::O_NONBLOCK, 0, READING)
}

/// Puts a symlink in place of whatever file or link has that name, at once.
pub(crate) fn replace_symlink(
    directory: BorrowedFd<'_>,
    name: &Path,
    target: &Path,
    owner: (u32, u32),
) -> io::Result<()> {
    let fresh = Path::new(".joey-new-link");
    let _ = nix::unistd::unlinkat(directory, fresh, nix::unistd::UnlinkatFlags::NoRemoveDir);
    nix::unistd::symlinkat(target, directory, fresh)?;
    nix::unistd::fchownat(
        directory,
        fresh,
        Some(owner.0.into()),
        Some(owner.1.into()),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?;
    nix::fcntl::renameat(directory, fresh, directory, name).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    #[test]
    fn only_downwards() {
        for path in ["a", "a/b", "..data", "a/..2024_01/b", "./a"] {
            let normal = path != "./a";
            assert_eq!(is_inside(Path::new(path)), normal, "{path}");
        }
        for path in ["", "/", "/a", "..", "a/../b", "../a", "a/..", "a\0b"] {
            assert!(!is_inside(Path::new(path)), "{path:?}");
        }
    }

    #[test]
    fn a_planted_link_leads_nowhere() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "s").unwrap();
        let inside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), inside.path().join("way")).unwrap();
        let root = File::open(inside.path()).unwrap();
        assert!(make_parents(root.as_fd(), Path::new("way/file")).is_err());
        assert!(open_to_read(root.as_fd(), Path::new("way/secret")).is_err());
        assert!(
            open_entry(root.as_fd(), Path::new("way"), libc::O_CREAT | libc::O_WRONLY).is_err()
        );
        let (parent, name) = make_parents(root.as_fd(), Path::new("a/b/c")).unwrap();
        assert_eq!(name, Path::new("c"));
        replace_symlink(parent.as_fd(), name, Path::new("../../x"), (0, 0)).unwrap();
        replace_symlink(parent.as_fd(), name, Path::new("/y"), (0, 0)).unwrap();
        fs::write(inside.path().join("y"), "inner").unwrap();
        let file = open_to_read(root.as_fd(), Path::new("a/b/c")).unwrap();
        assert_eq!(io::read_to_string(File::from(file)).unwrap(), "inner");
    }
}

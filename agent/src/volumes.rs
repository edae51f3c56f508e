//! Small files from the host, kept in guest memory: configuration, secrets, the pod's /etc files.
//!
//! A volume lies at `/run/joey/volumes/ID`, as a directory or as one file. Containers get it as a
//! bind mount and may change it, so everything here resolves paths without trusting what is there.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt as _};
use std::path::{Path, PathBuf};

use joey_protocol::ids::{SHARED, VolumeId};
use joey_protocol::{api, limits};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, fchmod};
use oci_spec::runtime::Spec;

use crate::sandbox::memory_bytes;
use crate::{disk_volumes, paths, pod_disk, rootfs, share};

/// Where volumes lie.
pub(crate) const VOLUMES: &str = "/run/joey/volumes";
/// How a mount's source names a volume.
const VOLUME_SOURCE: &str = "joey-volume:";
/// How a mount's source names a disk of the container's own.
const DISK_SOURCE: &str = "joey-disk:";
/// How a mount's source names a writable layer over what is there.
const SCRATCH_SOURCE: &str = "joey-scratch:";
/// How a mount's source names the pod's shared memory.
const SHM_SOURCE: &str = "joey-shm:";

/// Whether a mount asks for a writable layer.
pub(crate) fn has_scratch(spec: &Spec) -> bool {
    let scratch = |mount: &oci_spec::runtime::Mount| {
        let source = mount.source().as_deref().and_then(Path::to_str);
        source.is_some_and(|source| source.starts_with(SCRATCH_SOURCE))
    };
    spec.mounts().iter().flatten().any(scratch)
}

/// Opens what a bind mount's source means (`O_PATH`): a path of the guest, or a volume and perhaps a path
/// below it, which is made if it is missing (subPath).
pub(crate) fn bind_source(
    source: &Path,
    below: &dyn Fn() -> Result<OwnedFd, String>,
) -> Result<OwnedFd, String> {
    let failed = |error: io::Error| format!("{source:?}: {error}");
    let text = source.to_str().unwrap_or_default();
    if text == SHM_SOURCE {
        return paths::open_path(Path::new("/dev/shm")).map_err(failed);
    }
    if let Some(name) = text.strip_prefix(DISK_SOURCE) {
        let name = VolumeId::new(name).map_err(|error| error.to_string())?;
        return paths::open_path(&rootfs::disk(&name)).map_err(failed);
    }
    if let Some(name) = text.strip_prefix(SCRATCH_SOURCE) {
        let name = VolumeId::new(name).map_err(|error| error.to_string())?;
        return rootfs::scratch(&name, below()?).map_err(failed);
    }
    let Some(named) = text.strip_prefix(VOLUME_SOURCE) else {
        if !source.is_absolute() {
            return Err(format!("source {source:?} is not an absolute path"));
        }
        return paths::open_path(source).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => format!("the guest, whose own it is, has no {source:?}"),
            _ => failed(error),
        });
    };
    let (id, below) = named.split_once('/').unwrap_or((named, ""));
    let id = VolumeId::new(id).map_err(|error| error.to_string())?;
    let places = [VOLUMES, pod_disk::VOLUMES, disk_volumes::MOUNTS]
        .map(|place| Path::new(place).join(id.as_str()));
    let shared = Path::new(share::SHARES).join(id.as_str());
    let shared = shared.exists().then(|| shared.join(SHARED));
    let volume = places.into_iter().find(|path| path.exists()).or(shared);
    let volume = volume.ok_or_else(|| format!("volume {id} is not in the guest"))?;
    let volume = paths::open_path(&volume).map_err(failed)?;
    match below {
        "" => Ok(volume),
        below => paths::part(volume, Path::new(below)).map_err(failed),
    }
}

/// Largest file that may be copied in: it lives in guest memory.
const FILE_MAX: u64 = 64 << 20;

/// Why a file could not be put or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// The request is not one that can be followed.
    #[error("volume {volume}: {path:?} {problem}")]
    Invalid {
        /// Which volume.
        volume: String,
        /// Which file of it.
        path: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// The file system refused.
    #[error("volume {volume}: {path:?}: {source}")]
    File {
        /// Which volume.
        volume: String,
        /// Which file of it.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// All volumes of the sandbox.
#[derive(Debug)]
pub(crate) struct Volumes {
    root: PathBuf,
    disk: PathBuf,
}

impl Volumes {
    /// Volumes below `root`, which exists, and below `disk`, which will.
    pub(crate) fn new(root: impl Into<PathBuf>, disk: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), disk: disk.into() }
    }

    /// Makes the place of a volume that needs one of its own. Gives whether the volume is new.
    pub(crate) fn place(
        &self,
        id: &VolumeId,
        medium: api::Medium,
        bytes: u64,
    ) -> Result<bool, VolumeError> {
        let make = || match medium {
            api::Medium::MEMORY => Ok(!self.root.join(id.as_str()).exists()),
            api::Medium::DISK => make_directory(&self.disk.join(id.as_str())),
            api::Medium::OWN_MEMORY => {
                let path = self.root.join(id.as_str());
                if !make_directory(&path)? {
                    return Ok(false);
                }
                // Of more than there is, or of no limit, tmpfs makes half of the memory.
                let limited = (1..memory_bytes()).contains(&bytes);
                let options = if limited { format!("size={bytes}") } else { String::new() };
                let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
                mount(Some("tmpfs"), &path, Some("tmpfs"), flags, Some(options.as_str()))?;
                Ok(true)
            }
        };
        make().map_err(|source: io::Error| VolumeError::File {
            volume: id.to_string(),
            path: String::new(),
            source,
        })
    }

    /// The directory in which this volume lies, or will.
    fn place_of(&self, id: &VolumeId) -> &Path {
        if self.disk.join(id.as_str()).exists() { &self.disk } else { &self.root }
    }

    /// Takes a volume that is one file away.
    pub(crate) fn forget_file(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let gone = std::fs::remove_file(self.root.join(id.as_str()));
        gone.map_err(|source| VolumeError::File {
            volume: id.to_string(),
            path: String::new(),
            source,
        })
    }

    /// Puts one entry in place.
    pub(crate) fn put(&self, id: &VolumeId, entry: &api::FileEntry) -> Result<(), VolumeError> {
        let invalid = |problem| VolumeError::Invalid {
            volume: id.to_string(),
            path: entry.path.clone(),
            problem,
        };
        let path = Path::new(&entry.path);
        if !entry.path.is_empty() && !paths::is_inside(path) {
            return Err(invalid("does not stay inside the volume"));
        }
        if entry.remove {
            if path.components().count() != 1 {
                return Err(invalid("is not a name of the volume, so it is not removed"));
            }
            return self.remove(&self.root.join(id.as_str()).join(path)).map_err(|source| {
                VolumeError::File { volume: id.to_string(), path: entry.path.clone(), source }
            });
        }
        let end = entry.offset.checked_add(entry.data.len() as u64);
        if entry.data.len() > limits::MAX_COPY_IN_CHUNK || end.is_none_or(|end| end > FILE_MAX) {
            return Err(invalid("is larger than what may be copied into a guest"));
        }
        let kind = entry.mode & libc::S_IFMT;
        if !matches!(kind, libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK) {
            return Err(invalid("is neither a file nor a directory nor a link"));
        }
        if entry.path.is_empty() && kind == libc::S_IFLNK {
            return Err(invalid("a volume cannot itself be a link"));
        }
        let inner = Path::new(id.as_str()).join(path);
        // Joining an empty path adds a slash, which would name a directory.
        let inner = if entry.path.is_empty() { Path::new(id.as_str()) } else { inner.as_path() };
        let root = self.place_of(id);
        self.write(root, inner, kind, entry).map_err(|source| VolumeError::File {
            volume: id.to_string(),
            path: entry.path.clone(),
            source,
        })
    }

    /// Links are not followed, in the path neither: the volume itself is nothing that a container moves.
    fn remove(&self, path: &Path) -> io::Result<()> {
        let removed = match path.symlink_metadata() {
            Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
            Ok(_) => std::fs::remove_file(path),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn write(&self, root: &Path, path: &Path, kind: u32, entry: &api::FileEntry) -> io::Result<()> {
        let root = File::open(root)?;
        let (parent, name) = paths::make_parents(root.as_fd(), path)?;
        let directory = parent.as_fd();
        let file = match kind {
            libc::S_IFLNK => {
                let target = Path::new(OsStr::from_bytes(&entry.data));
                return paths::replace_symlink(directory, name, target, (entry.uid, entry.gid));
            }
            libc::S_IFDIR => {
                paths::make_directory(directory, name)?;
                File::from(paths::open_entry(directory, name, libc::O_DIRECTORY)?)
            }
            _ => {
                let flags = libc::O_RDWR | libc::O_CREAT;
                let file = File::from(paths::open_entry(directory, name, flags)?);
                write_piece(&file, &entry.data, entry.offset)?;
                file
            }
        };
        let now = file.metadata()?;
        if (now.uid(), now.gid()) != (entry.uid, entry.gid) {
            nix::unistd::fchown(&file, Some(entry.uid.into()), Some(entry.gid.into()))?;
        }
        if now.mode() & 0o7777 != entry.mode & 0o7777 {
            fchmod(&file, Mode::from_bits_truncate(entry.mode & 0o7777))?;
        }
        Ok(())
    }

    /// Reads the beginning of a file, as a container may have left it.
    pub(crate) fn read(
        &self,
        id: &VolumeId,
        path: &str,
        limit: u64,
    ) -> Result<Vec<u8>, VolumeError> {
        if !path.is_empty() && !paths::is_inside(Path::new(path)) {
            return Err(VolumeError::Invalid {
                volume: id.to_string(),
                path: path.to_owned(),
                problem: "does not stay inside the volume",
            });
        }
        let limit = if limit == 0 { limits::MAX_READ_FILE as u64 } else { limit };
        let limit = limit.min(limits::MAX_READ_FILE as u64);
        self.read_bounded(id, path, limit).map_err(|source| VolumeError::File {
            volume: id.to_string(),
            path: path.to_owned(),
            source,
        })
    }

    fn read_bounded(&self, id: &VolumeId, path: &str, limit: u64) -> io::Result<Vec<u8>> {
        let root = File::open(&self.root)?;
        let file = if path.is_empty() {
            paths::open_entry(root.as_fd(), Path::new(id.as_str()), libc::O_RDONLY)?
        } else {
            let flags = libc::O_DIRECTORY | libc::O_RDONLY;
            let volume = paths::open_entry(root.as_fd(), Path::new(id.as_str()), flags)?;
            paths::open_to_read(volume.as_fd(), Path::new(path))?
        };
        let file = File::from(file);
        // A container may have put a pipe or a device there; reading those could wait or act.
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let mut data = Vec::new();
        file.take(limit).read_to_end(&mut data)?;
        Ok(data)
    }
}

/// Writes a piece of a file; what is there already stays. Containers may be reading it, as mount of its
/// own even: it cannot be replaced by another, and must not be empty for a moment. The first piece says
/// that nothing is behind it but what follows.
fn write_piece(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    let length = file.metadata()?.len();
    let end = offset + data.len() as u64;
    let mut there = vec![0; if length >= end { data.len() } else { 0 }];
    file.read_exact_at(&mut there, offset)?;
    if there != data {
        file.write_all_at(data, offset)?;
    }
    if offset == 0 && length > end { file.set_len(end) } else { Ok(()) }
}

/// Whether it was missing.
fn make_directory(path: &Path) -> io::Result<bool> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        made => made.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn entry(path: &str, mode: u32, data: &[u8], offset: u64) -> api::FileEntry {
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let (path, data) = (path.to_owned(), data.to_vec());
        api::FileEntry { path, mode, data, offset, uid, gid, ..Default::default() }
    }

    #[test]
    fn a_swap_is_one_event_and_what_is_gone_goes() {
        use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
        let root = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(root.path(), root.path().join("disk"));
        let id = VolumeId::new("v1").unwrap();
        volumes.put(&id, &entry("..1/key", libc::S_IFREG | 0o640, b"old", 0)).unwrap();
        volumes.put(&id, &entry("..data", libc::S_IFLNK, b"..1", 0)).unwrap();
        let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        watch.add_watch(&root.path().join("v1"), AddWatchFlags::IN_MOVED_TO).unwrap();
        volumes.put(&id, &entry("..2/key", libc::S_IFREG | 0o640, b"new", 0)).unwrap();
        volumes.put(&id, &entry("..data", libc::S_IFLNK, b"..2", 0)).unwrap();
        let events = watch.read_events().unwrap();
        let names: Vec<_> = events.into_iter().filter_map(|event| event.name).collect();
        assert_eq!(names, ["..data"]);
        let gone = |path: &str| api::FileEntry { remove: true, ..entry(path, 0, b"", 0) };
        for path in ["..1", "..1", "..data"] {
            volumes.put(&id, &gone(path)).unwrap();
            assert!(root.path().join("v1").join(path).symlink_metadata().is_err());
        }
        // The link went, not what it leads to; and only names of the volume go.
        assert!(root.path().join("v1/..2/key").exists());
        for path in ["..2/key", "", "..", "/v1"] {
            assert!(volumes.put(&id, &gone(path)).is_err(), "{path}");
        }
        assert!(!volumes.place(&id, api::Medium::MEMORY, 0).unwrap(), "it is there");
        fs::create_dir(root.path().join("disk")).unwrap();
        let own = VolumeId::new("v2").unwrap();
        assert!(volumes.place(&own, api::Medium::DISK, 0).unwrap());
        assert!(!volumes.place(&own, api::Medium::DISK, 0).unwrap(), "the next container's");
        volumes.put(&own, &entry("key", libc::S_IFREG | 0o640, b"", 0)).unwrap();
        assert!(root.path().join("disk/v2/key").exists());
    }

    #[test]
    fn files_directories_links_and_pieces() {
        let root = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(root.path(), root.path().join("disk"));
        let id = VolumeId::new("v1").unwrap();
        volumes.put(&id, &entry("", libc::S_IFDIR | 0o711, b"", 0)).unwrap();
        volumes.put(&id, &entry("..2024/key", libc::S_IFREG | 0o640, b"hello ", 0)).unwrap();
        volumes.put(&id, &entry("..2024/key", libc::S_IFREG | 0o640, b"world", 6)).unwrap();
        volumes.put(&id, &entry("..data", libc::S_IFLNK, b"..2024", 0)).unwrap();
        volumes.put(&id, &entry("key", libc::S_IFLNK, b"..data/key", 0)).unwrap();
        assert_eq!(volumes.read(&id, "key", 0).unwrap(), b"hello world");
        assert_eq!(volumes.read(&id, "key", 5).unwrap(), b"hello");
        let mode = fs::metadata(root.path().join("v1")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o711);
        volumes.put(&id, &entry("..2024/key", libc::S_IFREG | 0o600, b"new", 0)).unwrap();
        assert_eq!(volumes.read(&id, "key", 0).unwrap(), b"new");
    }

    #[test]
    fn what_is_there_is_not_written_anew_and_never_emptied() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "hello world").unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH;
        open().set_modified(long_ago).unwrap();
        write_piece(&open(), b"hello ", 0).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "hello ");
        open().set_modified(long_ago).unwrap();
        write_piece(&open(), b"hello ", 0).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), long_ago);
        write_piece(&open(), b"you", 6).unwrap();
        write_piece(&open(), b"ou", 7).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "hello you");
        write_piece(&open(), b"", 0).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_volume_can_be_one_file() {
        let root = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(root.path(), root.path().join("disk"));
        let id = VolumeId::new("hosts").unwrap();
        volumes.put(&id, &entry("", libc::S_IFREG | 0o644, b"127.0.0.1", 0)).unwrap();
        assert_eq!(volumes.read(&id, "", 0).unwrap(), b"127.0.0.1");
        assert!(volumes.read(&id, "x", 0).is_err());
    }

    #[test]
    fn refuses_ways_out_and_special_files() {
        let root = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(root.path(), root.path().join("disk"));
        let id = VolumeId::new("v").unwrap();
        for path in ["../x", "/etc/passwd", "a/../../b"] {
            assert!(volumes.put(&id, &entry(path, libc::S_IFREG, b"", 0)).is_err());
            assert!(volumes.read(&id, path, 0).is_err());
        }
        assert!(volumes.put(&id, &entry("", libc::S_IFLNK, b"/", 0)).is_err());
        assert!(volumes.put(&id, &entry("dev", libc::S_IFCHR, b"", 0)).is_err());
        assert!(volumes.put(&id, &entry("big", libc::S_IFREG, b"x", u64::MAX)).is_err());
        volumes.put(&id, &entry("", libc::S_IFDIR | 0o755, b"", 0)).unwrap();
        let fifo = root.path().join("v/fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        assert!(volumes.read(&id, "fifo", 0).is_err());
        std::os::unix::fs::symlink("/etc/hostname", root.path().join("v/out")).unwrap();
        assert!(volumes.read(&id, "out", 0).is_err());
        assert!(volumes.put(&id, &entry("out", libc::S_IFREG, b"x", 0)).is_err());
    }
}

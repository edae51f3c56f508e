//! Snapshots to block images: whatever mounts containerd hands over for a container's root.
//!
//! | mount | image |
//! | --- | --- |
//! | `erofs`, `ext4` | the file or device itself |
//! | `bind` with the option `joey.disk=` | the disk that joey-snapshotter has made ([`described`]) |
//! | `overlay`, other `bind` directory | a disk of the same kind, made once per chain and cached |
//!
//! Making one is another process's work ([`convert`]): the shim only opens what is there. A cached image is
//! in use for as long as somebody holds its shared lock, and is then never evicted.

pub mod cache;
pub mod convert;
pub mod described;

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use containerd_shim::protos::api::Mount;
use joey_protocol::api;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};

use crate::config::Config;
use crate::vmm::Disk;

/// Raised when images are made differently: old ones are then made anew.
const FORMAT: u32 = 3;

/// A file system in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// Read-only image.
    Erofs,
    /// Read-only or writable.
    Ext4,
    /// Nothing that the guest mounts: a block volume is the container's as it is.
    None,
}

impl FileSystem {
    /// The kernel's name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Ext4 => "ext4",
            Self::None => "",
        }
    }
}

/// dm-verity's parameters for a disk whose hash tree comes right after its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verity {
    /// SHA-256 of the tree's root block.
    pub root_hash: Vec<u8>,
    /// Blocks of 4096 bytes before the tree.
    pub data_blocks: u64,
}

impl From<&Verity> for api::Verity {
    fn from(verity: &Verity) -> Self {
        Self {
            root_hash: verity.root_hash.clone(),
            data_blocks: verity.data_blocks,
            ..Self::default()
        }
    }
}

/// An image, opened; cached ones are locked against eviction while this lives.
#[derive(Debug)]
pub struct Image {
    /// Files or a block device.
    pub disk: Disk,
    /// How the guest checks what it reads.
    pub verity: Option<Verity>,
    /// What is in it.
    pub file_system: FileSystem,
    /// Whether the container may write to it.
    pub writable: bool,
    /// The same for the same content.
    pub key: String,
    /// Where it says what the disk consists of, if Joey has made it.
    pub description: Option<PathBuf>,
    /// Keeps a cached image from being evicted.
    #[allow(dead_code, reason = "its drop is what counts")]
    pub(crate) lock: Option<Flock<File>>,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// containerd gave no mount.
    #[error("container {0}: containerd gave no root file system")]
    None(String),
    /// A kind of mount that cannot become an image.
    #[error("root file system mount of type {typ:?} from {source_path:?}: {reason}")]
    Mount {
        /// Its type.
        typ: String,
        /// Its source.
        source_path: String,
        /// What is wrong.
        reason: String,
    },
    /// A disk's description says what it cannot.
    #[error("disk description {path}: {reason}")]
    Description {
        /// The description.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of the host.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The conversion failed; its own words.
    #[error("make an image of {layers} layers: {reason}")]
    Convert {
        /// How many.
        layers: usize,
        /// What went wrong.
        reason: String,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootfsError {
    let path = path.to_owned();
    move |source| RootfsError::Io { what, path, source }
}

/// Opens (and if need be makes) the images of a container's root, lowest layer first.
///
/// # Errors
/// [`RootfsError`] names the mount or the file.
pub async fn prepare(
    container: &str,
    mounts: &[Mount],
    config: &Config,
) -> Result<Vec<Image>, RootfsError> {
    if mounts.is_empty() {
        return Err(RootfsError::None(container.to_owned()));
    }
    let mut images = Vec::with_capacity(mounts.len());
    for mount in mounts {
        images.push(match mount.type_.as_str() {
            "erofs" => open_block(mount, FileSystem::Erofs)?,
            "ext4" => open_block(mount, FileSystem::Ext4)?,
            "overlay" => from_directories(&Chain::of_overlay(mount)?, config).await?,
            "bind" | "rbind" => match described::path(mount) {
                Some(path) => described::open(path)?,
                None => from_directories(&Chain::of_bind(mount), config).await?,
            },
            _ => return Err(refuse(mount, "Joey takes overlay, bind, erofs and ext4")),
        });
    }
    Ok(images)
}

fn refuse(mount: &Mount, reason: impl ToString) -> RootfsError {
    RootfsError::Mount {
        typ: mount.type_.clone(),
        source_path: mount.source.clone(),
        reason: reason.to_string(),
    }
}

fn open_block(mount: &Mount, file_system: FileSystem) -> Result<Image, RootfsError> {
    let path = Path::new(&mount.source);
    let read_only = file_system == FileSystem::Erofs || mount.options.iter().any(|o| o == "ro");
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(path)
        .map_err(io_error("open image", path))?;
    let meta = file.metadata().map_err(io_error("look at image", path))?;
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return Err(refuse(mount, "not a file or block device"));
    }
    let key = format!("{}:{}:{}", meta.dev(), meta.ino(), meta.rdev());
    let disk = Disk::from(OwnedFd::from(file));
    let (verity, description, lock) = (None, None, None);
    Ok(Image { disk, verity, file_system, writable: !read_only, key, description, lock })
}

/// Directories that together are a root, the top one first.
#[derive(Debug, PartialEq, Eq)]
struct Chain {
    layers: Vec<PathBuf>,
    /// Its own writable layer, if it has content already: such a chain is nobody else's.
    private: bool,
}

impl Chain {
    fn of_bind(mount: &Mount) -> Self {
        Self { layers: vec![PathBuf::from(&mount.source)], private: false }
    }

    fn of_overlay(mount: &Mount) -> Result<Self, RootfsError> {
        let option = |key: &str| mount.options.iter().find_map(|option| option.strip_prefix(key));
        let lowers = option("lowerdir=").ok_or_else(|| refuse(mount, "no lowerdir"))?;
        let mut layers: Vec<PathBuf> = lowers.split(':').map(PathBuf::from).collect();
        let upper = option("upperdir=").map(PathBuf::from);
        let mut private = false;
        if let Some(upper) = upper {
            let mut entries =
                std::fs::read_dir(&upper).map_err(io_error("read upper layer", &upper))?;
            if entries.next().is_some() {
                layers.insert(0, upper);
                private = true;
            }
        }
        Ok(Self { layers, private })
    }

    /// Identity of the content: a snapshotter never changes a committed layer's directory, and a
    /// directory that was removed and made again has another inode or another birth.
    fn key(&self) -> Result<String, RootfsError> {
        let mut hash = Sha256::new();
        hash.update(FORMAT.to_le_bytes());
        for layer in &self.layers {
            let meta = std::fs::metadata(layer).map_err(io_error("look at layer", layer))?;
            if !meta.is_dir() {
                let error = io::Error::from(io::ErrorKind::NotADirectory);
                return Err(io_error("layer", layer)(error));
            }
            hash.update(layer.as_os_str().as_encoded_bytes());
            hash.update([0]);
            for number in [meta.dev(), meta.ino(), born(&meta)] {
                hash.update(number.to_le_bytes());
            }
            hash.update(meta.mtime().to_le_bytes());
            hash.update(meta.mtime_nsec().to_le_bytes());
        }
        Ok(hash.finalize().iter().take(20).map(|byte| format!("{byte:02x}")).collect())
    }
}

fn born(meta: &Metadata) -> u64 {
    let since = meta.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    since.and_then(|since| u64::try_from(since.as_nanos()).ok()).unwrap_or(0)
}

async fn from_directories(chain: &Chain, config: &Config) -> Result<Image, RootfsError> {
    let key = chain.key()?;
    let folder = cache::folder(config);
    let name = if chain.private {
        format!("private-{key}-{}.disk", std::process::id())
    } else {
        format!("{key}.disk")
    };
    let path = folder.join(name);
    // An evictor may be faster than the lock: made once more, it is found.
    for _ in 0..3 {
        if let Some(lock) = lock_cached(&path)? {
            let mut image = described::open(&cache::description(&path))?;
            image.lock = Some(lock);
            if chain.private {
                // Nobody else's: it lives as long as it is open.
                std::fs::remove_dir_all(&path).map_err(io_error("remove", &path))?;
            }
            return Ok(image);
        }
        convert_beside(&path, chain, config).await?;
    }
    let reason = "it is evicted as fast as it is made: raise image_cache_mib".to_owned();
    Err(RootfsError::Convert { layers: chain.layers.len(), reason })
}

/// Locks a cached image and marks it used; `None` if it is not there or being evicted.
fn lock_cached(path: &Path) -> Result<Option<Flock<File>>, RootfsError> {
    let description = cache::description(path);
    let file = match File::open(&description) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(io_error("open image", path))?,
    };
    let Ok(locked) = Flock::lock(file, FlockArg::LockSharedNonblock) else { return Ok(None) };
    // It may have been moved away, and another one be in its place by now.
    let inode = |meta: io::Result<Metadata>| meta.map(|meta| meta.ino()).ok();
    if inode(locked.metadata()) != inode(description.metadata()) {
        return Ok(None);
    }
    // Only the order of eviction depends on it.
    let _ = locked.set_modified(std::time::SystemTime::now());
    Ok(Some(locked))
}

/// Has another process make the image: the shim stays small and answers meanwhile. If the shim ends first, the
/// image is made all the same, for whoever comes next.
async fn convert_beside(path: &Path, chain: &Chain, config: &Config) -> Result<(), RootfsError> {
    let joey = config.joey().map_err(io_error("find", Path::new("joey")))?;
    let output = tokio::process::Command::new(&joey)
        .args(["image", "convert", "--bound", &config.image_cache_mib.to_string(), "--output"])
        .arg(path)
        .args(&chain.layers)
        .stdin(std::process::Stdio::null())
        .output()
        .await
        .map_err(io_error("run", &joey))?;
    if output.status.success() {
        return Ok(());
    }
    // It may have been killed, and is nobody's child but ours.
    cache::sweep(&cache::folder(config));
    let text = String::from_utf8_lossy(&output.stderr);
    let reason = match text.trim() {
        "" => format!("{}: {}", joey.display(), output.status),
        text => text.to_owned(),
    };
    Err(RootfsError::Convert { layers: chain.layers.len(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(options: &[&str]) -> Mount {
        Mount {
            type_: "overlay".to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn an_empty_upper_layer_is_left_out_and_a_used_one_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let upper = format!("upperdir={}", dir.path().display());
        let mount = overlay(&["lowerdir=/b:/a", &upper, "workdir=/w"]);
        let chain = Chain::of_overlay(&mount).unwrap();
        assert_eq!(chain.layers, [Path::new("/b"), Path::new("/a")]);
        assert!(!chain.private);
        std::fs::write(dir.path().join("file"), "x").unwrap();
        let chain = Chain::of_overlay(&mount).unwrap();
        assert_eq!(chain.layers.len(), 3);
        assert!(chain.private);
    }

    #[test]
    fn a_layer_that_was_made_again_has_another_key() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("fs");
        let key = || Chain { layers: vec![layer.clone()], private: false }.key().unwrap();
        std::fs::create_dir(&layer).unwrap();
        let first = key();
        assert_eq!(first, key());
        std::fs::remove_dir(&layer).unwrap();
        std::fs::create_dir(&layer).unwrap();
        assert_ne!(first, key());
    }

    #[tokio::test]
    async fn other_mounts_are_refused_by_type() {
        let mount = Mount { type_: "nfs".to_owned(), source: "a:/b".to_owned(), ..Mount::new() };
        let error = prepare("c", &[mount], &Config::default()).await.unwrap_err().to_string();
        assert!(error.contains("\"nfs\"") && error.contains("a:/b"), "{error}");
        assert!(prepare("c", &[], &Config::default()).await.is_err());
    }
}

//! Reads files and directories of the host and sends them into the guest, in bounded messages.
//!
//! Links are kept as links (the kubelet's `..data` layout), never followed: content outside the
//! mounted directory does not get in.

pub mod direct;
mod follow;
#[cfg(test)]
mod tests;
pub(crate) mod watch;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use joey_protocol::api;
use joey_protocol::limits::MAX_COPY_IN_CHUNK;
use nix::sys::statfs::{HUGETLBFS_MAGIC, Statfs, TMPFS_MAGIC, statfs};
use tokio::sync::Mutex as AsyncMutex;

use self::follow::Published;
use self::watch::{Watch, Watches};
use crate::guest::{Client, GuestError};
use crate::sandbox::plan::{Source, Volume};

/// Most bytes of one volume: it lives in the guest's memory.
pub const MAX_BYTES: u64 = 32 << 20;
/// What the guest needs at least for an entry, however small.
const ENTRY_BYTES: u64 = 256;
/// Most entries of one volume: as many as [`MAX_BYTES`] holds empty files.
pub const MAX_ENTRIES: u64 = MAX_BYTES / ENTRY_BYTES;
/// Bytes after which a message is sent; ttrpc takes 4 MiB.
const MESSAGE: usize = 2 << 20;

/// Why a volume was not copied in.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A file of the host cannot be read.
    #[error("mount {destination}: read {path}: {source}")]
    Read {
        /// The mount.
        destination: PathBuf,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Too much for memory.
    #[error(
        "mount {destination}: {path} has more than {MAX_BYTES} bytes or {MAX_ENTRIES} entries, \
         which is all that is copied into a guest"
    )]
    TooLarge {
        /// The mount.
        destination: PathBuf,
        /// Its source.
        path: PathBuf,
    },
    /// Something that is neither file nor directory nor link.
    #[error("mount {destination}: {path} is a socket, FIFO or device, which cannot be copied")]
    Special {
        /// The mount.
        destination: PathBuf,
        /// The file.
        path: PathBuf,
    },
    /// An emptyDir of a medium that the guest has not.
    #[error(
        "mount {destination}: {path} is an emptyDir of huge pages, which are not available in a VM pod: use \
         medium Memory"
    )]
    HugePages {
        /// The mount.
        destination: PathBuf,
        /// The kubelet's folder.
        path: PathBuf,
    },
    /// The guest refused.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// The volumes of a sandbox that the kubelet changes while they are in use.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    watches: Arc<Watches>,
    followed: Arc<Followed>,
    copied: Mutex<HashMap<String, Kinds>>,
    first: AsyncMutex<()>,
}

/// What was copied of a volume that is not followed (yet), and what kind of file each is (`S_IFMT`).
type Kinds = BTreeMap<PathBuf, u32>;

/// Those that are followed, by name. Only what is in the guest is here.
type Followed = Mutex<HashMap<String, Arc<AsyncMutex<Published>>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volumes {
    /// The notices of changes, for what else of the host the sandbox follows: a user has few instances.
    pub(crate) fn watches(&self) -> Arc<Watches> {
        Arc::clone(&self.watches)
    }

    /// Copies volumes into the guest, and keeps those up to date there that the kubelet changes.
    ///
    /// # Errors
    /// A file cannot be read, is too large, or the guest refuses it.
    pub(crate) async fn copy_in(
        &self,
        client: &Client,
        volumes: &[Volume],
    ) -> Result<(), VolumeError> {
        for volume in volumes {
            let mut sender = Sender::new(client, volume);
            match &volume.source {
                Source::Inline(content) => {
                    let entry = api::FileEntry {
                        mode: libc::S_IFREG | 0o644,
                        data: content.clone(),
                        ..Default::default()
                    };
                    sender.push(Path::new(""), entry).await?;
                }
                Source::Host(path) => self.copy(client, volume, path).await?,
                // Not copied.
                Source::Shared(_) | Source::Direct(_) => {}
                Source::Empty(path, limit) => {
                    let meta = fs::metadata(path).map_err(sender.read_error(path))?;
                    let found = statfs(path).map_err(io::Error::from);
                    let found = found.map_err(sender.read_error(path))?;
                    if found.filesystem_type() == HUGETLBFS_MAGIC {
                        let (destination, path) = (volume.destination.clone(), path.clone());
                        return Err(VolumeError::HugePages { destination, path });
                    }
                    (sender.medium, sender.size_bytes) = medium(&found, *limit);
                    sender.push(Path::new(""), entry(Path::new(""), &meta, Vec::new())).await?;
                }
            }
            sender.flush().await?;
        }
        Ok(())
    }

    /// Copies a volume of the host. One that is followed is in the guest, and containers read it: what
    /// has changed in it is carried there as always, and nothing is written anew.
    async fn copy(&self, client: &Client, volume: &Volume, path: &Path) -> Result<(), VolumeError> {
        // Of containers that are created at once one copies, and the others find it followed.
        let first = self.first.lock().await;
        let followed = lock(&self.followed).get(&volume.id).cloned();
        if let Some(published) = followed {
            drop(first);
            return published.lock().await.refresh(client, volume).await;
        }
        for _ in 1..follow::ATTEMPTS {
            match self.first_copy(client, volume, path).await {
                // The kubelet may just be swapping.
                Err(VolumeError::Read { .. }) if follow::is_published(path) => {
                    tokio::time::sleep(follow::SETTLE).await;
                }
                copied => return copied,
            }
        }
        self.first_copy(client, volume, path).await
    }

    async fn first_copy(
        &self,
        client: &Client,
        volume: &Volume,
        path: &Path,
    ) -> Result<(), VolumeError> {
        let mut sender = Sender::new(client, volume);
        let found = Published::watch(path, &self.watches).map_err(sender.read_error(path))?;
        self.whole(&mut sender, path).await?;
        if let Some((mut published, watch)) = found {
            let copied = lock(&self.copied).remove(&volume.id).unwrap_or_default();
            published.has(copied);
            self.follow(client.clone(), volume.clone(), published, watch);
        }
        Ok(())
    }

    /// Copies everything, and first takes away what an earlier copy has left that is not there any more: a
    /// container that starts again has another version of its part (subPath), or the first copy was not whole.
    async fn whole(&self, sender: &mut Sender<'_>, path: &Path) -> Result<(), VolumeError> {
        let id = &sender.volume.id;
        let before = lock(&self.copied).get(id).cloned().unwrap_or_default();
        let is = |inner: &Path| fs::symlink_metadata(path.join(inner)).map(|meta| kind(&meta));
        let gone = before.iter().filter(|(inner, kind)| is(inner).ok() != Some(**kind));
        let names: BTreeSet<_> = gone.filter_map(|(inner, _)| inner.iter().next()).collect();
        for name in names {
            sender.remove(Path::new(name)).await?;
        }
        let sent = match sender.tree(path).await {
            Ok(()) => sender.flush().await,
            failed => failed,
        };
        let mut kinds = std::mem::take(&mut sender.kinds);
        if sent.is_err() {
            kinds.extend(before);
        }
        lock(&self.copied).insert(id.clone(), kinds);
        sent
    }

    /// Keeps a volume in the guest up to date, for all containers that mount it.
    fn follow(&self, client: Client, volume: Volume, published: Published, watch: Watch) {
        let published = Arc::new(AsyncMutex::new(published));
        {
            let mut followed = lock(&self.followed);
            if followed.contains_key(&volume.id) {
                // A container that was created beside this one was first.
                return;
            }
            followed.insert(volume.id.clone(), published.clone());
        }
        let followed = Arc::clone(&self.followed);
        tokio::spawn(async move {
            let id = volume.id.clone();
            follow::follow(published, watch, client, volume).await;
            // Should a container name it again, it is copied again.
            lock(&followed).remove(&id);
        });
    }
}

/// Where an emptyDir is kept in the guest: as the kubelet has it on the host, which mounts a tmpfs for
/// `medium: Memory`, as large as its `sizeLimit`. And its limit, which for one on disk is given.
fn medium(found: &Statfs, limit: u64) -> (api::Medium, u64) {
    if found.filesystem_type() != TMPFS_MAGIC {
        return (api::Medium::DISK, limit);
    }
    let block = u64::try_from(found.block_size()).unwrap_or(0);
    (api::Medium::OWN_MEMORY, found.blocks().saturating_mul(block))
}

struct Sender<'a> {
    client: &'a Client,
    volume: &'a Volume,
    /// Where a volume that lives in the guest alone is kept there, and its limit.
    medium: api::Medium,
    size_bytes: u64,
    pending: Vec<api::FileEntry>,
    bytes: usize,
    total: u64,
    count: u64,
    kinds: Kinds,
}

impl<'a> Sender<'a> {
    fn new(client: &'a Client, volume: &'a Volume) -> Self {
        Self {
            client,
            volume,
            medium: api::Medium::MEMORY,
            size_bytes: 0,
            pending: Vec::new(),
            bytes: 0,
            total: 0,
            count: 0,
            kinds: Kinds::new(),
        }
    }

    fn read_error(&self, path: &Path) -> impl FnOnce(io::Error) -> VolumeError + use<> {
        let (destination, path) = (self.volume.destination.clone(), path.to_owned());
        move |source| VolumeError::Read { destination, path, source }
    }

    fn too_large(&self, path: &Path) -> VolumeError {
        VolumeError::TooLarge {
            destination: self.volume.destination.clone(),
            path: path.to_owned(),
        }
    }

    /// Sends the source itself and, if it is a directory, everything below it.
    async fn tree(&mut self, root: &Path) -> Result<(), VolumeError> {
        // The mount's source may itself be a link; what lies below is not followed.
        let root = fs::canonicalize(root).map_err(self.read_error(root))?;
        self.below(&root, Path::new("")).await
    }

    /// Sends `first` of `root` and everything below it.
    async fn below(&mut self, root: &Path, first: &Path) -> Result<(), VolumeError> {
        let mut left = vec![first.to_owned()];
        while let Some(inner) = left.pop() {
            let path =
                if inner.as_os_str().is_empty() { root.to_owned() } else { root.join(&inner) };
            let meta = fs::symlink_metadata(&path).map_err(self.read_error(&path))?;
            if meta.is_dir() {
                self.push(&inner, entry(&inner, &meta, Vec::new())).await?;
                for child in fs::read_dir(&path).map_err(self.read_error(&path))? {
                    let child = child.map_err(self.read_error(&path))?;
                    left.push(inner.join(child.file_name()));
                }
            } else if meta.is_symlink() {
                let target = fs::read_link(&path).map_err(self.read_error(&path))?;
                let data = target.as_os_str().as_bytes().to_vec();
                self.push(&inner, entry(&inner, &meta, data)).await?;
            } else if meta.is_file() {
                self.file(&path, &inner).await?;
            } else {
                let destination = self.volume.destination.clone();
                return Err(VolumeError::Special { destination, path });
            }
        }
        Ok(())
    }

    async fn file(&mut self, path: &Path, inner: &Path) -> Result<(), VolumeError> {
        let mut file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)
            .map_err(self.read_error(path))?;
        let meta = file.metadata().map_err(self.read_error(path))?;
        let mut offset = 0;
        loop {
            let data = read_piece(&mut file).map_err(self.read_error(path))?;
            let length = data.len();
            if length == 0 && offset > 0 {
                return Ok(());
            }
            let mut piece = entry(inner, &meta, data);
            piece.offset = offset;
            self.push(inner, piece).await?;
            offset += length as u64;
            if length < MAX_COPY_IN_CHUNK {
                return Ok(());
            }
        }
    }

    async fn push(&mut self, inner: &Path, entry: api::FileEntry) -> Result<(), VolumeError> {
        self.count += 1;
        self.total += entry.data.len() as u64;
        if self.count > MAX_ENTRIES || self.total > MAX_BYTES {
            return Err(self.too_large(inner));
        }
        self.bytes += entry.data.len() + entry.path.len() + 64;
        if !entry.remove {
            self.kinds.insert(inner.to_owned(), entry.mode & libc::S_IFMT);
        }
        self.pending.push(entry);
        if self.bytes >= MESSAGE { self.flush().await } else { Ok(()) }
    }

    /// Takes a name of the volume away, and what is below it.
    async fn remove(&mut self, name: &Path) -> Result<(), VolumeError> {
        let path = name.to_string_lossy().into_owned();
        self.push(name, api::FileEntry { path, remove: true, ..Default::default() }).await
    }

    async fn flush(&mut self) -> Result<(), VolumeError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let request = api::CopyInRequest {
            volume_id: self.volume.id.clone(),
            entries: std::mem::take(&mut self.pending),
            medium: self.medium.into(),
            size_bytes: self.size_bytes,
            if_missing: self.medium != api::Medium::MEMORY,
            ..Default::default()
        };
        self.bytes = 0;
        Ok(self.client.copy_in(&request).await?)
    }
}

fn kind(meta: &Metadata) -> u32 {
    meta.mode() & libc::S_IFMT
}

fn entry(inner: &Path, meta: &Metadata, data: Vec<u8>) -> api::FileEntry {
    api::FileEntry {
        path: inner.to_string_lossy().into_owned(),
        mode: meta.mode(),
        uid: meta.uid(),
        gid: meta.gid(),
        data,
        ..Default::default()
    }
}

fn read_piece(file: &mut File) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    file.take(MAX_COPY_IN_CHUNK as u64).read_to_end(&mut data)?;
    Ok(data)
}

//! Keeps a volume in the guest as the kubelet has it: configMap, secret, downwardAPI, projected.
//!
//! The kubelet publishes by one swap (its AtomicWriter): a new folder `..TIME` is written, the link
//! `..data` is moved to it, links for the files are made and removed, and the old folder goes. The same
//! happens in the guest, in the same order, so that a container sees the same links and the same
//! inotify events, and never a half of anything.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;

use super::watch::{Watch, Watches};
use super::{Kinds, Sender, VolumeError};
use crate::guest::{Client, GuestError};
use crate::sandbox::plan::Volume;

pub(super) const DATA: &str = "..data";
/// The kubelet makes and removes its links within this time after a swap.
pub(super) const SETTLE: Duration = Duration::from_millis(50);
/// How long a guest that refuses is left alone at first, and how long anything at most.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_AT_MOST: Duration = Duration::from_secs(60);
/// How often a container's creation tries.
pub(super) const ATTEMPTS: u32 = 5;

/// A published volume, as the guest has it.
#[derive(Debug)]
pub(super) struct Published {
    root: PathBuf,
    seen: Listing,
    /// Folders that are in the guest: all or a part of each.
    folders: HashSet<PathBuf>,
}

/// The links of a published volume, `..data` among them, and where they lead.
type Listing = HashMap<OsString, PathBuf>;

fn list(root: &Path) -> io::Result<Listing> {
    let mut links = Listing::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_type()?.is_symlink() {
            links.insert(entry.file_name(), fs::read_link(entry.path())?);
        }
    }
    Ok(links)
}

/// Whether the kubelet publishes by swaps in this directory.
pub(super) fn is_published(root: &Path) -> bool {
    fs::read_link(root.join(DATA)).is_ok()
}

impl Published {
    /// Begins to watch `source` if it is such a volume, before it is first copied. Must run inside a runtime.
    pub(super) fn watch(source: &Path, watches: &Watches) -> io::Result<Option<(Self, Watch)>> {
        let root = fs::canonicalize(source)?;
        if !is_published(&root) {
            return Ok(None);
        }
        let watch = watches.watch(&root);
        let seen = list(&root)?;
        Ok(Some((Self { root, seen, folders: HashSet::new() }, watch)))
    }

    /// Tells what the first copy has brought: the kubelet may have swapped since the listing.
    pub(super) fn has(&mut self, copied: Kinds) {
        for (path, kind) in copied.into_iter().filter(|(path, _)| path.iter().count() == 1) {
            match kind {
                libc::S_IFDIR => drop(self.folders.insert(path)),
                // Where it leads is not known: it is put again, or removed.
                _ => drop(self.seen.entry(path.into_os_string()).or_default()),
            }
        }
    }

    /// Carries what has changed into the guest, for a container that is about to be created. The
    /// kubelet may just be swapping.
    pub(super) async fn refresh(
        &mut self,
        client: &Client,
        volume: &Volume,
    ) -> Result<(), VolumeError> {
        for _ in 1..ATTEMPTS {
            match self.carry(client, volume).await {
                Err(VolumeError::Read { .. }) => tokio::time::sleep(SETTLE).await,
                carried => return carried,
            }
        }
        self.carry(client, volume).await
    }

    async fn carry(&mut self, client: &Client, volume: &Volume) -> Result<(), VolumeError> {
        let mut sender = Sender::new(client, volume);
        let now = list(&self.root).map_err(sender.read_error(&self.root))?;
        let data = OsString::from(DATA);
        let (before, after) = (self.seen.get(&data), now.get(&data));
        if let Some(folder) = after.filter(|after| Some(*after) != before) {
            self.folders.insert(folder.clone());
            sender.below(&self.root, folder).await?;
        }
        // The swap, and only then the links that go through it.
        let mut changed: Vec<_> =
            now.iter().filter(|(name, target)| self.seen.get(*name) != Some(*target)).collect();
        changed.sort_by_key(|(name, _)| (**name != data, (*name).clone()));
        for (name, target) in changed {
            let path = self.root.join(name);
            let meta = fs::symlink_metadata(&path).map_err(sender.read_error(&path))?;
            let target = target.as_os_str().as_bytes().to_vec();
            sender.push(Path::new(name), super::entry(Path::new(name), &meta, target)).await?;
        }
        let gone = self.seen.keys().filter(|name| !now.contains_key(*name)).map(PathBuf::from);
        let old = self.folders.iter().filter(|folder| after.is_some_and(|after| after != *folder));
        for path in gone.chain(old.cloned()) {
            sender.remove(&path).await?;
        }
        sender.flush().await?;
        if let Some(after) = after {
            self.folders.retain(|folder| folder == after);
        }
        self.seen = now;
        Ok(())
    }
}

/// Carries changes into the guest until volume or guest are gone.
pub(super) async fn follow(
    published: Arc<Mutex<Published>>,
    mut watch: Watch,
    client: Client,
    volume: Volume,
) {
    while watch.changed().await {
        tokio::time::sleep(SETTLE).await;
        if !insist(&published, &client, &volume).await {
            return;
        }
    }
}

/// Carries a change until the guest has it: a guest that refuses, or does not answer, may do so later.
/// False if volume or guest are gone. What changes meanwhile is carried with it.
async fn insist(published: &Mutex<Published>, client: &Client, volume: &Volume) -> bool {
    let mut pause = SETTLE;
    let mut warned = false;
    loop {
        let mut published = published.lock().await;
        match published.carry(client, volume).await {
            Ok(()) => {
                if warned {
                    tracing::info!(volume = volume.id, "changes are in the guest now");
                }
                return true;
            }
            // The kubelet was quicker, or has removed the pod: the next listing tells.
            Err(VolumeError::Read { .. }) if published.root.exists() => {}
            Err(VolumeError::Read { .. }) => return false,
            Err(VolumeError::Guest(error @ GuestError::Lost { .. })) => {
                tracing::debug!(%error, "volume not followed: the guest is gone");
                return false;
            }
            Err(VolumeError::Guest(error)) => {
                pause = pause.max(AGAIN);
                if !std::mem::replace(&mut warned, true) {
                    let path = published.root.display();
                    tracing::warn!(%path, %error, "change of a volume not in the guest yet: tried again");
                }
            }
            // Only another change can help.
            Err(
                error @ (VolumeError::TooLarge { .. }
                | VolumeError::Special { .. }
                | VolumeError::HugePages { .. }),
            ) => {
                tracing::warn!(%error, "change of a volume not carried into the guest");
                return true;
            }
        }
        drop(published);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(AGAIN_AT_MOST);
    }
}

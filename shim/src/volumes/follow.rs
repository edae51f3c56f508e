//! Keeps a volume in the guest as the kubelet has it: configMap, secret, downwardAPI, projected.
//!
//! The kubelet publishes by one swap (its AtomicWriter): a new folder `..TIME` is written, the link
//! `..data` is moved to it, links for the files are made and removed, and the old folder goes. The same
//! happens in the guest, in the same order, so that a container sees the same links and the same
//! inotify events, and never a half of anything.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use joey_protocol::api;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

use super::{Sender, VolumeError};
use crate::guest::Client;
use crate::sandbox::plan::Volume;

const DATA: &str = "..data";
/// The kubelet makes and removes its links within this time after a swap.
const SETTLE: Duration = Duration::from_millis(50);
/// How long what cannot be read is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// A published volume, watched from before it was first copied.
#[derive(Debug)]
pub(crate) struct Published {
    root: PathBuf,
    inotify: Inotify,
    /// Tells when it can be read.
    ready: AsyncFd<OwnedFd>,
    seen: Listing,
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

impl Published {
    /// Begins to watch `source` if it is such a volume. Must run inside a runtime.
    pub(super) fn watch(source: &Path) -> io::Result<Option<Self>> {
        let root = fs::canonicalize(source)?;
        if fs::read_link(root.join(DATA)).is_err() {
            return Ok(None);
        }
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let changes = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ONLYDIR;
        inotify.add_watch(&root, changes)?;
        let seen = list(&root)?;
        let ready = inotify.as_fd().try_clone_to_owned()?;
        #[allow(deprecated, reason = "an OwnedFd is what the new one asks for, unsafely")]
        let ready = AsyncFd::new(ready)?;
        Ok(Some(Self { root, inotify, ready, seen }))
    }

    /// Waits for a change; false if the volume is gone.
    async fn changed(&self) -> io::Result<bool> {
        loop {
            let mut ready = self.ready.readable().await?;
            match self.inotify.read_events() {
                Ok(events) => {
                    let gone = |flags: AddWatchFlags| flags.contains(AddWatchFlags::IN_IGNORED);
                    return Ok(!events.iter().any(|event| gone(event.mask)));
                }
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Carries changes into the guest until volume or guest are gone.
    pub(crate) async fn follow(mut self, client: Client, volume: Volume) {
        loop {
            match self.changed().await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    let path = self.root.display();
                    tracing::warn!(%path, %error, "volume not followed any more");
                    return;
                }
            }
            tokio::time::sleep(SETTLE).await;
            loop {
                match self.carry(&client, &volume).await {
                    Ok(()) => break,
                    // The kubelet was quicker, or has removed the pod: the next listing tells.
                    Err(VolumeError::Read { .. }) if self.root.exists() => {
                        tokio::time::sleep(AGAIN).await;
                    }
                    Err(VolumeError::Read { .. }) => return,
                    Err(error @ VolumeError::Guest(_)) => {
                        tracing::debug!(%error, "volume not followed: the guest is gone");
                        return;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "change of a volume not carried into the guest");
                        break;
                    }
                }
            }
        }
    }

    async fn carry(&mut self, client: &Client, volume: &Volume) -> Result<(), VolumeError> {
        let mut sender = Sender::new(client, volume);
        let now = list(&self.root).map_err(sender.read_error(&self.root))?;
        let data = OsString::from(DATA);
        let (before, after) = (self.seen.get(&data), now.get(&data));
        if let Some(folder) = after.filter(|after| Some(*after) != before) {
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
        let old = before.filter(|before| after.is_some() && Some(*before) != after);
        for path in gone.chain(old.cloned()) {
            let entry = api::FileEntry {
                path: path.to_string_lossy().into_owned(),
                remove: true,
                ..Default::default()
            };
            sender.push(&path, entry).await?;
        }
        sender.flush().await?;
        self.seen = now;
        Ok(())
    }
}

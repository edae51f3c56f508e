//! Notices of changes of published volumes, and of what else is followed: one inotify instance for a sandbox.
//!
//! A user may have 128 instances (`max_user_instances`), and the shims of a node are all of one user.
//! Where there is none to be had at all, or no further watch, a volume is looked at instead.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::follow::DATA;

/// How often a volume is looked at that there are no notices of.
const LOOK: Duration = Duration::from_secs(1);

/// The instance, made when first needed.
#[derive(Debug, Default)]
pub(crate) struct Watches(Mutex<Option<Arc<Instance>>>);

#[derive(Debug)]
struct Instance {
    inotify: Inotify,
    watched: Mutex<HashMap<WatchDescriptor, watch::Sender<()>>>,
}

/// Tells of changes in one directory.
#[derive(Debug)]
pub(super) struct Watch {
    root: PathBuf,
    /// Ends when there will be no more: the directory is gone, or the instance.
    notices: Option<watch::Receiver<()>>,
    /// Where the link `..data` led at the last look.
    data: Option<PathBuf>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watches {
    /// Begins to watch a directory. Must run inside a runtime.
    pub(super) fn watch(&self, root: &Path) -> Watch {
        let changes = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ONLYDIR;
        let notices = match self.notices(root, changes) {
            Ok(notices) => Some(notices),
            Err(error) => {
                let path = root.display();
                tracing::info!(%path, %error, "no notices of a volume's changes: it is looked at");
                None
            }
        };
        Watch { root: root.to_owned(), notices, data: data(root) }
    }

    /// Notices of such changes of a file or directory; they end with it. Must run inside a runtime.
    pub(crate) fn notices(
        &self,
        path: &Path,
        changes: AddWatchFlags,
    ) -> io::Result<watch::Receiver<()>> {
        self.instance()?.add(path, changes)
    }

    fn instance(&self) -> io::Result<Arc<Instance>> {
        let mut instance = lock(&self.0);
        if let Some(instance) = &*instance {
            return Ok(instance.clone());
        }
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let ready = inotify.as_fd().try_clone_to_owned()?;
        #[allow(deprecated, reason = "an OwnedFd is what the new one asks for, unsafely")]
        let ready = AsyncFd::new(ready)?;
        let made = Arc::new(Instance { inotify, watched: Mutex::default() });
        let read = made.clone();
        tokio::spawn(async move {
            if let Err(error) = read.pass_on(&ready).await {
                tracing::warn!(%error, "no notices of changes of volumes: they are looked at");
            }
            lock(&read.watched).clear();
        });
        *instance = Some(made.clone());
        Ok(made)
    }
}

impl Instance {
    fn add(&self, path: &Path, changes: AddWatchFlags) -> io::Result<watch::Receiver<()>> {
        // Held until it is known: a notice may come at once.
        let mut watched = lock(&self.watched);
        let descriptor = self.inotify.add_watch(path, changes)?;
        Ok(watched.entry(descriptor).or_insert_with(|| watch::Sender::new(())).subscribe())
    }

    /// Passes notices on for as long as the runtime lives.
    async fn pass_on(&self, ready: &AsyncFd<OwnedFd>) -> io::Result<()> {
        loop {
            let mut ready = ready.readable().await?;
            match self.inotify.read_events() {
                Ok(events) => self.tell(&events),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn tell(&self, events: &[InotifyEvent]) {
        let mut watched = lock(&self.watched);
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                // Whose notices were lost is not said.
                watched.values().for_each(|notices| {
                    notices.send_replace(());
                });
            } else if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                watched.remove(&event.wd);
            } else if let Some(notices) = watched.get(&event.wd) {
                notices.send_replace(());
            }
        }
    }
}

impl Watch {
    /// Waits for a change, or what may be one; false if the directory is gone.
    pub(super) async fn changed(&mut self) -> bool {
        if let Some(notices) = &mut self.notices {
            if notices.changed().await.is_ok() {
                return true;
            }
            self.notices = None;
        }
        while self.root.exists() {
            let now = data(&self.root);
            if now != self.data {
                self.data = now;
                return true;
            }
            tokio::time::sleep(LOOK).await;
        }
        false
    }
}

fn data(root: &Path) -> Option<PathBuf> {
    std::fs::read_link(root.join(DATA)).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn swap(root: &Path, target: &str) {
        symlink(target, root.join("..data_tmp")).unwrap();
        std::fs::rename(root.join("..data_tmp"), root.join(DATA)).unwrap();
    }

    async fn soon(watch: &mut Watch) -> bool {
        tokio::time::timeout(Duration::from_secs(20), watch.changed()).await.unwrap()
    }

    #[tokio::test]
    async fn one_instance_tells_of_each_volume_by_itself_and_of_its_end() {
        let watches = Watches::default();
        let volumes = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let mut watch = volumes.each_ref().map(|volume| watches.watch(volume.path()));
        assert!(watch.iter().all(|watch| watch.notices.is_some()));
        swap(volumes[1].path(), "..1");
        assert!(soon(&mut watch[1]).await);
        for quiet in [0, 2] {
            assert!(!watch[quiet].notices.as_ref().unwrap().has_changed().unwrap());
        }
        let [_, _, last] = volumes;
        last.close().unwrap();
        assert!(!soon(&mut watch[2]).await);
    }

    #[tokio::test]
    async fn without_notices_the_link_is_looked_at() {
        let volume = tempfile::tempdir().unwrap();
        swap(volume.path(), "..1");
        let data = data(volume.path());
        let mut watch = Watch { root: volume.path().to_owned(), notices: None, data };
        swap(volume.path(), "..2");
        assert!(soon(&mut watch).await);
        volume.close().unwrap();
        assert!(!soon(&mut watch).await);
    }
}

//! Memory kills of a container: noticed by the kernel's notice of its cgroup's `memory.events`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;

use crate::sys;

/// Size of an inotify event without a name: watch, mask, cookie, length, four bytes each.
const NOTE: usize = 16;

/// A start has better things to do; what happens until then is found at the first look.
const LATER: Duration = Duration::from_millis(200);

/// Calls `check` whenever the counters of `cgroup` change; ends with the cgroup.
pub(crate) async fn watch(cgroup: &Path, mut check: impl FnMut()) -> io::Result<()> {
    tokio::time::sleep(LATER).await;
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let flags = AddWatchFlags::IN_MODIFY;
    inotify.add_watch(&cgroup.join("memory.events"), flags)?;
    let notices = sys::register(OwnedFd::from(inotify), Interest::READABLE)?;
    // What happened before the watch was set.
    check();
    loop {
        let mut ready = notices.readable().await?;
        let mut notes = [0; 64 * NOTE];
        match ready.try_io(|notices| sys::read(notices.get_ref().as_fd(), &mut notes)) {
            Ok(Ok(length)) => {
                let mut masks = notes[..length].chunks_exact(NOTE).map(|note| &note[4..8]);
                if masks.any(|mask| mask == AddWatchFlags::IN_IGNORED.bits().to_ne_bytes()) {
                    return Ok(());
                }
                check();
            }
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn a_change_is_noticed_and_removal_ends_the_watch() {
        let cgroup = tempfile::tempdir().unwrap();
        let file = cgroup.path().join("memory.events");
        fs::write(&file, "oom_kill 0\n").unwrap();
        let (sender, mut calls) = tokio::sync::mpsc::unbounded_channel();
        let path = cgroup.path().to_owned();
        let task = tokio::spawn(async move { watch(&path, || sender.send(()).unwrap()).await });
        calls.recv().await.unwrap();
        fs::write(&file, "oom 3\noom_kill 1\noom_group_kill 0\n").unwrap();
        calls.recv().await.unwrap();
        fs::remove_file(&file).unwrap();
        task.await.unwrap().unwrap();
    }
}

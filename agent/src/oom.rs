//! Memory kills of a container: noticed by the kernel's notice of its cgroup's `memory.events`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

struct Notices(Inotify);

impl AsRawFd for Notices {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Calls `check` whenever the counters of `cgroup` change; ends with the cgroup.
pub(crate) async fn watch(cgroup: &Path, mut check: impl FnMut()) -> io::Result<()> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let flags = AddWatchFlags::IN_MODIFY;
    inotify.add_watch(&cgroup.join("memory.events"), flags)?;
    let notices = AsyncFd::with_interest(Notices(inotify), Interest::READABLE)?;
    // What happened before the watch was set.
    check();
    loop {
        let mut ready = notices.readable().await?;
        let read = ready.try_io(|notices| notices.get_ref().0.read_events().map_err(Into::into));
        match read {
            Ok(Ok(events)) => {
                if events
                    .iter()
                    .any(|event| event.mask.contains(AddWatchFlags::IN_IGNORED))
                {
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
        let task = tokio::spawn(async move { watch(&path, || drop(sender.send(()))).await });
        calls.recv().await.unwrap();
        fs::write(&file, "oom_kill 1\n").unwrap();
        calls.recv().await.unwrap();
        fs::remove_file(&file).unwrap();
        task.await.unwrap().unwrap();
    }
}

//! The sole waiter: every child's end is collected here and nowhere else.
//!
//! PID 1 inherits every orphan of the guest, so a `waitpid` anywhere else would race with this one.
//! A child's status is kept until its owner asks, however early the child ended. A process that the
//! agent forks is announced with [`Reaper::forked`] before the event loop runs again, so its end
//! cannot come first. One that a helper made for the agent (with `CLONE_PARENT`) may end before the
//! agent knows its number: the last few unclaimed ends are kept for [`Reaper::adopted`].

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 and the signal's number.
    pub(crate) status: u32,
    /// The guest's wall clock when the end was noticed, since 1970.
    pub(crate) at: Duration,
}

/// Announces children and hands out their ends. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper(Arc<Mutex<Children>>);

/// Unclaimed ends that are kept for owners who do not know their child yet.
const UNCLAIMED: usize = 64;

#[derive(Debug, Default)]
struct Children {
    announced: HashMap<i32, watch::Sender<Option<Exit>>>,
    unclaimed: VecDeque<(i32, Exit)>,
}

/// One announced child; its end can be awaited any number of times.
#[derive(Debug, Clone)]
pub(crate) struct Child {
    pid: Pid,
    exit: watch::Receiver<Option<Exit>>,
}

impl Child {
    /// The process's id in the agent's pid namespace.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// How it ended, if it has.
    pub(crate) fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the end.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(value) => value.unwrap_or(Exit { status: 255, at: now() }),
            // The sender lives until it has sent; only a replaced announcement can come here.
            Err(_) => Exit { status: 255, at: now() },
        }
    }
}

impl Reaper {
    fn children(&self) -> MutexGuard<'_, Children> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces a child that was just forked.
    pub(crate) fn forked(&self, pid: Pid) -> Child {
        let (sender, exit) = watch::channel(None);
        self.children().announced.insert(pid.as_raw(), sender);
        Child { pid, exit }
    }

    /// Announces a child that a helper made for the agent and that may have ended already.
    pub(crate) fn adopted(&self, pid: Pid) -> Child {
        let child = self.forked(pid);
        let mut children = self.children();
        let ended = children.unclaimed.iter().position(|(ended, _)| *ended == pid.as_raw());
        if let Some((_, exit)) = ended.and_then(|index| children.unclaimed.remove(index))
            && let Some(owner) = children.announced.remove(&pid.as_raw())
        {
            owner.send_replace(Some(exit));
        }
        drop(children);
        child
    }

    /// Collects whatever has ended, without waiting.
    fn collect(&self) {
        loop {
            let (pid, status) = match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code as u32 & 0xff),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as u32),
                Ok(WaitStatus::StillAlive) | Err(nix::Error::ECHILD) => return,
                Ok(_) | Err(nix::Error::EINTR) => continue,
                Err(error) => {
                    crate::log::warning!("waiting for children: {error}");
                    return;
                }
            };
            self.children().ended(pid.as_raw(), Exit { status, at: now() });
        }
    }

    /// Collects for as long as the agent lives.
    pub(crate) async fn run(self) -> std::io::Result<()> {
        let mut signals = signal(SignalKind::child())?;
        loop {
            self.collect();
            signals.recv().await;
        }
    }
}

impl Children {
    fn ended(&mut self, pid: i32, exit: Exit) {
        if let Some(owner) = self.announced.remove(&pid) {
            owner.send_replace(Some(exit));
            return;
        }
        if self.unclaimed.len() == UNCLAIMED {
            self.unclaimed.pop_front();
        }
        self.unclaimed.push_back((pid, exit));
    }
}

/// The guest's wall clock since 1970.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test only: `waitpid(-1)` would take children of tests running beside it.
    #[tokio::test]
    async fn ends_reach_their_owners_however_early() {
        let reaper = Reaper::default();
        let early = reaper.forked(Pid::from_raw(crate::sys::fork(|| 7).unwrap()));
        let killed = reaper.forked(Pid::from_raw(
            crate::sys::fork(|| {
                let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
                0
            })
            .unwrap(),
        ));
        let orphan = Pid::from_raw(crate::sys::fork(|| 3).unwrap());
        std::thread::sleep(Duration::from_millis(50));
        let run = tokio::spawn(reaper.clone().run());
        assert_eq!(early.wait().await.status, 7);
        assert_eq!(killed.wait().await.status, 137);
        assert_eq!(early.wait().await.status, 7);
        assert!(reaper.children().announced.is_empty());
        assert_eq!(reaper.adopted(orphan).wait().await.status, 3);
        let answer: String = crate::apart::apart(&reaper, || "done".to_owned()).await.unwrap();
        assert_eq!(answer, "done");
        let silent = crate::apart::apart(&reaper, || {
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
            String::new()
        })
        .await;
        assert!(silent.unwrap_err().to_string().contains("status 137"));
        run.abort();
    }
}

//! The sandbox's containers and their processes.
//!
//! ```text
//! create ──► Created ──start──► Running ──(reaper)──► Exited ──delete──► gone
//!               └──────────────(reaper: killed before its start)──┘
//! ```
//!
//! The same holds for an exec. An exit is told to the host the moment the reaper has it, memory kills
//! before it; output still in the pipes follows on its own streams. Locks are held for a few
//! instructions only, never across a wait: a start or a freeze that hangs delays no other call, not
//! even one to the same container. A container whose removal failed stays, disks and all, for the
//! host to try again.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use joey_protocol::api;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::task::JoinHandle;

use crate::block_devices;
use crate::container::{Container, Error as EngineError, Exec};
use crate::events::Events;
use crate::log::warning;
use crate::pod_disk::Layer;
use crate::reap::Child;
use crate::sandbox::SandboxError;
use crate::storage::SlotClaim;
use crate::streams::Pumps;

/// One process that the host knows by name.
pub(crate) struct Process {
    /// Its life as the reaper sees it.
    pub(crate) child: Child,
    pumps: Mutex<Pumps>,
}

impl Process {
    pub(crate) fn new(child: Child, pumps: Pumps) -> Self {
        Self { child, pumps: Mutex::new(pumps) }
    }

    /// Sends a signal, unless the process has ended: its number may be another's by then.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), SandboxError> {
        if self.child.exited().is_some() {
            return Err(SandboxError::Ended(self.child.pid().as_raw()));
        }
        crate::sys::kill(self.child.pid(), signal).map_err(|error| match error {
            Errno::ESRCH => SandboxError::Ended(self.child.pid().as_raw()),
            error => SandboxError::Signal { pid: self.child.pid().as_raw(), signal, error },
        })
    }

    /// Sets the size of its terminal.
    pub(crate) fn resize(&self, width: u32, height: u32) -> Result<(), SandboxError> {
        lock(&self.pumps).resize(width, height).map_err(SandboxError::Resize)
    }

    fn ended(&self) {
        lock(&self.pumps).stop_input();
    }
}

/// An exec.
pub(crate) struct ExecEntry {
    /// Its process.
    pub(crate) process: Process,
    engine: Exec,
}

impl ExecEntry {
    /// Runs the prepared command.
    pub(crate) async fn start(&self) -> Result<(), EngineError> {
        self.engine.start().await
    }
}

/// What a container's root file system is made of, and its devices.
type Root = (SlotClaim, block_devices::Use, Option<Layer>);

/// A container.
pub(crate) struct ContainerEntry {
    id: String,
    /// Its first process.
    pub(crate) init: Process,
    /// The engine's side.
    pub(crate) engine: Container,
    execs: Mutex<HashMap<String, Option<Arc<ExecEntry>>>>,
    oom_kills: AtomicU64,
    oom_watch: Mutex<Option<JoinHandle<()>>>,
    root: Mutex<Option<Root>>,
    events: Events,
}

/// The table. A name without an entry is one that is being made or removed.
#[derive(Default)]
pub(crate) struct Containers(Mutex<HashMap<String, Option<Arc<ContainerEntry>>>>);

/// A name taken for a container in the making; given back unless [`Reservation::keep`] is called.
pub(crate) struct Reservation<'a> {
    table: &'a Mutex<HashMap<String, Option<Arc<ContainerEntry>>>>,
    id: Option<String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Containers {
    /// Takes a name.
    pub(crate) fn reserve(&self, id: &str) -> Result<Reservation<'_>, SandboxError> {
        let mut table = lock(&self.0);
        if table.contains_key(id) {
            return Err(SandboxError::Exists { kind: "container", id: id.to_owned() });
        }
        table.insert(id.to_owned(), None);
        Ok(Reservation { table: &self.0, id: Some(id.to_owned()) })
    }

    /// Whether there is none, not even in the making.
    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }

    /// The containers, with their cgroups' directories.
    pub(crate) fn cgroups(&self) -> Vec<(String, PathBuf)> {
        let table = lock(&self.0);
        let entries = table.values().flatten();
        entries.map(|it| (it.id.clone(), it.engine.cgroup().to_owned())).collect()
    }

    /// Finds a container.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<ContainerEntry>, SandboxError> {
        lock(&self.0)
            .get(id)
            .and_then(Clone::clone)
            .ok_or_else(|| SandboxError::Unknown { kind: "container", id: id.to_owned() })
    }

    /// Takes a container out; its name stays reserved until the result is dropped.
    pub(crate) fn take(
        &self,
        id: &str,
    ) -> Result<(Arc<ContainerEntry>, Reservation<'_>), SandboxError> {
        let entry = lock(&self.0)
            .get_mut(id)
            .and_then(Option::take)
            .ok_or_else(|| SandboxError::Unknown { kind: "container", id: id.to_owned() })?;
        Ok((entry, Reservation { table: &self.0, id: Some(id.to_owned()) }))
    }
}

impl Reservation<'_> {
    /// Puts the container at its name.
    pub(crate) fn keep(mut self, entry: Arc<ContainerEntry>) {
        if let Some(id) = self.id.take() {
            lock(self.table).insert(id, Some(entry));
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            lock(self.table).remove(id);
        }
    }
}

impl ContainerEntry {
    /// Wraps a created container and begins to watch it. With a PID namespace that is not its own
    /// (`shares_pid`) nothing ends the rest of it when its first process ends, so that is done here,
    /// as runc's shim does: they would keep its output open, for which the host waits.
    pub(crate) fn watched(
        id: &str,
        container: Container,
        init: Process,
        root: Root,
        shares_pid: bool,
        events: Events,
    ) -> Arc<Self> {
        let entry = Arc::new(Self {
            id: id.to_owned(),
            init,
            engine: container,
            execs: Mutex::default(),
            oom_kills: AtomicU64::new(0),
            oom_watch: Mutex::default(),
            root: Mutex::new(Some(root)),
            events,
        });
        let watched = Arc::clone(&entry);
        let task = tokio::spawn(async move {
            let checked = Arc::clone(&watched);
            if let Err(error) =
                crate::oom::watch(watched.engine.cgroup(), || checked.check_oom()).await
            {
                warning!("watching the memory of container {}: {error}", watched.id);
            }
        });
        *lock(&entry.oom_watch) = Some(task);
        let ending = Arc::clone(&entry);
        tokio::spawn(async move {
            let exit = ending.init.child.wait().await;
            ending.init.ended();
            if shares_pid {
                ending.end_the_rest();
            }
            ending.tell_exit("", &ending.init.child, exit);
        });
        entry
    }

    /// Kills what the first process left behind.
    fn end_the_rest(&self) {
        if let Err(error) = self.engine.kill_all(Signal::SIGKILL)
            // Deleted meanwhile, which kills too.
            && self.engine.cgroup().exists()
        {
            warning!("ending the rest of container {}: {error}", self.id);
        }
    }

    /// Bytes and inodes that its writable layer uses, if it has one.
    pub(crate) fn layer_usage(&self) -> (u64, u64) {
        let root = lock(&self.root);
        let layer = root.as_ref().and_then(|(_, _, layer)| layer.as_ref());
        layer.map_or((0, 0), Layer::usage)
    }

    /// Tells the host of memory kills that it does not know of yet.
    fn check_oom(&self) {
        let kills = self.engine.oom_kills();
        if self.oom_kills.fetch_max(kills, Ordering::Relaxed) < kills {
            self.events.oom(&self.id);
        }
    }

    fn tell_exit(&self, exec_id: &str, child: &Child, exit: crate::reap::Exit) {
        self.check_oom();
        let killed = self.oom_kills.load(Ordering::Relaxed) > 0;
        self.events.exit(api::ExitEvent {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            pid: child.pid().as_raw().unsigned_abs(),
            status: exit.status,
            exited_at_ns: i64::try_from(exit.at.as_nanos()).unwrap_or(i64::MAX),
            oom_killed: killed && exit.status == 128 + libc::SIGKILL as u32,
            ..Default::default()
        });
    }

    /// Takes the name of an exec.
    pub(crate) fn reserve_exec(&self, id: &str) -> Result<(), SandboxError> {
        let mut execs = lock(&self.execs);
        if execs.contains_key(id) {
            return Err(SandboxError::Exists { kind: "exec", id: id.to_owned() });
        }
        execs.insert(id.to_owned(), None);
        Ok(())
    }

    /// Puts an exec at its name and watches it, or gives the name back.
    pub(crate) fn keep_exec(self: &Arc<Self>, id: &str, made: Option<(Exec, Process)>) {
        let Some((exec, process)) = made else {
            lock(&self.execs).remove(id);
            return;
        };
        let entry = Arc::new(ExecEntry { process, engine: exec });
        lock(&self.execs).insert(id.to_owned(), Some(Arc::clone(&entry)));
        let container = Arc::clone(self);
        let id = id.to_owned();
        tokio::spawn(async move {
            let exit = entry.process.child.wait().await;
            entry.process.ended();
            container.tell_exit(&id, &entry.process.child, exit);
        });
    }

    /// Finds an exec.
    pub(crate) fn exec(&self, id: &str) -> Result<Arc<ExecEntry>, SandboxError> {
        lock(&self.execs)
            .get(id)
            .and_then(Clone::clone)
            .ok_or_else(|| SandboxError::Unknown { kind: "exec", id: id.to_owned() })
    }

    /// Forgets an exec, ending it if it still runs.
    pub(crate) fn delete_exec(&self, id: &str) -> Result<(), SandboxError> {
        let exec = self.exec(id)?;
        match exec.process.signal(libc::SIGKILL) {
            Ok(()) | Err(SandboxError::Ended(_)) => {}
            Err(error) => return Err(error),
        }
        lock(&self.execs).remove(id);
        Ok(())
    }

    /// Which exec a process is the first of.
    pub(crate) fn exec_of(&self, pid: u32) -> String {
        lock(&self.execs)
            .iter()
            .find(|(_, exec)| {
                exec.as_ref().is_some_and(|e| {
                    e.process.child.pid() == Pid::from_raw(pid as i32)
                        && e.process.child.exited().is_none()
                })
            })
            .map(|(id, _)| id.clone())
            .unwrap_or_default()
    }

    /// Gives back what outlives the container's processes: the watch and the disks.
    pub(crate) fn release(&self) {
        if let Some(task) = lock(&self.oom_watch).take() {
            task.abort();
        }
        lock(&self.root).take();
    }
}

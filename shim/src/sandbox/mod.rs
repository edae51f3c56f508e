//! One pod: its virtual machine, its containers, their processes.
//!
//! ```text
//!   api ──▶ Handle ──▶ lifecycle   the sandbox's own task and containerd's Sandbox API
//!                  ├─▶ containers  create and delete: plan → images → disks → files → guest
//!                  └─▶ processes   start, exec, kill, wait, …: one call to the guest each
//!           bringup, once: wire → VMM → channel → identity     watch: exits, OOM, loss
//! ```
//!
//! The runtime has one thread; the table of containers is behind a plain mutex that is never held
//! across an await, so no request waits for another one's work. Whoever needs the guest waits for
//! [`Progress`], which the bring-up sets once.

mod bringup;
mod clock;
mod containers;
pub(crate) mod disks;
mod forward;
mod identity;
pub(crate) mod kubelet;
pub mod lifecycle;
pub mod orphans;
pub mod plan;
pub mod pod_disk;
mod processes;
pub mod record;
pub mod state;
pub mod teardown;
#[cfg(test)]
mod tests;
pub mod timeline;
mod types;
mod watch;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Mutex as AsyncMutex, mpsc, watch as channel};
use tokio::task::JoinHandle;

pub(crate) use self::bringup::Wanted;
use self::containers::Container;
pub(crate) use self::disks::Disks;
pub(crate) use self::pod_disk::{Opening, PodDisk};
use self::record::{ProcessId, Record};
use self::state::{Exit, Process};
use self::timeline::Timeline;
pub use self::types::{
    Boot, CreateTask, Deleted, ExecTask, ProcessState, SandboxError, SandboxEvent, StdioPaths,
};
use crate::config::Config;
use crate::guest::{Client, GuestChannel, Streams};
use crate::mesh::connections::Book;
use crate::net_limits::NetLimits;
use crate::share::Shares;
use crate::standby::Standby;
use crate::vmm::{DiskLimits, Vm};
use crate::volumes::Volumes;
use crate::volumes::direct::DirectVolumes;

/// How long after a failure the end that caused it may become known: a killed VMM is noticed by its silence
/// first.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// Exit status of what was killed: 128 + SIGKILL.
pub(crate) const KILLED: u32 = 137;

/// A guest that has its identity: the sandbox can take containers.
#[derive(Clone)]
pub(crate) struct Guest {
    pub(crate) client: Client,
    pub(crate) streams: Streams,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) disks: Arc<Disks>,
    /// The pod's own disk.
    pub(crate) pod_disk: Opening,
    /// Its services, where it is the guest that translates connections to them.
    pub(crate) services: Opening,
}

impl Guest {
    /// A machine that has no sandbox, and no disks in use.
    pub(crate) fn nobodys(vm: Arc<dyn Vm>, channel: &GuestChannel) -> Self {
        Self {
            client: channel.client.clone(),
            streams: channel.streams.clone(),
            vm,
            disks: Arc::default(),
            pod_disk: Opening::done(),
            services: Opening::done(),
        }
    }
}

/// How far the sandbox's start has come.
#[derive(Clone)]
enum Progress {
    /// Not asked for yet: containerd's Sandbox API brings the network namespace later.
    Waiting,
    /// Under way.
    Starting,
    /// Done.
    Ready(Guest),
    /// Failed for good.
    Failed(Arc<str>),
    /// It ran and has ended.
    Ended(Arc<str>),
}

/// Everything that can change while requests run.
#[derive(Default)]
struct Table {
    containers: HashMap<String, Container>,
    /// The sandbox's own task, where containerd made one (no process in the guest).
    pause: Option<Pause>,
    /// The VMM's number once it runs.
    vmm_pid: u32,
    /// Shutdown came while something was left.
    leaving: bool,
}

/// The sandbox's task: runs as long as the VM.
struct Pause {
    process: Process,
    task: CreateTask,
}

struct Sandbox {
    config: Arc<Config>,
    boot: Boot,
    table: Mutex<Table>,
    record: Mutex<Record>,
    /// /etc/hosts and the like, where containerd leaves them to the shim (Sandbox API).
    pod_files: Mutex<BTreeMap<String, Vec<u8>>>,
    /// The most bytes in emptyDirs on the pod's disk, by name, as its annotations say.
    empty_dirs: Mutex<BTreeMap<String, u64>>,
    /// A machine that was ready before the sandbox.
    standby: Mutex<Option<Standby>>,
    progress: channel::Sender<Progress>,
    events: mpsc::UnboundedSender<SandboxEvent>,
    timeline: Timeline,
    created_at: SystemTime,
    /// How the VM ended.
    ended: channel::Sender<Option<Exit>>,
    /// The bring-up, to be ended with the sandbox.
    starting: Mutex<Option<JoinHandle<()>>>,
    /// What the guest sees of the host's files.
    shares: Shares,
    /// What it mounts in the host's place.
    direct: DirectVolumes,
    /// What it has copies of.
    volumes: Volumes,
    /// What its disks may do at most.
    disk_limits: AsyncMutex<DiskLimits>,
    /// What its network may do at most.
    net_limits: Mutex<NetLimits>,
    /// What connections its containers have, if it is observed.
    connections: Book,
    /// Held while the sandbox's traces are removed.
    undoing: AsyncMutex<()>,
    /// Set when the shim is to leave.
    leave: channel::Sender<bool>,
}

/// A sandbox, as the services see it. Clones are the same sandbox.
#[derive(Clone)]
pub struct Handle(Arc<Sandbox>);

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").field("id", &self.0.boot.id).finish_non_exhaustive()
    }
}

impl Handle {
    /// Makes the sandbox and, where its specification is known, starts its clone at once: beside
    /// everything that containerd still does before its first call. Must run inside a runtime.
    #[must_use]
    pub(crate) fn new(
        config: Arc<Config>,
        boot: Boot,
        standby: Option<Standby>,
    ) -> (Self, mpsc::UnboundedReceiver<SandboxEvent>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let vmm = standby.as_ref().and_then(|standby| u32::try_from(standby.vm.pid()).ok());
        let record = Record {
            vmm: vmm.and_then(|pid| ProcessId::of(pid).ok()),
            shim: ProcessId::of(std::process::id()).ok(),
            ..Record::begun(&boot.id, &boot.namespace, &boot.socket)
        };
        let sandbox = Arc::new(Sandbox {
            config,
            table: Mutex::default(),
            record: Mutex::new(record),
            pod_files: Mutex::default(),
            empty_dirs: Mutex::default(),
            standby: Mutex::new(standby),
            progress: channel::Sender::new(Progress::Waiting),
            events,
            timeline: Timeline::start(boot.since),
            created_at: SystemTime::now(),
            ended: channel::Sender::new(None),
            starting: Mutex::default(),
            shares: Shares::default(),
            direct: DirectVolumes::default(),
            volumes: Volumes::default(),
            disk_limits: AsyncMutex::default(),
            net_limits: Mutex::default(),
            connections: Book::default(),
            undoing: AsyncMutex::default(),
            leave: channel::Sender::new(false),
            boot,
        });
        let handle = Self(sandbox);
        if let Err(error) = handle.record(|_| ()) {
            tracing::error!(%error, "clean-up after a crash would not find this sandbox");
        }
        if let Some(spec) = &handle.0.boot.spec {
            handle.bring_up(Wanted::of_spec(spec));
        }
        (handle, receiver)
    }

    /// Resolves when the shim is to end: after Shutdown.
    pub async fn left(&self) {
        let mut leave = self.0.leave.subscribe();
        // The sender lives in the sandbox, so this cannot fail while the handle is there.
        let _ = leave.wait_for(|leave| *leave).await;
    }

    /// Waits for the guest.
    async fn guest(&self) -> Result<Guest, SandboxError> {
        let id = || self.0.boot.id.clone();
        let mut progress = self.0.progress.subscribe();
        let settled = progress
            .wait_for(|progress| !matches!(progress, Progress::Waiting | Progress::Starting))
            .await
            .map_err(|_| SandboxError::Ended { id: id(), reason: "the shim is ending".into() })?;
        match &*settled {
            Progress::Ready(guest) => Ok(guest.clone()),
            Progress::Failed(reason) => {
                Err(SandboxError::NotStarted { id: id(), reason: reason.clone() })
            }
            Progress::Ended(reason) => {
                Err(SandboxError::Ended { id: id(), reason: reason.clone() })
            }
            Progress::Waiting | Progress::Starting => {
                Err(SandboxError::NotStarted { id: id(), reason: "it was not asked to".into() })
            }
        }
    }

    /// What is told of a failure: where the sandbox has ended, that is the reason, whatever failed first.
    ///
    /// # Errors
    /// `outcome`'s.
    pub(crate) async fn with_reason<T>(
        &self,
        outcome: Result<T, SandboxError>,
    ) -> Result<T, SandboxError> {
        let Err(error @ (SandboxError::Guest { .. } | SandboxError::Host { .. })) = outcome else {
            return outcome;
        };
        if matches!(&error, SandboxError::Guest { source, .. } if source.is_refusal()) {
            return Err(error);
        }
        let mut progress = self.0.progress.subscribe();
        let ended = progress.wait_for(|progress| matches!(progress, Progress::Ended(_)));
        let Ok(Ok(ended)) = tokio::time::timeout(LAST_WORDS * 2, ended).await else {
            return Err(error);
        };
        let Progress::Ended(reason) = &*ended else { return Err(error) };
        let reason = format!("{reason} ({error})").into();
        Err(SandboxError::Ended { id: self.0.boot.id.clone(), reason })
    }

    /// What its guest has told of connections.
    pub(crate) fn connections(&self) -> &Book {
        &self.0.connections
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while it is held; if it did, the table is still consistent per entry.
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn emit(&self, event: SandboxEvent) {
        // Without a receiver the shim is ending.
        let _ = self.0.events.send(event);
    }

    fn not_found(&self, what: &'static str, id: &str) -> SandboxError {
        SandboxError::NotFound { what, id: id.to_owned(), sandbox: self.0.boot.id.clone() }
    }

    fn directory(&self) -> PathBuf {
        record::directory(&self.0.config.run_dir, &self.0.boot.id)
    }

    /// Changes the record and writes it, before what it names is acquired.
    fn record(&self, change: impl FnOnce(&mut Record)) -> Result<(), SandboxError> {
        let record = {
            let mut record = self.0.record.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut record);
            record.clone()
        };
        record.write(&self.directory()).map_err(|error| {
            SandboxError::host(&self.0.boot.id, "write the sandbox's record", error)
        })
    }
}

impl Table {
    /// The process `exec` of container `id`, or its first one.
    fn process(&mut self, id: &str, exec: Option<&str>) -> Option<&mut Process> {
        if let Some(pause) = self.pause.as_mut().filter(|pause| pause.task.id == id) {
            return exec.is_none().then_some(&mut pause.process);
        }
        let container = self.containers.get_mut(id)?;
        match exec {
            None => Some(&mut container.process),
            Some(exec) => container.execs.get_mut(exec).map(|exec| &mut exec.process),
        }
    }

    /// Whether nothing is left that containerd has not deleted.
    fn is_empty(&self) -> bool {
        self.containers.is_empty() && self.pause.is_none()
    }
}

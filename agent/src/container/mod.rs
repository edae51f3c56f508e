//! The container engine: runs containers by the OCI runtime specification.
//!
//! ```text
//! agent                                child (own mount, pid, cgroup, ipc, uts namespaces)
//! spare:  cgroup, clone3 ───────────►  namespaces, usual file systems      (spare)
//! create: check the spec  (plan)
//!         limits          (cgroup)
//!         order ────────────────────►  root, mounts, devices, pivot_root   (init)
//!         wait for "ready" ◄─────────  identity, limits, capabilities      (process)
//! start:  "go" ─────────────────────►  execve
//!         end of file = it runs ◄────  the link closes by exec, or says why not
//! ```
//!
//! Invariants: the agent has one thread, so the child may run ordinary Rust; whatever can block
//! runs in the child; the child never returns into the agent's code; until it says "ready" nothing
//! of the container runs. A process is a direct child of the agent, whose reaper waits for it: the
//! engine itself waits for no process.

mod capability;
mod cgroup;
mod cgroup_stats;
mod device_policy;
mod devices;
mod exec;
mod init;
mod link;
mod masks;
mod mount_options;
mod mounts;
mod paths;
mod plan;
mod process;
mod seccomp;
mod seccomp_bpf;
mod spare;
mod spawn;
mod stdio;
mod sys;
mod syscalls;
mod terminal;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use joey_protocol::api::StatsResponse;
use joey_protocol::limits::deadline;
use nix::sys::signal::Signal;
use oci_spec::runtime::{LinuxResources, LinuxSeccomp, Process, Spec};

pub(crate) use cgroup::Cgroup;
pub(crate) use cgroup_stats::usage;
pub(crate) use device_policy::prepare as prepare_device_policy;
pub(crate) use link::{Kind, Link};
pub(crate) use spare::{Sources, Spares};
#[cfg(test)]
pub(crate) use stdio::Pipes;
pub(crate) use stdio::{AgentEnds, ProcessIo};

/// Why the engine did not do what was asked; the text is for the node's operator.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Error {
    /// What sort of failure, for the host's error codes.
    pub(crate) kind: Kind,
    message: String,
}

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into() }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Error {
        Error::new(Kind::Failed, message)
    }
}

/// What [`Container::create`] needs.
pub(crate) struct CreateRequest<'a> {
    /// The container's id; names its cgroup.
    pub(crate) id: &'a str,
    /// Directory of cgroup v2 below which the container's own is made.
    pub(crate) cgroup_root: &'a Path,
    /// What to run.
    pub(crate) spec: Spec,
    /// The text that `spec` was read from.
    pub(crate) json: &'a [u8],
    /// Its root file system, as the spares' [`Sources`] read it.
    pub(crate) rootfs: String,
    /// First processes.
    pub(crate) spares: &'a Spares,
    /// What its first process reads and writes.
    pub(crate) io: ProcessIo,
    /// The pod's shared PID namespace; needed when the spec names one by path.
    pub(crate) shared_pid: Option<&'a OwnedFd>,
}

/// A container: its first process, and the cgroup with all of its processes.
#[derive(Debug)]
pub(crate) struct Container {
    /// Its first process, as the agent sees it. The caller watches it.
    pub(crate) pid: i32,
    /// What it reads and writes.
    pub(crate) io: AgentEnds,
    /// How long each step of creating took.
    pub(crate) phases: Vec<(&'static str, Duration)>,
    link: Mutex<Option<Link>>,
    cgroup: Cgroup,
    pidfd: OwnedFd,
    seccomp: Option<LinuxSeccomp>,
    started: AtomicBool,
    frozen: AtomicBool,
}

/// A further process in a container.
#[derive(Debug)]
pub(crate) struct Exec {
    /// As the agent sees it. The caller watches it.
    pub(crate) pid: i32,
    /// What it reads and writes.
    pub(crate) io: AgentEnds,
    link: Mutex<Option<Link>>,
}

/// Takes the link out of a process that has not been started; what it guards cannot be half done.
fn take(link: &Mutex<Option<Link>>) -> Result<Link, Error> {
    let link = link.lock().unwrap_or_else(PoisonError::into_inner).take();
    link.ok_or_else(|| Error::new(Kind::Invalid, "the process has been started before"))
}

impl Container {
    /// Builds the container up to the point where only `execve` of its first process is missing.
    ///
    /// On failure nothing stays but a child that ends by itself.
    pub(crate) async fn create(request: CreateRequest<'_>) -> Result<Container, Error> {
        spawn::create(request).await
    }

    /// Runs the container's command; returns when the kernel has replaced the process by it.
    pub(crate) async fn start(&self) -> Result<(), Error> {
        let link = take(&self.link)?;
        link.go().await?;
        self.started.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Prepares a further process in the running container.
    pub(crate) async fn exec(&self, process: &Process, io: ProcessIo) -> Result<Exec, Error> {
        exec::exec(self, process, io).await
    }

    /// Changes limits; what `resources` does not name stays.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        self.cgroup.apply(resources)
    }

    /// Stops all processes of the container, or lets them go on; returns when that is so.
    pub(crate) async fn freeze(&self, frozen: bool) -> Result<(), Error> {
        self.cgroup.freeze(frozen, deadline::FROZEN).await?;
        self.frozen.store(frozen, Ordering::Relaxed);
        Ok(())
    }

    /// What the container uses.
    pub(crate) fn stats(&self) -> Result<StatsResponse, Error> {
        usage(self.cgroup.path())
    }

    /// All of its processes, as the agent sees them.
    pub(crate) fn pids(&self) -> Result<Vec<u32>, Error> {
        self.cgroup.pids()
    }

    /// How many of its processes the kernel has killed for lack of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        cgroup_stats::oom_kills(self.cgroup.path())
    }

    /// The cgroup's directory.
    pub(crate) fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Signals every process of the container.
    pub(crate) fn kill_all(&self, signal: Signal) -> Result<(), Error> {
        self.cgroup.kill_all(signal)
    }

    /// Kills what still runs and removes the cgroup. Mounts go with the container's namespace.
    pub(crate) async fn destroy(&self) -> Result<(), Error> {
        self.cgroup.destroy().await
    }
}

impl Exec {
    /// Runs the command; returns when the kernel has replaced the process by it.
    pub(crate) async fn start(&self) -> Result<(), Error> {
        take(&self.link)?.go().await
    }
}

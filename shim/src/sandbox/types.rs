//! What containerd asks of a sandbox, what it is answered, and how that fails.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim::protos::api::Mount;
use oci_spec::runtime::Spec;

use super::state::{Exit, Refusal, Status};
use crate::guest::GuestError;

/// What is known of a sandbox when its shim starts.
#[derive(Debug)]
pub struct Boot {
    /// containerd's id of the pod.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's bundle.
    pub bundle: PathBuf,
    /// Control groups in which containerd started the shim: what outlives the sandbox belongs there.
    pub home: Vec<PathBuf>,
    /// How long ago containerd started the shim.
    pub since: Duration,
    /// The socket that the shim serves, removed with the sandbox.
    pub socket: PathBuf,
    /// The sandbox's (or the lone container's) specification; `None` with containerd's Sandbox API.
    pub spec: Option<Spec>,
}

/// Where stdio goes: URIs or FIFO paths as containerd gives them; empty is none.
#[derive(Clone, Debug, Default)]
pub struct StdioPaths {
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// Source of standard input.
    pub stdin: String,
    /// Sink of standard output.
    pub stdout: String,
    /// Sink of standard error.
    pub stderr: String,
}

/// A container to create.
#[derive(Clone, Debug)]
pub struct CreateTask {
    /// containerd's id of it.
    pub id: String,
    /// Its bundle, with `config.json`.
    pub bundle: PathBuf,
    /// What the snapshotter wants mounted as its root.
    pub rootfs: Vec<Mount>,
    /// Where its stdio goes.
    pub stdio: StdioPaths,
}

/// A further process to create in a container.
#[derive(Clone, Debug)]
pub struct ExecTask {
    /// The container.
    pub id: String,
    /// The process's id.
    pub exec_id: String,
    /// OCI `process`, JSON.
    pub process: Vec<u8>,
    /// Where its stdio goes.
    pub stdio: StdioPaths,
}

/// State of one process, as containerd sees it.
#[derive(Clone, Debug)]
pub struct ProcessState {
    /// The container's bundle.
    pub bundle: PathBuf,
    /// Number: in the guest for a container's process, of the VMM for the sandbox's own task.
    pub pid: u32,
    /// Where it is in its life.
    pub status: Status,
    /// Its stdio.
    pub stdio: StdioPaths,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
}

/// What a deleted process was.
#[derive(Clone, Copy, Debug)]
pub struct Deleted {
    /// Its number.
    pub pid: u32,
    /// Its exit status; 0 if it was never started.
    pub status: u32,
    /// When it ended.
    pub exited_at: SystemTime,
}

/// Something containerd is told, in this order for each process: create, start, exit, delete. An exec's deletion
/// is not told, as runc's shim has it.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the fields are those of containerd's events")]
pub enum SandboxEvent {
    Created { task: CreateTask, pid: u32 },
    Started { id: String, pid: u32 },
    ExecAdded { id: String, exec_id: String },
    ExecStarted { id: String, exec_id: String, pid: u32 },
    Oom { id: String },
    Exited { id: String, exec_id: Option<String>, pid: u32, exit: Exit },
    Deleted { id: String, deleted: Deleted },
    Paused { id: String },
    Resumed { id: String },
}

/// Why an operation on a sandbox failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SandboxError {
    /// An identifier that containerd itself would refuse.
    #[error(transparent)]
    Name(#[from] joey_protocol::ids::IdError),
    /// No such container or process.
    #[error("{what} {id:?}: not found in sandbox {sandbox}")]
    NotFound {
        /// Which kind of thing.
        what: &'static str,
        /// Its id.
        id: String,
        /// Where it was looked for.
        sandbox: String,
    },
    /// The id is taken.
    #[error("{what} {id:?} exists already")]
    Exists {
        /// Which kind of thing.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The process is in the wrong state for it.
    #[error("{id}: {refusal}")]
    State {
        /// Container, or container and exec.
        id: String,
        /// Why not.
        refusal: Refusal,
    },
    /// The request asks for something that Joey refuses: the text names the field and the value.
    #[error("{0}")]
    Refused(String),
    /// The sandbox did not come up; every later request gets the same answer.
    #[error("sandbox {id} did not start: {reason}")]
    NotStarted {
        /// The sandbox.
        id: String,
        /// What failed.
        reason: Arc<str>,
    },
    /// The sandbox has ended.
    #[error("sandbox {id} has ended: {reason}")]
    Ended {
        /// The sandbox.
        id: String,
        /// Why.
        reason: Arc<str>,
    },
    /// The guest refused or did not answer.
    #[error("{id}: {source}")]
    Guest {
        /// Container, or container and exec.
        id: String,
        /// The guest's answer.
        source: GuestError,
    },
    /// Something on the host failed while `what` was done for `id`.
    #[error("{id}: {what}: {reason}")]
    Host {
        /// Container or sandbox.
        id: String,
        /// What was being done.
        what: &'static str,
        /// What failed.
        reason: String,
    },
}

impl SandboxError {
    /// A failure on the host.
    pub(crate) fn host(id: &str, what: &'static str, error: impl std::fmt::Display) -> Self {
        Self::Host { id: id.to_owned(), what, reason: error.to_string() }
    }
}

//! Calls to the agent: each with its deadline, each reply checked.
//!
//! Deadlines are the host's alone: the guest is not told, so that it never stops half-way through
//! the creation of a container because the host was slow.

use std::sync::Arc;
use std::time::Duration;

use joey_protocol::agent_ttrpc::AgentClient;
use joey_protocol::api;
use joey_protocol::limits::deadline;
use tokio::sync::Notify;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::context::Context;

use super::{Alive, Lost, checks};

/// After a call failed on the channel, how long to wait for the channel's own reason.
const REASON: Duration = Duration::from_secs(1);

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GuestError {
    /// The agent says no.
    #[error("{call} failed in the guest: {message}")]
    Refused {
        /// The call.
        call: &'static str,
        /// The kind of error, as ttrpc has them.
        code: Code,
        /// The agent's words.
        message: String,
    },
    /// No answer in time.
    #[error("the guest did not answer {call} within {} s", .deadline.as_secs())]
    Timeout {
        /// The call.
        call: &'static str,
        /// Its deadline.
        deadline: Duration,
    },
    /// The channel is gone.
    #[error("{call} has no answer, the channel to the guest is lost: {reason}")]
    Lost {
        /// The call.
        call: &'static str,
        /// Why it is gone.
        reason: Arc<str>,
    },
    /// The request is too large, or the reply is not one.
    #[error("{call} could not be sent or its reply not be read: {reason}")]
    Transport {
        /// The call.
        call: &'static str,
        /// What ttrpc says.
        reason: String,
    },
    /// A reply that an honest agent does not give.
    #[error("the guest's reply to {call} is refused: {reason}")]
    BadReply {
        /// The call.
        call: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl GuestError {
    /// The kind of error for containerd.
    pub fn code(&self) -> Code {
        match self {
            Self::Refused { code, .. } => *code,
            Self::Timeout { .. } => Code::DEADLINE_EXCEEDED,
            Self::Lost { .. } => Code::UNAVAILABLE,
            Self::Transport { .. } | Self::BadReply { .. } => Code::INTERNAL,
        }
    }

    /// Whether the guest says that it tried to execute a command and could not: nothing else is left
    /// to fail inside it at a start (other codes are about the request or the process's state).
    pub fn is_not_executed(&self) -> bool {
        matches!(self, Self::Refused { call: "start", code: Code::INTERNAL, .. })
    }

    /// Whether the guest has answered, and said no.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether the guest says that the thing is not there.
    pub fn is_not_found(&self) -> bool {
        self.code() == Code::NOT_FOUND
    }
}

/// Calls to the agent. Clones share the channel.
#[derive(Clone)]
pub struct Client {
    agent: AgentClient,
    lost: Lost,
    silent: Arc<Notify>,
    _alive: Arc<Alive>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Client").field("lost", &self.lost).finish_non_exhaustive()
    }
}

/// One method: name, request, reply, deadline and the check of the reply.
macro_rules! call {
    ($(#[$doc:meta])* $name:ident($request:ident) -> $reply:ident, $deadline:ident, $check:expr) => {
        $(#[$doc])*
        pub async fn $name(&self, request: &api::$request) -> Result<api::$reply, GuestError> {
            let call = stringify!($name);
            let answer = self.agent.$name(Context::default(), request);
            let reply = self.answer(call, deadline::$deadline, answer).await?;
            let check: fn(&api::$reply) -> Result<(), String> = $check;
            check(&reply).map_err(|reason| GuestError::BadReply { call, reason })?;
            Ok(reply)
        }
    };
    ($(#[$doc:meta])* $name:ident($request:ident), $deadline:ident) => {
        $(#[$doc])*
        pub async fn $name(&self, request: &api::$request) -> Result<(), GuestError> {
            let answer = self.agent.$name(Context::default(), request);
            self.answer(stringify!($name), deadline::$deadline, answer).await.map(drop)
        }
    };
}

impl Client {
    pub(super) fn new(
        agent: AgentClient,
        lost: Lost,
        silent: Arc<Notify>,
        alive: Arc<Alive>,
    ) -> Self {
        Self { agent, lost, silent, _alive: alive }
    }

    /// After a call without an answer: a guest that does not even say who it is will never answer
    /// again, and without this its processes would never end for containerd.
    async fn doubt(&self) {
        let mut request = api::HelloRequest::new();
        request.protocol_version = joey_protocol::limits::PROTOCOL_VERSION;
        let hello = self.agent.hello(Context::default(), &request);
        if timeout(deadline::QUICK, hello).await.is_err() {
            self.silent.notify_one();
        }
    }

    /// Asks who is there and checks that it speaks this version. `wait`: a clone answers within
    /// [`deadline::HELLO`], a cold boot within [`deadline::HELLO_COLD`].
    pub async fn hello(&self, wait: Duration) -> Result<api::HelloResponse, GuestError> {
        let call = "hello";
        let mut request = api::HelloRequest::new();
        request.protocol_version = joey_protocol::limits::PROTOCOL_VERSION;
        let answer = self.agent.hello(Context::default(), &request);
        let reply = self.answer(call, wait, answer).await?;
        checks::hello(&reply).map_err(|reason| GuestError::BadReply { call, reason })?;
        Ok(reply)
    }

    /// Moves the guest's clock by so many nanoseconds; what it is then. Nobody waits for it, so that a guest
    /// that does not answer in time is not doubted for that.
    pub async fn adjust_clock(&self, nanoseconds: i64) -> Result<i64, GuestError> {
        let (call, deadline) = ("adjust_clock", deadline::QUICK);
        let mut request = api::AdjustClockRequest::new();
        request.adjust_ns = nanoseconds;
        let answer = self.agent.adjust_clock(Context::default(), &request);
        match timeout(deadline, answer).await {
            Ok(Ok(reply)) => Ok(reply.wall_clock_ns),
            Ok(Err(error)) => {
                Err(GuestError::Transport { call, reason: checks::error_text(&error.to_string()) })
            }
            Err(_) => Err(GuestError::Timeout { call, deadline }),
        }
    }

    /// Reads a file of a volume back.
    pub async fn read_file(&self, request: &api::ReadFileRequest) -> Result<Vec<u8>, GuestError> {
        let call = "read_file";
        let answer = self.agent.read_file(Context::default(), request);
        let reply = self.answer(call, deadline::COPY, answer).await?;
        checks::file(&reply, request.limit)
            .map_err(|reason| GuestError::BadReply { call, reason })?;
        Ok(reply.data)
    }

    call! {
        /// Turns the guest into this sandbox.
        start_sandbox(StartSandboxRequest) -> StartSandboxResponse, START_SANDBOX,
        checks::start_sandbox
    }
    call! {
        /// Turns the guest into a sandbox and back into nobody's.
        rehearse_sandbox(StartSandboxRequest) -> StartSandboxResponse, START_SANDBOX,
        checks::start_sandbox
    }
    call! {
        /// Makes a disk the pod's own.
        open_disk(OpenDiskRequest) -> OpenDiskResponse, OPEN_DISK, checks::opened
    }
    call! {
        /// Goes through [`Self::open_disk`] and back, in a machine that is to be multiplied.
        rehearse_disk(OpenDiskRequest), OPEN_DISK
    }
    call! {
        /// Puts files into a volume.
        copy_in(CopyInRequest), COPY
    }
    call! {
        /// Changes the table of services.
        update_services(UpdateServicesRequest), SERVICES
    }
    call! {
        /// Mounts files that the host serves.
        share_files(ShareFilesRequest), SHARE
    }
    call! {
        /// Mounts the file system on a disk.
        mount_volume(MountVolumeRequest), MOUNT_VOLUME
    }
    call! {
        /// Writes out and unmounts it.
        unmount_volume(UnmountVolumeRequest), UNMOUNT_VOLUME
    }
    call! {
        /// Connects to a port of the pod's localhost.
        forward(ForwardRequest), FORWARD
    }
    call! {
        /// Creates a container up to its first instruction.
        create_container(CreateContainerRequest) -> CreateContainerResponse, CREATE, checks::created
    }
    call! {
        /// Creates a further process of a container.
        create_exec(CreateExecRequest), CREATE
    }
    call! {
        /// Runs a created process.
        start(ProcessRequest) -> StartResponse, START, checks::started
    }
    call! {
        /// Sends a signal.
        signal(SignalRequest), QUICK
    }
    call! {
        /// Sets the size of a terminal.
        resize_pty(ResizePtyRequest), QUICK
    }
    call! {
        /// Frees a process or a container.
        delete(ProcessRequest), DELETE
    }
    call! {
        /// Changes the limits of a container.
        update(UpdateRequest), QUICK
    }
    call! {
        /// Freezes a container.
        pause(ContainerRequest), FREEZE
    }
    call! {
        /// Thaws a container.
        resume(ContainerRequest), FREEZE
    }
    call! {
        /// Reads a container's counters.
        stats(ContainerRequest) -> StatsResponse, QUICK, checks::stats
    }
    call! {
        /// Lists a container's processes.
        processes(ContainerRequest) -> ProcessesResponse, QUICK, checks::processes
    }

    async fn answer<T>(
        &self,
        call: &'static str,
        deadline: Duration,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, GuestError> {
        let mut lost = self.lost.clone();
        let answered = tokio::select! {
            biased;
            answered = timeout(deadline, answer) => answered,
            reason = lost.wait() => return Err(GuestError::Lost { call, reason }),
        };
        let error = match answered {
            Ok(Ok(reply)) => return Ok(reply),
            Ok(Err(ttrpc::Error::RpcStatus(status))) => {
                let code = status.code.enum_value_or(Code::UNKNOWN);
                let message = checks::error_text(&status.message);
                return Err(GuestError::Refused { call, code, message });
            }
            Ok(Err(error)) => error,
            Err(_) => {
                let client = self.clone();
                tokio::spawn(async move { client.doubt().await });
                return Err(GuestError::Timeout { call, deadline });
            }
        };
        if let Some(reason) = lost.reason() {
            return Err(GuestError::Lost { call, reason });
        }
        // ttrpc may notice the end before the channel's task has said why.
        let closed = matches!(
            error,
            ttrpc::Error::Socket(_) | ttrpc::Error::LocalClosed | ttrpc::Error::RemoteClosed
        );
        if closed && let Ok(reason) = timeout(REASON, lost.wait()).await {
            return Err(GuestError::Lost { call, reason });
        }
        Err(GuestError::Transport { call, reason: checks::error_text(&error.to_string()) })
    }
}

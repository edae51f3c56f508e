//! Sizes and deadlines that both sides hold to.
//!
//! A size here bounds what a hostile peer can make the other side store; a deadline bounds how long
//! the host waits for a guest that does not answer.

use std::time::Duration;

/// Version of everything in this crate. Raised with any change that the other side can notice.
pub const PROTOCOL_VERSION: u32 = 6;

/// Length of `StartSandboxRequest.entropy`: fills the kernel's pool (512 bits).
pub const ENTROPY_BYTES: usize = 64;
/// Length of `StartSandboxRequest.machine_id`.
pub const MACHINE_ID_BYTES: usize = 16;
/// Length of `StartSandboxResponse.random`.
pub const RANDOM_BYTES: usize = 16;

/// Disks that the machine has: /dev/vda is slot 0.
pub const DISK_SLOTS: u32 = 16;
/// The slot of the pod's writable disk.
pub const POD_DISK: u32 = DISK_SLOTS - 1;
/// The largest that disk can be, and what a slot says of its size while it is empty.
pub const MAX_POD_DISK: u64 = 256 << 30;

/// Channel stream of the calls (ttrpc).
pub const STREAM_RPC: u32 = 0;
/// Channel stream of the events, guest to host.
pub const STREAM_EVENTS: u32 = 1;
/// First channel stream for stdio.
pub const STREAM_FIRST_STDIO: u32 = 16;
/// Streams that may be open at once on one channel.
pub const MAX_STREAMS: usize = 2048;

/// Largest payload of one frame of the multiplexer.
pub const MAX_FRAME: usize = 64 * 1024;
/// Bytes that may be under way on one stream, one direction, before the reader takes any.
pub const FIRST_WINDOW: u32 = 64 * 1024;
/// What that may grow to for a reader that keeps up.
pub const MAX_WINDOW: u32 = 1024 * 1024;
/// What all windows together may grow by beyond their first size.
pub const WINDOW_POOL: u32 = 8 * 1024 * 1024;
/// Bytes that wait on one stream to be sent.
pub const SEND_QUEUE: usize = 256 * 1024;

/// Largest ttrpc message (ttrpc's own bound).
pub const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// Most file content in one `CopyIn` message; larger files come in pieces.
pub const MAX_COPY_IN_CHUNK: usize = 1024 * 1024;
/// Most that `ReadFile` returns.
pub const MAX_READ_FILE: usize = 64 * 1024;
/// Largest event, encoded.
pub const MAX_EVENT: usize = 4096;
/// Connections in one event: so many fit, with the longest names.
pub const MAX_CONNECTIONS: usize = 12;
/// Longest name of a command: the kernel's.
pub const MAX_COMMAND: usize = 16;
/// Largest OCI specification as JSON.
pub const MAX_SPEC: usize = 3 * 1024 * 1024;
/// Process ids in one `Processes` reply that the host looks at.
pub const MAX_PROCESSES: usize = 65_536;
/// Phases in one reply that the host looks at.
pub const MAX_PHASES: usize = 64;
/// Longest error text from the guest that the host passes on.
pub const MAX_ERROR_TEXT: usize = 4096;
/// Longest short string (version, kernel release, phase name) in a reply.
pub const MAX_SHORT_TEXT: usize = 256;

/// How long the host waits for the answer to each call. Software emulation on a busy node is slow:
/// these are bounds for a guest that hangs, not expectations.
pub mod deadline {
    use super::Duration;

    /// `Hello` of a cloned guest.
    pub const HELLO: Duration = Duration::from_secs(20);
    /// `Hello` of a guest that boots.
    pub const HELLO_COLD: Duration = Duration::from_secs(120);
    /// `StartSandbox`.
    pub const START_SANDBOX: Duration = Duration::from_secs(30);
    /// `OpenDisk`.
    pub const OPEN_DISK: Duration = Duration::from_secs(30);
    /// `ShareFiles`.
    pub const SHARE: Duration = Duration::from_secs(30);
    /// `Forward`.
    pub const FORWARD: Duration = Duration::from_secs(20);
    /// How long the agent itself tries to connect then, by each family.
    pub const FORWARD_CONNECT: Duration = Duration::from_secs(5);
    /// `CopyIn` and `ReadFile`, each message.
    pub const COPY: Duration = Duration::from_secs(30);
    /// `UpdateServices`, each message.
    pub const SERVICES: Duration = Duration::from_secs(20);
    /// `MountVolume`: replays a journal, and gives the files to the pod's group.
    pub const MOUNT_VOLUME: Duration = Duration::from_secs(100);
    /// `UnmountVolume`: writes out what there is.
    pub const UNMOUNT_VOLUME: Duration = Duration::from_secs(100);
    /// `CreateContainer` and `CreateExec`: mounts disks.
    pub const CREATE: Duration = Duration::from_secs(50);
    /// `Start`.
    pub const START: Duration = Duration::from_secs(30);
    /// `Delete`: ends what is left of a container.
    pub const DELETE: Duration = Duration::from_secs(30);
    /// Everything else: no waiting in the guest.
    pub const QUICK: Duration = Duration::from_secs(10);
    /// `Pause` and `Resume`: the kernel may have to wait for a system call to end.
    pub const FREEZE: Duration = Duration::from_secs(20);
    /// How long the agent itself waits for a container to be frozen before it takes that back.
    pub const FROZEN: Duration = Duration::from_secs(15);
}

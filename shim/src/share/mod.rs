//! Files and directories of the host that a container sees live: hostPath, and volumes that a CSI driver or
//! the kubelet has mounted on the host.
//!
//! ```text
//!   guest: container ── FUSE in the guest's kernel ── agent ═ stream of the channel ═ shim ── server
//! ```
//!
//! The guest's kernel asks by FUSE's messages (`linux/fuse.h`), one stream for each share. They are answered
//! by a process of its own ([`server`]), which the kernel confines to what is shared; the shim only carries
//! them. A share lives as long as the sandbox.

mod calls;
mod server;

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use joey_protocol::api;
use joey_protocol::mux::{MuxStream, OpenError};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::timeout;

pub use self::server::{ACTION, serve};
use crate::guest::GuestError;
use crate::sandbox::Guest;
use crate::sandbox::plan::{Shared, Volume};

/// Longest message: what the guest may write at once and its header, as the server tells the guest's kernel.
const MESSAGE: usize = (1 << 20) + 4096;
/// Shortest: a header.
const HEADER: usize = 40;
/// What the server says when it can be asked.
const READY: &[u8] = b"ready";
/// How long it may take until then.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why files are not shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// No server.
    #[error("mount {destination}: share {path}: {reason}")]
    Server {
        /// The mount.
        destination: PathBuf,
        /// What was to be shared.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// The channel is full or gone.
    #[error("mount {destination}: {source}")]
    Stream {
        /// The mount.
        destination: PathBuf,
        /// Why.
        source: OpenError,
    },
    /// The guest does not mount it.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// The shares of a sandbox, by their volumes' names.
#[derive(Debug, Default)]
pub(crate) struct Shares(Mutex<HashSet<String>>);

impl Shares {
    /// Shares this with the guest, if it is not shared yet.
    pub(crate) async fn open(
        &self,
        guest: &Guest,
        volume: &Volume,
        shared: &Shared,
    ) -> Result<(), ShareError> {
        let mut known = self.0.lock().await;
        if known.contains(&volume.id) {
            return Ok(());
        }
        let failed = |reason: String| ShareError::Server {
            destination: volume.destination.clone(),
            path: shared.path.clone(),
            reason,
        };
        let (server, socket) = start(shared).await.map_err(failed)?;
        let stream = guest.streams.open().map_err(|source| {
            let destination = volume.destination.clone();
            ShareError::Stream { destination, source }
        })?;
        let request = api::ShareFilesRequest {
            volume_id: volume.id.clone(),
            stream: stream.id(),
            ..Default::default()
        };
        let path = shared.path.clone();
        let carrier = tokio::spawn(async move {
            let ended = carry(stream, socket).await;
            // With the socket closed it ends by itself.
            let status = end(server).await;
            if let Err(error) = ended {
                let path = path.display();
                tracing::warn!(%path, %error, status, "files are not shared with the pod any more");
            }
        });
        if let Err(error) = guest.client.share_files(&request).await {
            // Takes the server with it.
            carrier.abort();
            return Err(error.into());
        }
        known.insert(volume.id.clone());
        Ok(())
    }
}

/// Starts the server and waits until it is confined and ready.
async fn start(shared: &Shared) -> Result<(Child, AsyncFd<OwnedFd>), String> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (mine, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .map_err(|error| format!("make a socket: {error}"))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(ACTION).arg(&shared.path).args(shared.words());
    command.env_clear().stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null());
    let server = command.kill_on_drop(true).spawn();
    let server = server.map_err(|error| format!("start its server: {error}"))?;
    // The command holds the server's end, which would hide its death.
    drop(command);
    let socket = packets(mine).map_err(|error| format!("wait for its server: {error}"))?;
    let mut said = vec![0; 4096];
    match timeout(PATIENCE, receive(&socket, &mut said)).await {
        Ok(Ok(length)) if said.get(..length) == Some(READY) => Ok((server, socket)),
        Ok(Ok(0)) => Err("its server ended at once".to_owned()),
        Ok(Ok(length)) => {
            Err(String::from_utf8_lossy(said.get(..length).unwrap_or_default()).into_owned())
        }
        Ok(Err(error)) => Err(format!("wait for its server: {error}")),
        Err(_) => Err(format!("its server is not ready after {PATIENCE:?}")),
    }
}

fn packets(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(flags))?;
    #[allow(deprecated, reason = "an OwnedFd is what the new one asks for, unsafely")]
    AsyncFd::new(socket)
}

/// The next message; 0 at the end.
async fn receive(socket: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = socket.readable().await?;
        let one = ready.try_io(|fd| Ok(recv(fd.as_raw_fd(), buffer, MsgFlags::empty())?));
        if let Ok(done) = one {
            return done;
        }
    }
}

async fn deliver(socket: &AsyncFd<OwnedFd>, message: &[u8]) -> io::Result<()> {
    loop {
        let mut ready = socket.writable().await?;
        let flags = MsgFlags::MSG_NOSIGNAL;
        let one = ready.try_io(|fd| Ok(send(fd.as_fd().as_raw_fd(), message, flags)?));
        if let Ok(done) = one {
            return done.map(drop);
        }
    }
}

/// Carries messages both ways until the guest is gone (fine), or the server (an error).
async fn carry(stream: MuxStream, socket: AsyncFd<OwnedFd>) -> io::Result<()> {
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let questions = async {
        let mut message = Vec::new();
        // The guest's end, its orderly one or not, is the sandbox's matter.
        while let Ok(length) = from_guest.read_u32_le().await {
            let size = length as usize;
            if !(HEADER..=MESSAGE).contains(&size) {
                let what = format!("the guest sent a FUSE message of {size} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            message.clear();
            message.extend_from_slice(&length.to_le_bytes());
            message.resize(size, 0);
            let rest = message.get_mut(size_of::<u32>()..).unwrap_or_default();
            if from_guest.read_exact(rest).await.is_err() {
                break;
            }
            deliver(&socket, &message).await?;
        }
        Ok(())
    };
    let answers = async {
        let mut message = vec![0; MESSAGE];
        loop {
            let length = receive(&socket, &mut message).await?;
            if length == 0 {
                return Err(io::Error::new(io::ErrorKind::BrokenPipe, "its server has ended"));
            }
            if to_guest.write_all(message.get(..length).unwrap_or_default()).await.is_err() {
                return Ok(());
            }
        }
    };
    tokio::select! {
        ended = questions => ended,
        ended = answers => ended,
    }
}

/// Waits for the server's end, which its socket's end makes, or makes it.
async fn end(mut server: Child) -> String {
    let status = match timeout(PATIENCE, server.wait()).await {
        Ok(status) => status,
        Err(_) => {
            let _ = server.start_kill();
            server.wait().await
        }
    };
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}

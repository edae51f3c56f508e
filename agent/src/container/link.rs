//! What the agent and a forked child say to each other before `execve`.
//!
//! One `SOCK_SEQPACKET` pair per process. A spare first waits for its order, which lies in a
//! memory file that both have. The child sends one message: ready (with how long its
//! steps took, and the terminal as `SCM_RIGHTS`) or failed (a kind and a text). The agent answers
//! "go"; then either `execve` closes the child's end, or the child says why it failed. A child
//! that dies says nothing and closes its end, too, which `wait` tells from success.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv,
    recvmsg, send, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Error;

const READY: u8 = 0;
const FAILED: u8 = 1;
const ORDER: u8 = 2;
/// Longest message; a longer error text is cut.
const MESSAGE_MAX: usize = 4096;

/// What sort of failure an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// The request contradicts itself or the state of the container.
    Invalid = 0,
    /// A VM pod cannot do what was asked.
    Unsupported = 1,
    /// The container's first process has ended.
    NotRunning = 2,
    /// Something went wrong on the way.
    Failed = 3,
}

impl Kind {
    /// The kind with this number.
    pub(crate) fn from_byte(byte: u8) -> Kind {
        match byte {
            0 => Kind::Invalid,
            1 => Kind::Unsupported,
            2 => Kind::NotRunning,
            _ => Kind::Failed,
        }
    }
}

/// The agent's end.
#[derive(Debug)]
pub(crate) struct Link {
    socket: AsyncFd<OwnedFd>,
}

/// What a child that is ready has told.
#[derive(Debug)]
pub(crate) struct Ready {
    /// How long its steps took, in the order of the child's code.
    pub(crate) steps: Vec<Duration>,
    /// The terminal's end to read and write.
    pub(crate) terminal: Option<OwnedFd>,
}

/// The child's end.
#[derive(Debug)]
pub(crate) struct ChildLink {
    socket: OwnedFd,
}

/// A new pair: the agent's end and, as a bare descriptor, the child's.
pub(crate) fn pair() -> Result<(Link, OwnedFd), Error> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let make = || -> io::Result<(Link, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let socket = crate::sys::register(ours, Interest::READABLE)?;
        Ok((Link { socket }, theirs))
    };
    make().map_err(|error| Error::failed(format!("making a socket pair for a process: {error}")))
}

/// One received message; empty when the other end is closed.
fn receive(socket: RawFd) -> nix::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut buffer = vec![0u8; MESSAGE_MAX];
    let mut control = nix::cmsg_space!(RawFd);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket, &mut slices, Some(&mut control), flags)?;
    let mut received = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            received.extend(fds.into_iter().map(super::sys::adopt));
        }
    }
    let length = message.bytes;
    buffer.truncate(length);
    Ok((buffer, received))
}

fn send_with(socket: RawFd, message: &[u8], fds: &[RawFd]) -> nix::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let slices = [IoSlice::new(message)];
    sendmsg::<()>(socket, &slices, control, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

fn failure(body: &[u8]) -> Error {
    let (kind, text) = body.split_first().unwrap_or((&u8::MAX, b"no reason given"));
    Error::new(Kind::from_byte(*kind), String::from_utf8_lossy(text))
}

impl Link {
    /// Tells a spare that its order is there, `bytes` long.
    pub(crate) fn order(&self, bytes: usize) -> Result<(), Error> {
        let mut message = vec![ORDER];
        message.extend_from_slice(&(bytes as u64).to_le_bytes());
        send(self.socket.get_ref().as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL)
            .map(drop)
            .map_err(|error| Error::failed(format!("giving a process its order: {error}")))
    }

    async fn receive(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), Error> {
        let result = self
            .socket
            .async_io(Interest::READABLE, |fd| receive(fd.as_raw_fd()).map_err(io::Error::from));
        match result.await {
            // A child that died with our message unread.
            Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => {
                Ok((Vec::new(), Vec::new()))
            }
            result => result
                .map_err(|error| Error::failed(format!("hearing from a new process: {error}"))),
        }
    }

    /// Waits until the child is ready, or says why not.
    pub(crate) async fn ready(&self) -> Result<Ready, Error> {
        let (message, mut fds) = self.receive().await?;
        match message.split_first() {
            Some((&READY, times)) => {
                let steps = times
                    .chunks_exact(8)
                    .filter_map(|bytes| bytes.try_into().ok())
                    .map(|bytes| Duration::from_nanos(u64::from_le_bytes(bytes)))
                    .collect();
                Ok(Ready { steps, terminal: fds.pop() })
            }
            Some((_, body)) => Err(failure(body)),
            None => Err(Error::failed(
                "the process ended before it was ready; was it out of memory? \
                 See the guest's console",
            )),
        }
    }

    /// Lets a ready child exec; returns when it has, or with the reason why it could not.
    pub(crate) async fn go(self) -> Result<(), Error> {
        let sent = send(self.socket.get_ref().as_raw_fd(), &[READY], MsgFlags::MSG_NOSIGNAL);
        if sent.is_err() {
            return Err(Error::new(Kind::NotRunning, "the process has ended before its start"));
        }
        let (message, _) = self.receive().await?;
        match message.split_first() {
            None => Ok(()),
            Some((_, body)) => Err(failure(body)),
        }
    }
}

impl ChildLink {
    /// Takes over the child's end at descriptor `fd`, which from now on sleeps where it waits.
    pub(crate) fn adopt(fd: RawFd) -> io::Result<ChildLink> {
        let socket = super::sys::adopt(fd);
        nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))?;
        Ok(ChildLink { socket })
    }

    fn send(&self, message: &[u8], terminal: Option<RawFd>) -> nix::Result<()> {
        send_with(self.socket.as_raw_fd(), message, terminal.as_slice())
    }

    /// Sleeps until the order is there, and gives its length; nothing when the agent has given up.
    pub(crate) fn wait_for_order(&self) -> Option<usize> {
        let mut message = [0; 9];
        let length = self.sleep(&mut message)?;
        let (kind, bytes) = message[..length].split_first()?;
        let bytes = u64::from_le_bytes(bytes.try_into().ok()?);
        if *kind == ORDER { usize::try_from(bytes).ok() } else { None }
    }

    /// Waits for a message; nothing when the other end is closed.
    fn sleep(&self, message: &mut [u8]) -> Option<usize> {
        loop {
            match recv(self.socket.as_raw_fd(), message, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                Ok(length) if length > 0 => return Some(length),
                _ => return None,
            }
        }
    }

    /// Says "ready" and waits for "go"; gives false when the agent has given up.
    pub(crate) fn ready_then_go(&self, steps: &[Duration], terminal: Option<OwnedFd>) -> bool {
        let mut message = vec![READY];
        for step in steps {
            message.extend_from_slice(&(step.as_nanos() as u64).to_le_bytes());
        }
        if self.send(&message, terminal.as_ref().map(AsRawFd::as_raw_fd)).is_err() {
            return false;
        }
        drop(terminal);
        self.sleep(&mut [0]).is_some()
    }

    /// Says why the child gives up.
    pub(crate) fn fail(&self, error: &Error) {
        let text = error.to_string();
        let mut message = vec![FAILED, error.kind as u8];
        message.extend_from_slice(&text.as_bytes()[..text.len().min(MESSAGE_MAX - 2)]);
        // Nobody is left to tell if the agent has closed its end.
        let _ = self.send(&message, None);
    }
}

//! How `start` turns a waiting keeper into a sandbox's shim.
//!
//! ```text
//!   start                         keeper
//!     terms, one line ──────────▶   takes the sandbox's id
//!     ◀────────────────────── yes
//!     go + listening socket ────▶   serves
//! ```
//!
//! Only after `go` does the keeper serve, and `start` sends it only after `yes`: whatever breaks in
//! between, there is one shim or none, never two.

use std::io::{self, BufRead as _, BufReader, IoSlice, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, RecvMsg, UnixAddr, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use super::{class, folder};
use crate::bootstrap::Invocation;
use crate::config::Config;
use crate::sandbox::Wanted;
use crate::sizing;

/// How long either side waits for the other's next word. A keeper only writes a small file.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest line of terms.
const MAX_TERMS: u64 = 64 * 1024;
const YES: u8 = b'y';
const GO: u8 = b'g';

/// What a keeper is told of the sandbox; the rest is in the bundle.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Terms {
    pub(crate) id: String,
    pub(crate) namespace: String,
    pub(crate) address: String,
    pub(crate) publish_binary: String,
    pub(crate) bundle: PathBuf,
    /// Where containerd will call.
    pub(crate) socket: PathBuf,
    pub(crate) ttrpc_address: String,
    pub(crate) debug: bool,
    /// Time since the host's boot at which containerd started the shim.
    pub(crate) since_boot: Duration,
}

/// A keeper that has said yes.
pub(crate) struct Claim(UnixStream);

impl Claim {
    /// Finds a keeper for the sandbox. None is the usual case, and no error. A keeper that does not
    /// answer in time may have taken the sandbox's name all the same, or take it at any moment: whoever
    /// goes on without it must take the name first (`bootstrap::take_name`).
    pub(crate) fn find(config: &Config, invocation: &Invocation) -> Option<Self> {
        if config.standby == 0 {
            return None;
        }
        // Where containerd tells of the sandbox later, it most likely asks for nothing special.
        let wanted = invocation.spec.as_ref().map(Wanted::of_spec).unwrap_or_default();
        let sizing = sizing::size(config, &wanted.annotations).ok()?;
        let folder = folder(config, &class(config, sizing).ok()?);
        let terms = serde_json::to_string(&invocation.terms()).ok()?;
        std::fs::read_dir(folder).ok()?.flatten().find_map(|entry| {
            let mut keeper = UnixStream::connect(entry.path()).ok()?;
            keeper.set_read_timeout(Some(PATIENCE)).ok()?;
            keeper.write_all(format!("{terms}\n").as_bytes()).ok()?;
            let mut word = [0];
            keeper.read_exact(&mut word).ok()?;
            (word == [YES]).then_some(Self(keeper))
        })
    }

    /// Makes the keeper the sandbox's shim.
    ///
    /// # Errors
    /// The keeper has gone: there is no shim yet.
    pub(crate) fn hand_over(self, listener: &UnixListener) -> io::Result<()> {
        let listener = [listener.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&listener)];
        let go = [IoSlice::new(&[GO])];
        sendmsg::<()>(self.0.as_raw_fd(), &go, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }
}

/// The keeper's side: `take` makes the sandbox's id its own, before `start` may rely on it. `None` if
/// the claim comes to nothing.
pub(super) fn answer(
    stream: UnixStream,
    take: impl FnOnce(&Terms) -> anyhow::Result<()>,
) -> anyhow::Result<Option<(Terms, UnixListener)>> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new((&stream).take(MAX_TERMS)).read_line(&mut line)?;
    if line.is_empty() {
        // Somebody looked whether there is a keeper.
        return Ok(None);
    }
    let terms: Terms = serde_json::from_str(&line)?;
    take(&terms)?;
    (&stream).write_all(&[YES])?;
    match receive(&stream)? {
        Some(listener) => Ok(Some((terms, UnixListener::from(listener)))),
        None => anyhow::bail!("`start` of sandbox {} went away", terms.id),
    }
}

/// The descriptor that comes with `go`; `None` at the end of the stream.
fn receive(stream: &UnixStream) -> io::Result<Option<OwnedFd>> {
    use std::os::fd::FromRawFd as _;
    let mut word = [0];
    let mut parts = [IoSliceMut::new(&mut word)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message: RecvMsg<'_, '_, UnixAddr> =
        recvmsg(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut received = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            for descriptor in descriptors {
                // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
                #[allow(unsafe_code)]
                let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
                received = Some(descriptor);
            }
        }
    }
    Ok(received.filter(|_| word == [GO]))
}

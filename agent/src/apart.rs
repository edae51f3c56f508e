//! Work that may take long in one system call, done by a child so that the agent goes on answering: it has
//! one thread, and no other may come to be.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;

use crate::reap::Reaper;
use crate::sys;

/// Runs `work` in a child and gives its answer, which must fit into a pipe. What it changes of the agent's
/// memory is lost, and descriptors that were open before are closed for it.
pub(crate) async fn apart<T: Serialize + DeserializeOwned>(
    reaper: &Reaper,
    work: impl FnOnce() -> T,
) -> io::Result<T> {
    let (ours, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    sys::set_nonblocking(ours.as_fd())?;
    let pid = sys::fork(|| match child(&theirs, work) {
        Ok(()) => 0,
        Err(_) => 1,
    })?;
    let ended = reaper.forked(Pid::from_raw(pid));
    drop(theirs);
    let answer = read_all(ours).await?;
    let status = ended.wait().await.status;
    serde_json::from_slice(&answer)
        .map_err(|error| io::Error::other(format!("a child ended with status {status}: {error}")))
}

fn child<T: Serialize>(answer: &OwnedFd, work: impl FnOnce() -> T) -> io::Result<()> {
    // A handler would write to a descriptor of the agent's event loop, whatever has its number here.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    // While it runs it must keep nothing open: a container's standard input ends when the agent closes it.
    nix::unistd::dup2_stdout(answer)?;
    sys::close_all_descriptors();
    let mut answer = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    answer.write_all(&serde_json::to_vec(&work())?)
}

async fn read_all(pipe: OwnedFd) -> io::Result<Vec<u8>> {
    let pipe = sys::register(pipe, Interest::READABLE)?;
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let mut ready = pipe.readable().await?;
        match ready.try_io(|pipe| sys::read(pipe.get_ref().as_fd(), &mut buffer)) {
            Ok(Ok(0)) => return Ok(all),
            Ok(Ok(length)) => all.extend_from_slice(&buffer[..length]),
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

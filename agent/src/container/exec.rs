//! A further process in a running container: born in its cgroup and PID namespace, then in its
//! other namespaces by one `setns` on the first process's pidfd.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::Process;

use super::seccomp::Filter;
use super::spawn::{self, Child};
use super::stdio::Pipes;
use super::{AgentEnds, Container, Error, Exec, Kind, ProcessIo, init, plan, process, terminal};

fn not_running(why: &str) -> Error {
    Error::new(Kind::NotRunning, format!("cannot exec in a container that {why}"))
}

/// Prepares the process up to "ready".
pub(crate) async fn exec(
    container: &Container,
    process: &Process,
    io: ProcessIo,
) -> Result<Exec, Error> {
    plan::check_process(process)?;
    if container.frozen.load(Ordering::Relaxed) {
        return Err(not_running("is paused"));
    }
    if !container.started.load(Ordering::Relaxed) {
        return Err(not_running("has not been started"));
    }
    if has_ended(container.pidfd.as_fd()) {
        return Err(not_running("has stopped"));
    }
    let filter = container.seccomp.as_ref().map(Filter::new).transpose()?;
    let pidfd = container.pidfd.as_fd();
    let flags = CloneFlags::empty();
    let Pipes { theirs, ours } = Pipes::new(io.pipes())?;
    let body = |child| run(child, process, filter, io.terminal());
    let (pid, link) =
        spawn::spawn(flags, &container.cgroup, Some(pidfd), theirs, Some(pidfd), body)?;
    let ready = link.ready().await.map_err(|error| match has_ended(pidfd) {
        true => not_running("has stopped"),
        false => error,
    })?;
    let io = AgentEnds { pipes: ours, terminal: ready.terminal };
    Ok(Exec { pid, io, link: Mutex::new(Some(link)) })
}

/// A pidfd is readable once its process has ended.
fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut polled = [PollFd::new(pidfd, PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn run(child: Child, process: &Process, filter: Option<Filter>, size: Option<(u16, u16)>) {
    let Child { link, extra } = child;
    let prepare = || -> Result<(process::Prepared, Option<OwnedFd>), Error> {
        init::new_session()?;
        init::set_oom_score(process)?;
        let pidfd = extra.ok_or_else(|| Error::failed("the container's pidfd is missing"))?;
        let all = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP;
        setns(&pidfd, all)
            .map_err(|error| Error::failed(format!("entering the container: {error}")))?;
        drop(pidfd);
        let master = size.map(|(width, height)| terminal::open(width, height)).transpose()?;
        let root = init::open_root()?;
        Ok((process::prepare(process, root.as_fd(), filter)?, master))
    };
    init::finish(&link, prepare(), &[]);
}

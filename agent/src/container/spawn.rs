//! The agent's side of a new process: cgroup, link, descriptors, fork.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;

use super::link::{self, ChildLink, Link};
use super::plan::{PidNamespace, Plan};
use super::seccomp::Filter;
use super::spare::Spare;
use super::{AgentEnds, Cgroup, Container, CreateRequest, Error, Kind, sys};

/// Where a child finds its end of the link.
const LINK_FD: RawFd = 3;
/// First descriptor that a child closes; an extra one to keep sits here.
const EXTRA_FD: RawFd = 4;

/// Names of the child's steps, in the order of its code.
const STEPS: [&str; 3] = ["container-rootfs", "container-mounts", "container-process"];

/// What a child starts with.
pub(crate) struct Child {
    pub(crate) link: ChildLink,
    /// The descriptor that the parent handed along.
    pub(crate) extra: Option<OwnedFd>,
}

/// Builds a container up to "ready".
pub(crate) async fn create(request: CreateRequest<'_>) -> Result<Container, Error> {
    let begun = Instant::now();
    let plan = Plan::new(request.spec)?;
    let seccomp = plan.linux.seccomp().clone();
    // Translated here only to refuse a bad profile before anything exists.
    seccomp.as_ref().map(Filter::new).transpose()?;
    let limits = plan.linux.resources().clone().unwrap_or_default_limits();
    let spare = match (plan.pid, request.shared_pid) {
        (PidNamespace::Own, _) => request.spares.take(),
        (PidNamespace::Pod, Some(_)) => None,
        (PidNamespace::Pod, None) => {
            let text = "the specification shares the pod's PID namespace, which this pod lacks";
            return Err(Error::new(Kind::Invalid, text));
        }
    };
    let shared_pid = request.shared_pid.filter(|_| plan.pid == PidNamespace::Pod);
    let spare = spare.map_or_else(
        || {
            let shared_pid = shared_pid.map(AsFd::as_fd);
            Spare::fork(request.cgroup_root, request.id, request.spares.sources(), shared_pid)
        },
        Ok,
    )?;
    let ordered = spare
        .cgroup
        .apply(&limits)
        .and_then(|()| spare.order(request.json, &request.rootfs, request.io));
    let before = begun.elapsed();
    let Spare { pid, pidfd, link, cgroup, mut pipes, .. } = spare;
    for (pipe, wanted) in pipes.iter_mut().zip(request.io.pipes()) {
        pipe.take_if(|_| !wanted);
    }
    let waited = match ordered {
        Ok(()) => link.ready().await,
        Err(error) => Err(error),
    };
    let waited = waited.and_then(|done| cgroup.restrict_devices(&limits).map(|()| done));
    let ready = match waited {
        Ok(done) => done,
        Err(error) => {
            // The child that failed is on its way out; the error is what the host is to hear.
            let _ = cgroup.destroy().await;
            return Err(error);
        }
    };
    let mut phases = vec![("container-order", before)];
    phases.extend(STEPS.into_iter().zip(ready.steps));
    Ok(Container {
        pid,
        io: AgentEnds { pipes, terminal: ready.terminal },
        phases,
        link: Mutex::new(Some(link)),
        cgroup,
        pidfd,
        seccomp,
        started: AtomicBool::new(false),
        frozen: AtomicBool::new(false),
    })
}

/// `LinuxResources::default()` allows everything on devices; an absent section allows the usual.
trait UnwrapOrEmpty<T> {
    fn unwrap_or_default_limits(self) -> T;
}

impl UnwrapOrEmpty<oci_spec::runtime::LinuxResources>
    for Option<oci_spec::runtime::LinuxResources>
{
    fn unwrap_or_default_limits(self) -> oci_spec::runtime::LinuxResources {
        self.unwrap_or_else(|| {
            let mut limits = oci_spec::runtime::LinuxResources::default();
            limits.set_devices(None);
            limits
        })
    }
}

/// A descriptor of a child that nobody can have reaped yet.
pub(crate) fn open_pidfd(pid: i32) -> Result<OwnedFd, Error> {
    sys::pidfd_open(pid).map_err(|error| Error::failed(format!("pidfd of {pid}: {error}")))
}

/// Forks a child into the cgroup and runs `body` in it; gives its pid and the agent's link.
///
/// `extra` survives in the child. `body` gets the link and must not return.
pub(crate) fn spawn(
    flags: CloneFlags,
    cgroup: &Cgroup,
    pid_namespace: Option<BorrowedFd<'_>>,
    stdio: [OwnedFd; 3],
    extra: Option<BorrowedFd<'_>>,
    body: impl FnOnce(Child),
) -> Result<(i32, Link), Error> {
    let (link, theirs) = link::pair()?;
    let failed = |what: &str, error: io::Error| Error::failed(format!("{what}: {error}"));
    let born_in = PidNamespaceGuard::enter(pid_namespace)
        .map_err(|error| failed("entering the PID namespace", error))?;
    let forked = sys::fork(flags.bits(), Some(cgroup.fd()));
    if let Ok(None) = forked {
        match arrange(&stdio, theirs.as_raw_fd(), extra) {
            Ok(child) => body(child),
            Err(_) => sys::exit_now(1),
        }
        sys::exit_now(1);
    }
    drop(stdio);
    born_in.leave().map_err(|error| failed("leaving the PID namespace", error))?;
    match forked {
        Ok(Some(pid)) => Ok((pid, link)),
        Ok(None) => sys::exit_now(1),
        Err(error) => Err(failed("forking a process", error)),
    }
}

/// While it lives, children are born in another PID namespace.
struct PidNamespaceGuard {
    own: Option<OwnedFd>,
}

impl PidNamespaceGuard {
    fn enter(other: Option<BorrowedFd<'_>>) -> io::Result<PidNamespaceGuard> {
        let Some(other) = other else {
            return Ok(PidNamespaceGuard { own: None });
        };
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let own = open("/proc/self/ns/pid", flags, Mode::empty())?;
        setns(other, CloneFlags::CLONE_NEWPID)?;
        Ok(PidNamespaceGuard { own: Some(own) })
    }

    fn leave(self) -> io::Result<()> {
        match self.own {
            Some(own) => Ok(setns(own, CloneFlags::CLONE_NEWPID)?),
            None => Ok(()),
        }
    }
}

/// In the child: stdio at 0 to 2, the link at 3, the extra descriptor at 4, nothing else.
fn arrange(stdio: &[OwnedFd; 3], link: RawFd, extra: Option<BorrowedFd<'_>>) -> io::Result<Child> {
    // First out of the way of the places to fill: a target may be another's source.
    let above = |fd: BorrowedFd<'_>| -> io::Result<RawFd> {
        Ok(fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(EXTRA_FD + 1))?)
    };
    let [stdin, stdout, stderr] = stdio;
    let stdio = [above(stdin.as_fd())?, above(stdout.as_fd())?, above(stderr.as_fd())?];
    let link = above(sys::borrow(link).as_fd())?;
    let extra = extra.map(above).transpose()?;
    for (target, fd) in stdio.into_iter().chain([link]).enumerate() {
        sys::duplicate_to(fd, target as RawFd)?;
    }
    let first_closed = match extra {
        Some(fd) => {
            sys::duplicate_to(fd, EXTRA_FD)?;
            EXTRA_FD + 1
        }
        None => EXTRA_FD,
    };
    sys::close_from(first_closed)?;
    sys::close_on_exec_from(LINK_FD)?;
    sys::reset_signals();
    Ok(Child { link: ChildLink::adopt(LINK_FD)?, extra: extra.map(|_| sys::adopt(EXTRA_FD)) })
}

/// Measures the child's steps.
pub(crate) struct Steps {
    last: Instant,
    pub(crate) taken: Vec<Duration>,
}

impl Steps {
    pub(crate) fn begin() -> Steps {
        Steps { last: Instant::now(), taken: Vec::with_capacity(STEPS.len()) }
    }

    pub(crate) fn done(&mut self) {
        let now = Instant::now();
        self.taken.push(now - self.last);
        self.last = now;
    }
}

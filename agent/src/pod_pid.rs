//! The pod's shared pid namespace: made when a container first asks for it, kept to the end.
//!
//! Its init is a child of the agent that only reaps. It is a fork of the agent, so it costs the few
//! pages that it touches; with the sandbox it goes.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::reap::{Child, Reaper};
use crate::sys;

/// The namespace and its init.
#[derive(Debug)]
pub(crate) struct PodPidNamespace {
    namespace: OwnedFd,
    init: Child,
}

impl PodPidNamespace {
    /// Makes the namespace.
    pub(crate) fn new(reaper: &Reaper) -> io::Result<Self> {
        let pid = Pid::from_raw(sys::fork_pid_namespace(reap_forever)?);
        let init = reaper.forked(pid);
        let namespace = File::open(format!("/proc/{pid}/ns/pid"))?.into();
        Ok(Self { namespace, init })
    }

    /// The namespace's descriptor, unless its init was killed, and every process in it with it.
    pub(crate) fn descriptor(&self) -> Option<io::Result<OwnedFd>> {
        self.init.exited().is_none().then(|| self.namespace.try_clone())
    }
}

fn reap_forever() -> i32 {
    let mut wanted = SigSet::empty();
    wanted.add(Signal::SIGCHLD);
    if sigprocmask(SigmaskHow::SIG_BLOCK, Some(&wanted), None).is_err() {
        return 1;
    }
    // A memory kill of this process would take every process of the pod with it.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = nix::sys::prctl::set_name(c"joey-pod-init");
    sys::close_all_descriptors();
    loop {
        while matches!(waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)),
            Ok(status) if status.pid().is_some())
        {}
        if wanted.wait().is_err() {
            return 1;
        }
    }
}

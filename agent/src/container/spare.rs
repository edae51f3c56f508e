//! A container's first process, forked before there is a container: the agent makes spares for the
//! template, so that a clone finds them ready.
//!
//! A spare has its cgroup, its namespaces and, detached, the file systems that nearly every container
//! mounts. It sleeps until its order comes: the specification and the root. A container
//! for which no spare is left gets one forked at once; there is no other way to make a container.

use std::fmt::Display;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use super::link::Link;
use super::mounts::Usual;
use super::spawn::{self, Child};
use super::stdio::{self, Pipes, ProcessIo};
use super::{Cgroup, Error, init};

/// Opens what a mount's source means; may ask for the directory at the mount's destination in the root.
pub(crate) type BindSource =
    fn(&Path, &dyn Fn() -> Result<OwnedFd, String>) -> Result<OwnedFd, String>;

/// Where what containers mount comes from. All of it runs in a container's first process, in its own
/// mount namespace, with which every mount goes away.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sources {
    /// Mounts the root that the text describes and gives the mount point.
    pub(crate) root: fn(&str) -> Result<PathBuf, String>,
    /// Opens what a bind mount's source means.
    pub(crate) bind: BindSource,
}

/// What a spare is told to become; the specification follows as it came from the host.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    /// For [`Sources::root`].
    pub(crate) root: String,
    pub(crate) io: ProcessIo,
}

/// The agent's side of a spare.
#[derive(Debug)]
pub(crate) struct Spare {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) link: Link,
    pub(crate) cgroup: Cgroup,
    /// The agent's ends of standard input, output and error.
    pub(crate) pipes: [Option<OwnedFd>; 3],
    /// Where the order is written.
    order: File,
}

impl Spare {
    /// Forks one, in a cgroup `name` below `root`.
    pub(crate) fn fork(
        root: &Path,
        name: &str,
        sources: Sources,
        shared_pid: Option<BorrowedFd<'_>>,
    ) -> Result<Spare, Error> {
        let cgroup = Cgroup::create(root, name)?;
        match Spare::fork_into(&cgroup, sources, shared_pid) {
            Ok((pid, pidfd, link, pipes, order)) => {
                Ok(Spare { pid, pidfd, link, cgroup, pipes, order })
            }
            Err(error) => {
                cgroup.remove_now();
                Err(error)
            }
        }
    }

    #[allow(clippy::type_complexity)]
    fn fork_into(
        cgroup: &Cgroup,
        sources: Sources,
        shared_pid: Option<BorrowedFd<'_>>,
    ) -> Result<(i32, OwnedFd, Link, [Option<OwnedFd>; 3], File), Error> {
        let order = memfd_create(c"order", MFdFlags::MFD_CLOEXEC)
            .map_err(|error| Error::failed(format!("making a memory file: {error}")))?;
        let Pipes { theirs, ours } = Pipes::new([true; 3])?;
        let mut flags = CloneFlags::CLONE_NEWNS;
        flags.set(CloneFlags::CLONE_NEWPID, shared_pid.is_none());
        let extra = Some(order.as_fd());
        let body = |child| run(child, sources);
        let (pid, link) = spawn::spawn(flags, cgroup, shared_pid, theirs, extra, body)?;
        Ok((pid, spawn::open_pidfd(pid)?, link, ours, order.into()))
    }

    /// Gives the order; the spare becomes the container as far as "ready".
    pub(crate) fn order(&self, spec: &[u8], root: &str, io: ProcessIo) -> Result<(), Error> {
        let bad = |error: &dyn Display| Error::failed(format!("writing the order: {error}"));
        let order = Order { root: root.to_owned(), io };
        let mut text = serde_json::to_vec(&order).map_err(|error| bad(&error))?;
        text.push(b'\n');
        text.extend_from_slice(spec);
        self.order.write_all_at(&text, 0).map_err(|error| bad(&error))?;
        self.link.order(text.len())
    }
}

/// The spares that are left.
#[derive(Debug)]
pub(crate) struct Spares {
    sources: Sources,
    left: Mutex<Vec<Spare>>,
    /// How many were ever made: their cgroups' names.
    made: AtomicUsize,
}

impl Spares {
    /// None yet.
    pub(crate) fn new(sources: Sources) -> Spares {
        Spares { sources, left: Mutex::default(), made: AtomicUsize::new(0) }
    }

    /// Forks `count` of them, in cgroups below `root`.
    pub(crate) fn fork(&self, root: &Path, count: usize) -> Result<(), Error> {
        for _ in 0..count {
            let number = self.made.fetch_add(1, Ordering::Relaxed);
            let spare = Spare::fork(root, &format!("spare-{number}"), self.sources, None)?;
            self.left().push(spare);
        }
        Ok(())
    }

    fn left(&self) -> MutexGuard<'_, Vec<Spare>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take(&self) -> Option<Spare> {
        self.left().pop()
    }

    pub(crate) fn sources(&self) -> Sources {
        self.sources
    }
}

/// What a spare has made before its order.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) sources: Sources,
    pub(crate) usual: Usual,
}

fn run(child: Child, sources: Sources) {
    let prepared = prepare(sources);
    // Without an order the agent has given up.
    let Some(length) = child.link.wait_for_order() else { return };
    let ordered = prepared.and_then(|prepared| {
        propagate(MsFlags::MS_PRIVATE)?;
        let (order, spec) = read(child.extra, length)?;
        stdio::keep(order.io.pipes())
            .map_err(|error| Error::failed(format!("arranging standard streams: {error}")))?;
        Ok((prepared, order, spec))
    });
    init::run(&child.link, ordered);
}

fn prepare(sources: Sources) -> Result<Prepared, Error> {
    let failed = |what: &str, why: String| Error::failed(format!("{what}: {why}"));
    init::new_session()?;
    // Here, not in clone: its root is then the container's cgroup, not the agent's.
    unshare(CloneFlags::CLONE_NEWCGROUP)
        .map_err(|error| failed("making a cgroup namespace", error.to_string()))?;
    // What the pod gets while this waits, its disk, is seen here too.
    propagate(MsFlags::MS_SLAVE)?;
    Ok(Prepared { sources, usual: Usual::make() })
}

fn propagate(how: MsFlags) -> Result<(), Error> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | how, None::<&str>)
        .map_err(|error| Error::failed(format!("making the mounts its own: {error}")))
}

fn read(file: Option<OwnedFd>, length: usize) -> Result<(Order, Spec), Error> {
    let bad = |error: &dyn Display| Error::failed(format!("reading the order: {error}"));
    let file = File::from(file.ok_or_else(|| bad(&"it has no file"))?);
    let mut text = vec![0; length];
    file.read_exact_at(&mut text, 0).map_err(|error| bad(&error))?;
    let end = text.iter().position(|byte| *byte == b'\n').unwrap_or(text.len());
    let (order, spec) = text.split_at(end);
    let order = serde_json::from_slice(order).map_err(|error| bad(&error))?;
    Ok((order, serde_json::from_slice(spec).map_err(|error| bad(&error))?))
}

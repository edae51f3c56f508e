//! A container's first process, forked before there is a container: the agent makes spares for the
//! template, so that a clone finds them ready.
//!
//! A spare has its cgroup, its namespaces and, detached, the file systems that nearly every container
//! mounts. It sleeps until its order comes: the specification, the root, the descriptors. A container
//! for which no spare is left gets one forked at once; there is no other way to make a container.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use super::link::Link;
use super::mounts::Usual;
use super::spawn::{self, Child, TerminalSize};
use super::{Cgroup, Error, ProcessIo, init, sys};

/// Where root file systems come from. Both run in a container's first process, in its own mount
/// namespace, with which every mount goes away.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RootMaker {
    /// What can be done before the container is known.
    pub(crate) prepare: fn() -> Result<(), String>,
    /// Mounts the root that the bytes describe and gives the mount point.
    pub(crate) mount: fn(&str) -> Result<PathBuf, String>,
}

/// What a spare is told to become.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) spec: Spec,
    /// For [`RootMaker::mount`].
    pub(crate) root: String,
    /// Of the terminal, if there is to be one.
    pub(crate) terminal: Option<TerminalSize>,
}

/// The agent's side of a spare.
#[derive(Debug)]
pub(crate) struct Spare {
    pub(crate) pid: i32,
    pub(crate) link: Link,
    pub(crate) cgroup: Cgroup,
}

impl Spare {
    /// Forks one, in a cgroup `name` below `root`.
    pub(crate) fn fork(
        root: &Path,
        name: &str,
        maker: RootMaker,
        shared_pid: Option<BorrowedFd<'_>>,
    ) -> Result<Spare, Error> {
        let cgroup = Cgroup::create(root, name)?;
        let mut flags = CloneFlags::CLONE_NEWNS;
        flags.set(CloneFlags::CLONE_NEWPID, shared_pid.is_none());
        let forked = spawn::null_stdio().and_then(|stdio| {
            spawn::spawn(flags, &cgroup, shared_pid, stdio, None, |child| run(child, maker))
        });
        match forked {
            Ok((pid, link)) => Ok(Spare { pid, link, cgroup }),
            Err(error) => {
                cgroup.remove_now();
                Err(error)
            }
        }
    }

    /// Gives the order; the spare becomes the container as far as "ready".
    pub(crate) fn order(&self, spec: Spec, root: String, io: ProcessIo) -> Result<(), Error> {
        let (stdio, terminal) = spawn::split(io)?;
        let order = serde_json::to_vec(&Order { spec, root, terminal })
            .map_err(|error| Error::failed(format!("writing the container's order: {error}")))?;
        self.link.order(&order, &stdio)
    }
}

/// The spares that are left.
#[derive(Debug)]
pub(crate) struct Spares {
    maker: RootMaker,
    left: Mutex<Vec<Spare>>,
}

impl Spares {
    /// None yet.
    pub(crate) fn new(maker: RootMaker) -> Spares {
        Spares { maker, left: Mutex::default() }
    }

    /// Forks `count` of them, in cgroups below `root`.
    pub(crate) fn fork(&self, root: &Path, count: usize) -> Result<(), Error> {
        for number in 0..count {
            let spare = Spare::fork(root, &format!("spare-{number}"), self.maker, None)?;
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

    pub(crate) fn maker(&self) -> RootMaker {
        self.maker
    }
}

/// What a spare has made before its order.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) maker: RootMaker,
    pub(crate) usual: Usual,
}

fn run(child: Child, maker: RootMaker) {
    let prepared = prepare(maker);
    // Without an order the agent has given up.
    let Ok(Some((order, stdio))) = child.link.wait_for_order() else { return };
    let ordered = prepared.and_then(|prepared| Ok((prepared, read(&order, stdio)?)));
    init::run(&child.link, ordered);
}

fn prepare(maker: RootMaker) -> Result<Prepared, Error> {
    let failed = |what: &str, why: String| Error::failed(format!("{what}: {why}"));
    init::new_session()?;
    // Here, not in clone: its root is then the container's cgroup, not the agent's.
    unshare(CloneFlags::CLONE_NEWCGROUP)
        .map_err(|error| failed("making a cgroup namespace", error.to_string()))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .map_err(|error| failed("making the mounts private", error.to_string()))?;
    (maker.prepare)().map_err(|why| failed("preparing a root file system", why))?;
    Ok(Prepared { maker, usual: Usual::make() })
}

/// Reads the order and puts the descriptors at 0 to 2.
fn read(order: &[u8], stdio: [OwnedFd; 3]) -> Result<Order, Error> {
    let bad = |error: &dyn std::fmt::Display| Error::failed(format!("the order: {error}"));
    let order = serde_json::from_slice(order).map_err(|error| bad(&error))?;
    for (target, fd) in stdio.iter().enumerate() {
        let moved: io::Result<()> = sys::duplicate_to(fd.as_raw_fd(), target as i32);
        moved.map_err(|error| bad(&error))?;
    }
    Ok(order)
}

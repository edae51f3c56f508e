//! A container's first process, from fork to exec: builds the container around itself.
//!
//! What is written under `/proc` is written through the agent's own `/proc`, before the root
//! changes: nothing that an image brings can be in its place.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{fchdir, pivot_root, sethostname, setsid};
use oci_spec::runtime::{LinuxPersonalityDomain, Process, Spec};

use super::link::ChildLink;
use super::plan::Plan;
use super::process::{self, Prepared};
use super::seccomp::Filter;
use super::spare::{self, Order};
use super::spawn::Steps;
use super::sys::{self, MountAttr};
use super::{Error, Kind, devices, masks, mount_options, mounts, terminal};

fn failed(what: &str, error: impl std::fmt::Display) -> Error {
    Error::failed(format!("{what}: {error}"))
}

/// Never returns to the agent's code: the caller ends the process after it.
pub(crate) fn run(link: &ChildLink, ordered: Result<(spare::Prepared, Order, Spec), Error>) {
    let mut steps = Steps::begin();
    let built = ordered.and_then(|(spare, order, spec)| build(spare, order, spec, &mut steps));
    finish(link, built, &steps.taken);
}

/// Reports, waits for "go" and runs the command; returns when that has failed.
pub(crate) fn finish(
    link: &ChildLink,
    built: Result<(Prepared, Option<OwnedFd>), Error>,
    steps: &[std::time::Duration],
) {
    let error = match built {
        Ok((prepared, master)) => match link.ready_then_go(steps, master) {
            true => prepared.exec().err(),
            false => None,
        },
        Err(error) => Some(error),
    };
    if let Some(error) = error {
        link.fail(&error);
    }
}

fn build(
    mut spare: spare::Prepared,
    order: Order,
    spec: Spec,
    steps: &mut Steps,
) -> Result<(Prepared, Option<OwnedFd>), Error> {
    let plan = Plan::new(spec)?;
    let filter = plan.linux.seccomp().as_ref().map(Filter::new).transpose()?;
    let size = order.io.terminal();
    let mut own = CloneFlags::empty();
    own.set(CloneFlags::CLONE_NEWIPC, plan.own_ipc);
    own.set(CloneFlags::CLONE_NEWUTS, plan.own_uts);
    if !own.is_empty() {
        unshare(own).map_err(|error| failed("making IPC and UTS namespaces", error))?;
    }
    if plan.own_ipc {
        spare.usual.forget_message_queues();
    }
    set_oom_score(&plan.process)?;
    for (path, value) in &plan.sysctls {
        fs::write(Path::new("/proc/sys").join(path), value)
            .map_err(|error| failed(&format!("setting sysctl {path}"), error))?;
    }
    set_names(&plan)?;
    let path = (spare.sources.root)(&order.root)
        .map_err(|why| Error::failed(format!("mounting the root file system: {why}")))?;
    let root = open_directory(&path)?;
    steps.done();
    let read_only_dev = fill(&plan, root.as_fd(), &mut spare)?;
    enter(root.as_fd())?;
    let root = open_root()?;
    let master = size.map(|(width, height)| terminal::open(width, height)).transpose()?;
    if master.is_some() {
        terminal::bind_console(root.as_fd())?;
    }
    protect(&plan, root.as_fd(), read_only_dev)?;
    steps.done();
    set_personality(&plan)?;
    let prepared = process::prepare(&plan.process, root.as_fd(), filter)?;
    steps.done();
    Ok((prepared, master))
}

/// A session of its own, which nothing of the container may trace before it runs.
pub(crate) fn new_session() -> Result<(), Error> {
    setsid().map_err(|error| failed("making a session", error))?;
    sys::process_control(libc::PR_SET_DUMPABLE, 0, 0)
        .map(drop)
        .map_err(|error| failed("shielding the process", error))
}

/// Written through the agent's /proc.
pub(crate) fn set_oom_score(process: &Process) -> Result<(), Error> {
    match process.oom_score_adj() {
        Some(score) => fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|error| failed(&format!("setting oom_score_adj to {score}"), error)),
        None => Ok(()),
    }
}

fn set_names(plan: &Plan) -> Result<(), Error> {
    // A shared UTS namespace carries the pod's name, which StartSandbox has set.
    if !plan.own_uts {
        return Ok(());
    }
    if let Some(name) = plan.spec.hostname() {
        sethostname(name).map_err(|error| failed(&format!("setting host name {name:?}"), error))?;
    }
    match plan.spec.domainname() {
        Some(name) => fs::write("/proc/sys/kernel/domainname", name)
            .map_err(|error| failed(&format!("setting domain name {name:?}"), error)),
        None => Ok(()),
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty())
        .map_err(|error| failed(&format!("opening the root {path:?}"), error))
}

/// The root as it is now.
pub(crate) fn open_root() -> Result<OwnedFd, Error> {
    open_directory(Path::new("/"))
}

/// Everything below the root that is made from outside. Gives whether /dev is to be read-only.
fn fill(plan: &Plan, root: BorrowedFd<'_>, spare: &mut spare::Prepared) -> Result<bool, Error> {
    let all = plan.spec.mounts().as_deref().unwrap_or(&[]);
    let read_only_dev = mounts::mount_all(root, all, &mut spare.usual, spare.sources.bind)?;
    if !mounts::brings_own_dev(all) {
        devices::fill(root, plan.linux.devices().as_deref().unwrap_or(&[]))?;
    }
    Ok(read_only_dev)
}

/// Makes the directory the root, and the old root unreachable.
fn enter(root: BorrowedFd<'_>) -> Result<(), Error> {
    let enter = || -> nix::Result<()> {
        fchdir(root)?;
        // The old root ends up on top of the new one, and is then detached.
        pivot_root(".", ".")?;
        umount2(".", MntFlags::MNT_DETACH)?;
        nix::unistd::chdir("/")
    };
    enter().map_err(|error| failed("changing the root (pivot_root)", error))
}

/// What the container may not see or write, once everything is in place.
fn protect(plan: &Plan, root: BorrowedFd<'_>, read_only_dev: bool) -> Result<(), Error> {
    let paths = |paths: &Option<Vec<String>>| paths.clone().unwrap_or_default();
    masks::make_read_only(root, &paths(plan.linux.readonly_paths()))?;
    let masked = paths(plan.linux.masked_paths());
    if !masked.is_empty() {
        let null: File = masks::open_null()?;
        masks::hide(root, &null, &masked)?;
    }
    if read_only_dev {
        let dev = open_directory(Path::new("/dev"))?;
        sys::set_mount_attributes(dev.as_fd(), &mount_options::read_only(), false)
            .map_err(|error| failed("making /dev read-only", error))?;
    }
    if let Some(name) = plan.linux.rootfs_propagation().as_deref().filter(|name| !name.is_empty()) {
        let (propagation, recursive) = mount_options::propagation(name).ok_or_else(|| {
            Error::new(Kind::Invalid, format!("rootfsPropagation {name:?} is not known"))
        })?;
        let attributes = MountAttr { propagation, ..MountAttr::default() };
        sys::set_mount_attributes(root, &attributes, recursive)
            .map_err(|error| failed("setting the root's propagation", error))?;
    }
    if plan.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false) {
        sys::set_mount_attributes(root, &mount_options::read_only(), false)
            .map_err(|error| failed("making the root read-only", error))?;
    }
    Ok(())
}

fn set_personality(plan: &Plan) -> Result<(), Error> {
    const PER_LINUX32: u64 = 8;
    let Some(personality) = plan.linux.personality() else {
        return Ok(());
    };
    let domain = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
    };
    sys::set_personality(domain).map_err(|error| failed("setting the personality", error))
}

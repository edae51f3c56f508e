//! The VMM's jail: namespaces of its own, a root that holds only what the dynamic linker and QEMU's
//! start need, an unprivileged uid, no capabilities, no way to gain any.
//!
//! Everything the VMM uses later is an open descriptor. Once QEMU answers on its control socket the
//! root is emptied ([`Jail::empty`]), before the guest can be told anything. What runs between fork
//! and exec is [`enter`]: system calls and no locks; failures are reported through a pipe as a step
//! and an errno.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sched::{CloneFlags, setns};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, Uid, chdir, setgroups, setresgid, setresuid};

use crate::sys::{self, Forked};

/// Namespaces of a jailed process, all its own.
pub(crate) const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWNET;

const NONE: Option<&CStr> = None;
/// Open files QEMU may have: its own few, and one or two for each layer of each disk.
const OPEN_FILES: u64 = 8192;

/// Who a jailed VMM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A range of unprivileged ids to take from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// First user and group id.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl IdRange {
    /// The ids of a sandbox: the same each time, and rarely those of another.
    pub fn of(self, sandbox: &str) -> Identity {
        let hash = sandbox.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let offset = u32::try_from(hash % u64::from(self.count.max(1))).unwrap_or(0);
        let id = self.first.saturating_add(offset);
        Identity { uid: id, gid: id }
    }
}

/// A file or directory of the node that the jail shows.
#[derive(Debug, Clone)]
pub struct Bind {
    source: CString,
    target: CString,
    /// Directories to make for the target, outermost first.
    parents: Vec<CString>,
    directory: bool,
    writable: bool,
}

/// A symbolic link in the jail.
#[derive(Debug, Clone)]
struct Link {
    to: CString,
    at: CString,
}

/// What is to be jailed, and how: everything allocated before the fork.
#[derive(Debug)]
pub struct Jail {
    /// Directory on which the jail's root is mounted, in the jail's own mount namespace.
    root: CString,
    binds: Vec<Bind>,
    links: Vec<Link>,
    identity: Identity,
    cgroups: Vec<OwnedFd>,
}

/// Directories of the node that a dynamically linked QEMU reads while it starts.
const SYSTEM: &[&str] =
    &["/usr/lib", "/usr/lib64", "/usr/share/qemu", "/usr/share/seabios", "/etc/ld.so.cache"];
const ROOT_LINKS: &[&str] = &["/lib", "/lib64"];

fn c(path: &OsStr) -> io::Result<CString> {
    CString::new(path.as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

impl Jail {
    /// An empty jail on top of `root`, an existing directory.
    pub fn new(root: &Path, identity: Identity, cgroups: Vec<OwnedFd>) -> io::Result<Self> {
        let root = c(root.as_os_str())?;
        Ok(Self { root, binds: Vec::new(), links: Vec::new(), identity, cgroups })
    }

    /// Shows what a dynamically linked QEMU reads while it starts.
    pub fn system(&mut self) -> io::Result<()> {
        for path in SYSTEM.iter().map(Path::new).filter(|path| path.exists()) {
            self.bind(path, path, false)?;
        }
        for path in ROOT_LINKS.iter().map(Path::new) {
            match std::fs::read_link(path) {
                Ok(to) => self
                    .links
                    .push(Link { to: c(to.as_os_str())?, at: c(relative(path).as_os_str())? }),
                Err(_) if path.is_dir() => self.bind(path, path, false)?,
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Shows `program` as `name`, from whose place it finds its data.
    pub fn program(&mut self, program: &Path, name: &Path) -> io::Result<()> {
        if SYSTEM.iter().any(|shown| name.starts_with(shown)) {
            // It is there already, and nothing can be made beside it.
            return Ok(());
        }
        self.bind(program, name, false)
    }

    /// Shows `source` in the jail as `target`, read-only unless `writable`.
    pub fn bind(&mut self, source: &Path, target: &Path, writable: bool) -> io::Result<()> {
        let target = relative(target);
        let mut parents = Vec::new();
        let mut at = PathBuf::new();
        for part in target.parent().into_iter().flat_map(Path::components) {
            at.push(part);
            parents.push(c(at.as_os_str())?);
        }
        self.binds.push(Bind {
            source: c(source.canonicalize()?.as_os_str())?,
            target: c(target.as_os_str())?,
            parents,
            directory: source.is_dir(),
            writable,
        });
        Ok(())
    }

    /// Turns a freshly forked child, in [`NAMESPACES`], into the jailed process up to exec.
    ///
    /// The process dies with the thread that forked it, which is the only one of `parent`, a descriptor of the forking
    /// process (pidfd_open(2)): it tells whether that has died before the kernel was asked to see to it.
    pub(crate) fn enter(&self, parent: BorrowedFd<'_>) -> Result<(), (Step, nix::Error)> {
        let step = |step: Step| move |error: nix::Error| (step, error);
        for cgroup in &self.cgroups {
            nix::unistd::write(cgroup, b"0").map_err(step(Step::Cgroup))?;
        }
        self.make_root().map_err(step(Step::Root))?;
        nix::unistd::sethostname("joey").map_err(step(Step::Limits))?;
        setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).map_err(step(Step::Limits))?;
        setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step(Step::Limits))?;
        setrlimit(Resource::RLIMIT_MEMLOCK, 0, 0).map_err(step(Step::Limits))?;
        self.drop_privileges().map_err(step(Step::Privileges))?;
        // Changing the uid would have cleared it (prctl(2)).
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(step(Step::Limits))?;
        let mut ended = [PollFd::new(parent, PollFlags::POLLIN)];
        match nix::poll::poll(&mut ended, PollTimeout::ZERO).map_err(step(Step::Limits))? {
            0 => Ok(()),
            _ => Err((Step::Limits, nix::Error::ESRCH)),
        }
    }

    fn make_root(&self) -> nix::Result<()> {
        mount(NONE, c"/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        let root = self.root.as_c_str();
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some(c"joey"), root, Some(c"tmpfs"), flags, Some(c"mode=755,size=64k"))?;
        chdir(root)?;
        for bind in &self.binds {
            for parent in &bind.parents {
                make_directory(parent)?;
            }
            if bind.directory {
                make_directory(&bind.target)?;
            } else {
                nix::sys::stat::mknod(
                    bind.target.as_c_str(),
                    nix::sys::stat::SFlag::S_IFREG,
                    nix::sys::stat::Mode::from_bits_truncate(0o444),
                    0,
                )?;
            }
            let target = bind.target.as_c_str();
            mount(Some(bind.source.as_c_str()), target, NONE, MsFlags::MS_BIND, NONE)?;
            let mut flags =
                MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            if !bind.writable {
                flags |= MsFlags::MS_RDONLY;
            }
            mount(NONE, target, NONE, flags, NONE)?;
        }
        for link in &self.links {
            nix::unistd::symlinkat(link.to.as_c_str(), nix::fcntl::AT_FDCWD, link.at.as_c_str())?;
        }
        nix::unistd::pivot_root(c".", c".")?;
        umount2(c".", MntFlags::MNT_DETACH)?;
        chdir(c"/")?;
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | flags;
        mount(NONE, c"/", NONE, read_only, NONE)
    }

    /// Leaving root empties the permitted, effective and ambient sets; the bounding set is emptied
    /// before, so that no program could bring any back, and no_new_privs forbids it besides.
    fn drop_privileges(&self) -> nix::Result<()> {
        for capability in 0..64 {
            match sys::drop_bounding(capability) {
                Ok(()) => {}
                Err(nix::Error::EINVAL) => break,
                Err(error) => return Err(error),
            }
        }
        let (uid, gid) = (Uid::from_raw(self.identity.uid), Gid::from_raw(self.identity.gid));
        setgroups(&[])?;
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        nix::sys::prctl::set_no_new_privs()
    }

    /// Takes everything out of a running jail's root. Mapped libraries stay mapped.
    pub(crate) fn empty(&self, pid: i32) -> io::Result<()> {
        if self.binds.is_empty() {
            return Ok(());
        }
        let namespace = std::fs::File::open(format!("/proc/{pid}/ns/mnt"))?;
        // SAFETY: the child makes system calls on what was allocated before, and exits.
        #[allow(unsafe_code)]
        let forked = unsafe { sys::fork_into(0) }?;
        match forked {
            Forked::Child => {
                let emptied = setns(&namespace, CloneFlags::CLONE_NEWNS)
                    .and_then(|()| chdir(c"/"))
                    .and_then(|()| {
                        self.binds.iter().rev().try_for_each(|bind| {
                            umount2(bind.target.as_c_str(), MntFlags::MNT_DETACH)
                        })
                    });
                sys::exit_now(emptied.err().map_or(0, |error| error as i32))
            }
            Forked::Parent { pid, .. } => match waitpid(Pid::from_raw(pid), None)? {
                WaitStatus::Exited(_, 0) => Ok(()),
                WaitStatus::Exited(_, errno) => Err(io::Error::from_raw_os_error(errno)),
                status => Err(io::Error::other(format!("{status:?}"))),
            },
        }
    }
}

fn make_directory(path: &CString) -> nix::Result<()> {
    match nix::unistd::mkdir(path.as_c_str(), nix::sys::stat::Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(nix::Error::EEXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

fn relative(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}

/// Where entering a jail failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    /// Descriptors.
    Descriptors = 1,
    /// Joining the cgroups.
    Cgroup,
    /// Making the root.
    Root,
    /// Limits and host name.
    Limits,
    /// Giving up privileges.
    Privileges,
    /// Executing QEMU.
    Execute,
}

impl Step {
    /// What the operator reads.
    pub(crate) fn text(code: u8) -> &'static str {
        match code {
            1 => "passing descriptors",
            2 => "joining the pod's cgroup",
            3 => "making the jail's root",
            4 => "setting limits",
            5 => "dropping privileges",
            6 => "executing QEMU",
            _ => "unknown step",
        }
    }
}

/// In the child: reports and ends.
pub(crate) fn report_and_exit(report: RawFd, step: Step, errno: i32) -> ! {
    let mut message = [step as u8, 0, 0, 0, 0];
    if let Some(rest) = message.get_mut(1..) {
        rest.copy_from_slice(&errno.to_le_bytes());
    }
    sys::write_raw(report, &message);
    sys::exit_now(125)
}

/// In the parent: a report read back.
pub(crate) fn parse_report(message: &[u8]) -> Option<(&'static str, io::Error)> {
    let (step, errno) = message.split_first()?;
    let errno = i32::from_le_bytes(errno.try_into().ok()?);
    Some((Step::text(*step), io::Error::from_raw_os_error(errno)))
}

/// Numbers of the descriptors that the child needs placed.
pub(crate) fn raw(descriptors: &[(OwnedFd, RawFd)]) -> Vec<(RawFd, RawFd)> {
    descriptors.iter().map(|(fd, target)| (fd.as_raw_fd(), *target)).collect()
}

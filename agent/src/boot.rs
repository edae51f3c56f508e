//! What PID 1 does before it can listen: mounts, kernel modules, the root that containers leave.
//!
//! The kernel starts the agent on `rootfs`, which `pivot_root` cannot leave. So the agent mounts a
//! tmpfs, moves it over `/` and changes its root to it: from then on `/` is an ordinary mount with a
//! parent, and a container's process, in its own mount namespace, may `pivot_root` away from it and
//! detach it. The agent's binary stays on `rootfs`, below everything, reachable only through the
//! running process; the modules are deleted from there once loaded.
//!
//! ```text
//! /                tmpfs          /dev         devtmpfs, /dev/pts devpts, /dev/shm tmpfs (the pod's)
//! /proc  /sys      as usual       /run         tmpfs: /run/joey/{volumes,layers}
//! /sys/fs/cgroup   cgroup2, every controller on, for the root and for joey/
//! ```

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};

use crate::log::warning;
use crate::sys;

/// Where the sandbox's containers have their cgroups.
pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup/joey";
/// Where `xtask guest` puts the modules, with their order of loading in `order`.
const MODULES: &str = "/lib/modules";
/// Where `xtask guest` puts the blank of the pod's disk.
const BLANK: &str = "/blank";
/// Where the new root is built before it is moved over `/`.
const NEW_ROOT: &str = "/newroot";
/// Housekeeping that wakes an idle guest: compaction in advance, statistics every second.
const QUIET: [(&str, &str); 2] = [("compaction_proactiveness", "0"), ("stat_interval", "60")];
/// Open files: what the agent, and a container that names no limit, may have.
const OPEN_FILES: (u64, u64) = (65_536, 1_048_576);

/// A step of booting that failed; the guest cannot work without it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// Something could not be mounted.
    #[error("mounting {kind} on {target}: {source}")]
    Mount {
        /// Type of the file system.
        kind: &'static str,
        /// Where it should have gone.
        target: PathBuf,
        /// The kernel's answer.
        source: nix::Error,
    },
    /// A file or directory could not be made, read or opened.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused a module.
    #[error("loading kernel module {path}: {source}; was it built for this kernel?")]
    Module {
        /// Which module.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The root could not be moved.
    #[error("making the new root the root: {0}")]
    Root(nix::Error),
}

struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    options: &'static str,
}

const NO_SUID_DEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const NO_SUID_DEV_EXEC: MsFlags = NO_SUID_DEV.union(MsFlags::MS_NOEXEC);

/// In order, below the new root.
const MOUNTS: &[Mount] = &[
    Mount { kind: "tmpfs", target: "", flags: NO_SUID_DEV, options: "mode=755" },
    Mount { kind: "proc", target: "proc", flags: NO_SUID_DEV_EXEC, options: "" },
    Mount { kind: "sysfs", target: "sys", flags: NO_SUID_DEV_EXEC, options: "" },
    Mount { kind: "devtmpfs", target: "dev", flags: MsFlags::MS_NOSUID, options: "mode=755" },
    Mount {
        kind: "devpts",
        target: "dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "newinstance,ptmxmode=0666,mode=620,gid=5",
    },
    Mount {
        kind: "tmpfs",
        target: "dev/shm",
        flags: NO_SUID_DEV_EXEC,
        options: "mode=1777,size=67108864",
    },
    // Volumes of many small files are bounded by the memory they take.
    Mount { kind: "tmpfs", target: "run", flags: NO_SUID_DEV, options: "mode=755,nr_inodes=0" },
    Mount {
        kind: "cgroup2",
        target: "sys/fs/cgroup",
        flags: NO_SUID_DEV_EXEC,
        options: "nsdelegate",
    },
];

/// Brings the guest from the kernel's first user process to a system in which containers can run.
///
/// Gives the blank of the pod's disk.
pub(crate) fn boot() -> Result<Vec<u8>, BootError> {
    let blank = fs::read(BLANK)
        .and_then(|blank| fs::remove_file(BLANK).map(|()| blank))
        .map_err(|source| BootError::File { path: BLANK.into(), source })?;
    let root = Path::new(NEW_ROOT);
    for entry in MOUNTS {
        let target = root.join(entry.target);
        make_directory(&target)?;
        mount(
            Some(entry.kind),
            &target,
            Some(entry.kind),
            entry.flags,
            (!entry.options.is_empty()).then_some(entry.options),
        )
        .map_err(|source| BootError::Mount { kind: entry.kind, target, source })?;
    }
    open_console(&root.join("dev/console"));
    load_modules(Path::new(MODULES))?;
    enter_root(root).map_err(BootError::Root)?;
    for path in ["/tmp", "/etc", "/run/joey/volumes", "/run/joey/layers"] {
        make_directory(Path::new(path))?;
    }
    enable_controllers(Path::new("/sys/fs/cgroup"))?;
    make_directory(Path::new(CGROUP_ROOT))?;
    enable_controllers(Path::new(CGROUP_ROOT))?;
    for (setting, value) in QUIET {
        if let Err(error) = fs::write(Path::new("/proc/sys/vm").join(setting), value) {
            warning!("setting vm.{setting}: {error}");
        }
    }
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1) {
        warning!("raising the limit of open files: {error}");
    }
    Ok(blank)
}

fn make_directory(path: &Path) -> Result<(), BootError> {
    fs::create_dir_all(path).map_err(|source| BootError::File { path: path.to_owned(), source })
}

/// The kernel gives PID 1 a console only if the initramfs had the node; make sure of it.
fn open_console(console: &Path) {
    if let Ok(file) = OpenOptions::new().read(true).write(true).open(console) {
        let _ = sys::use_as_console(&file);
    }
}

fn load_modules(directory: &Path) -> Result<(), BootError> {
    let order = directory.join("order");
    let names = match fs::read_to_string(&order) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(BootError::File { path: order, source });
        }
    };
    for name in names.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let path = directory.join(name.trim_start_matches('/'));
        let file =
            File::open(&path).map_err(|source| BootError::File { path: path.clone(), source })?;
        match sys::finit_module(&file, &CString::default(), 0) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(source) => return Err(BootError::Module { path, source }),
        }
    }
    // Loaded modules live in the kernel's memory; the files would only take the guest's.
    if let Err(error) = fs::remove_dir_all(directory) {
        warning!("removing {}: {error}", directory.display());
    }
    Ok(())
}

fn enter_root(root: &Path) -> nix::Result<()> {
    nix::unistd::chdir(root)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    // The pod's disk and volumes are mounted below when spares wait already.
    mount(None::<&str>, "/run", None::<&str>, MsFlags::MS_SHARED, None::<&str>)
}

/// Lets children of the cgroup be limited by whatever this kernel can limit.
fn enable_controllers(cgroup: &Path) -> Result<(), BootError> {
    let path = cgroup.join("cgroup.controllers");
    let controllers =
        fs::read_to_string(&path).map_err(|source| BootError::File { path, source })?;
    let subtree = cgroup.join("cgroup.subtree_control");
    for controller in controllers.split_whitespace() {
        // One at a time: a controller that refuses must not take the others with it.
        if let Err(error) = fs::write(&subtree, format!("+{controller}")) {
            warning!("cgroup controller {controller}: {error}");
        }
    }
    Ok(())
}

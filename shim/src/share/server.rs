//! The process that answers for one share.
//!
//! Its mount namespace holds a read-only root with one entry, [`SHARED`]: what is shared. Whatever a guest
//! asks, the kernel resolves names below that. Of root's capabilities it keeps those over files, without
//! making devices: the guest's kernel decides who may do what (`default_permissions`), as it knows the
//! containers' groups; here is only stored whose file it is. Of the kernel's calls it keeps those of [`calls`].

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use caps::{CapSet, Capability, CapsHashSet};
use fuse_backend_rs::abi::fuse_abi::FsOptions;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::api::{Vfs, VfsOptions};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader};
use joey_protocol::ids::{FORGET, SHARED};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::unistd::{chdir, pivot_root};

use super::{MESSAGE, READY, calls};
use crate::sandbox::kubelet::KERNEL_PLACES;
use crate::sandbox::plan::Shared;
use crate::sys;

/// The shim's argument that makes it such a process.
pub const ACTION: &str = "share";
/// A place that every host has, covered in this process's namespace alone.
const ROOT: &str = "/run";
/// Requests that are answered at once.
const THREADS: usize = 4;
const NONE: Option<&str> = None;

const KEPT: [Capability; 7] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

/// What the guest's kernel may do. It keeps nothing of names and attributes for the next call, and of content
/// only while the file is unchanged.
const OPTIONS: [FsOptions; 8] = [
    FsOptions::ASYNC_READ,
    FsOptions::PARALLEL_DIROPS,
    FsOptions::BIG_WRITES,
    FsOptions::AUTO_INVAL_DATA,
    FsOptions::ATOMIC_O_TRUNC,
    FsOptions::DO_READDIRPLUS,
    FsOptions::READDIRPLUS_AUTO,
    FsOptions::HANDLE_KILLPRIV_V2,
];

/// Serves what the arguments name to the socket that is standard input, until its end.
///
/// # Errors
/// It cannot be served; the socket's other end is told, too.
pub fn serve(args: &[OsString]) -> Result<()> {
    let stdin = io::stdin();
    let socket = stdin.as_fd();
    let served = prepare(args);
    let said =
        served.as_ref().map_or_else(|error| format!("{error:#}").into_bytes(), |_| READY.into());
    send(socket.as_raw_fd(), &said, MsgFlags::MSG_NOSIGNAL)?;
    let server = served?;
    let crowd = Crowd::default();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| answer(&server, socket, &crowd));
        }
    });
    Ok(())
}

fn prepare(args: &[OsString]) -> Result<Server<Vfs>> {
    let shared = Shared::parse(args).context("these are not the arguments of a share")?;
    let config = Config {
        // Live: another's change shows at once.
        attr_timeout: Duration::ZERO,
        entry_timeout: Duration::ZERO,
        cache_policy: CachePolicy::Auto,
        // They would be asked for by way of /proc, which is not there; a program's start asks for one.
        xattr: false,
        killpriv_v2: true,
        do_import: false,
        root_dir: "/".to_owned(),
        ..Config::default()
    };
    sys::close_from(3).context("close what was inherited")?;
    raise_limit().context("raise the limit of open files")?;
    // It opens /proc/self/fd, which will be gone.
    let files = PassthroughFs::<()>::new(config).context("open /proc/self/fd")?;
    confine(&shared)?;
    give_up_privileges().context("give up capabilities")?;
    files.import().context("open the share's root")?;
    let out_opts = OPTIONS.into_iter().collect();
    let options = VfsOptions {
        out_opts,
        no_open: false,
        no_opendir: false,
        no_writeback: true,
        killpriv_v2: true,
        ..VfsOptions::default()
    };
    let vfs = Vfs::new(options);
    vfs.mount(Box::new(files), "/").map_err(|error| anyhow!("mount the share: {error:?}"))?;
    calls::restrict().context("give up system calls")?;
    Ok(Server::new(vfs))
}

/// The guest's kernel has an open file here for everything that it remembers.
fn raise_limit() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}

/// Leaves of the host's files nothing but what is shared.
fn confine(shared: &Shared) -> Result<()> {
    let namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC;
    unshare(namespaces).context("leave the host's namespaces")?;
    let propagation =
        MsFlags::MS_REC | if shared.live_mounts { MsFlags::MS_SLAVE } else { MsFlags::MS_PRIVATE };
    mount(NONE, "/", NONE, propagation, NONE).context("make mounts its own")?;
    // Held before its place may be covered.
    let mut source = fs::OpenOptions::new();
    source.read(true).custom_flags(libc::O_PATH);
    let source = source.open(&shared.path).context("open it")?;
    mount(Some("joey"), ROOT, Some("tmpfs"), MsFlags::MS_NODEV, Some("mode=755,size=64k"))
        .context("make an empty root")?;
    let entry = Path::new(ROOT).join(SHARED);
    match source.metadata().context("look at it")?.is_dir() {
        true => fs::create_dir(&entry),
        false => File::create(&entry).map(drop),
    }
    .context("make its place")?;
    let path = format!("/proc/self/fd/{}", source.as_raw_fd());
    mount(Some(path.as_str()), &entry, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
        .context("mount it")?;
    without_kernel(&shared.path, &entry).context("take the kernel's own out of it")?;
    if shared.read_only {
        sys::make_read_only(&entry).context("make it read-only")?;
    }
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    mount(NONE, ROOT, NONE, read_only, NONE).context("make the root read-only")?;
    drop(source);
    chdir(ROOT)
        .and_then(|()| pivot_root(".", "."))
        .and_then(|()| umount2(".", MntFlags::MNT_DETACH))
        .and_then(|()| chdir("/"))
        .context("enter its root")
}

/// Takes what is mounted at the places of the host's devices, processes and kernel out of a share that has them below it:
/// the guest has its own.
fn without_kernel(path: &Path, entry: &Path) -> io::Result<()> {
    let path = path.canonicalize()?;
    for place in KERNEL_PLACES {
        let Ok(below) = Path::new(place).strip_prefix(&path) else { continue };
        // One mount may lie upon another.
        let last = loop {
            if let Err(error) = umount2(&entry.join(below), MntFlags::MNT_DETACH) {
                break error;
            }
        };
        // Nothing is mounted there any more, or there is no such place.
        if !matches!(last, Errno::EINVAL | Errno::ENOENT) {
            return Err(last.into());
        }
    }
    Ok(())
}

/// Changes of its user id, which decide whose a new file is, take no capability away.
fn give_up_privileges() -> Result<()> {
    sys::keep_capabilities_with_user()?;
    let kept: CapsHashSet = KEPT.into_iter().collect();
    for capability in caps::all() {
        if !kept.contains(&capability) && caps::has_cap(None, CapSet::Bounding, capability)? {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    caps::clear(None, CapSet::Inheritable)?;
    let held = caps::read(None, CapSet::Permitted)?;
    let left: CapsHashSet = held.intersection(&kept).copied().collect();
    caps::set(None, CapSet::Effective, &left)?;
    caps::set(None, CapSet::Permitted, &left)?;
    Ok(nix::sys::prctl::set_no_new_privs()?)
}

/// How many files are open, for the guest: one for each that its kernel remembers, used or not.
#[derive(Default)]
struct Crowd {
    /// How many there were when the guest was last told to forget some; 0 if there are few.
    told: AtomicU64,
}

impl Crowd {
    /// Whether the guest is to be told, now that so many are open: at half of the limit, and then again
    /// for as long as they become more.
    fn is_to_be_told(&self, open: u64, limit: u64) -> bool {
        if open < limit / 2 {
            self.told.store(0, Ordering::Relaxed);
            return false;
        }
        let told = self.told.load(Ordering::Relaxed);
        let due = open >= told.saturating_add(limit / 16);
        due && self.told.compare_exchange(told, open, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn look(&self, socket: BorrowedFd<'_>) {
        let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
        // The kernel gives the lowest number that is free.
        let open = socket
            .try_clone_to_owned()
            .map_or(limit, |next| u64::from(next.as_raw_fd().unsigned_abs()));
        if self.is_to_be_told(open, limit) {
            let _ = send(socket.as_raw_fd(), &FORGET, MsgFlags::MSG_NOSIGNAL);
        }
    }
}

/// Answers one request after another.
fn answer(server: &Server<Vfs>, socket: BorrowedFd<'_>, crowd: &Crowd) {
    let (mut request, mut reply) = (vec![0; MESSAGE], vec![0; MESSAGE]);
    loop {
        let length = match recv(socket.as_raw_fd(), &mut request, MsgFlags::empty()) {
            Ok(0) | Err(nix::Error::ECONNRESET) => return,
            Ok(length) => length,
            Err(nix::Error::EINTR) => continue,
            Err(_) => return,
        };
        let Some(request) = request.get_mut(..length) else { return };
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(request));
        let writer = FuseDevWriter::new(socket.as_raw_fd(), &mut reply);
        let (Ok(reader), Ok(writer)) = (reader, writer) else { return };
        // What a guest asks wrongly is its own loss: it has got an error for it, or nothing.
        let _ = server.handle_message(reader, writer.into(), None, None);
        crowd.look(socket);
    }
}

impl Shared {
    /// What follows the path in the server's arguments.
    pub(super) fn words(&self) -> [&'static str; 2] {
        let mode = if self.read_only { "ro" } else { "rw" };
        [mode, if self.live_mounts { "live" } else { "private" }]
    }

    fn parse(args: &[OsString]) -> Result<Self> {
        let [path, words @ ..] = args else { bail!("no path") };
        for (read_only, live_mounts) in [(false, false), (false, true), (true, false), (true, true)]
        {
            let shared = Self { path: path.into(), read_only, live_mounts };
            if words.iter().eq(shared.words().iter()) {
                return Ok(shared);
            }
        }
        bail!("{words:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_is_told_of_once_for_each_step() {
        let crowd = Crowd::default();
        let told = |open| crowd.is_to_be_told(open, 1600);
        assert!(!told(799));
        assert!(told(800) && !told(801) && !told(899));
        assert!(told(900) && told(1600) && !told(1600));
        assert!(!told(20) && told(800), "it helped, and they are many again");
    }
}

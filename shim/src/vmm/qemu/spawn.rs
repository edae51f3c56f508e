//! QEMU's process: forked into the jail, with its descriptors, its console and its last words.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use super::args::fd;
use crate::host::jail::{self, Jail};
use crate::sys::{self, Forked};
use crate::vmm::error::{EXITED, VmmError};

/// How much of the console and of QEMU's standard error is kept.
const CONSOLE_BYTES: usize = 256 * 1024;
const STDERR_BYTES: usize = 8 * 1024;

/// A running QEMU, which ends when this is dropped: a start that is given up leaves none.
pub(crate) struct Running {
    pub(crate) pid: i32,
    /// How it ended, once it has.
    pub(crate) ended: watch::Receiver<Option<String>>,
}

impl Running {
    /// Waits for the process's end in the background, reaps it, and publishes how it ended.
    fn watch(pid: i32, pidfd: OwnedFd) -> io::Result<Self> {
        #[allow(deprecated, reason = "unsound only for types that change their descriptor")]
        let pidfd = AsyncFd::new(pidfd)?;
        let (sender, ended) = watch::channel(None);
        tokio::spawn(async move {
            let _ = pidfd.readable().await;
            let how = match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED) {
                Ok(WaitStatus::Exited(_, code)) => format!("{EXITED} {code}"),
                Ok(WaitStatus::Signaled(_, signal, _)) => format!("killed by {signal}"),
                Ok(status) => format!("{status:?}"),
                Err(error) => format!("process {pid} is gone ({error})"),
            };
            let _ = sender.send(Some(how));
        });
        Ok(Self { pid, ended })
    }

    pub(crate) fn kill(&self) {
        // The process is reaped only where its end is published, in this same thread.
        if self.ended.borrow().is_none() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A running QEMU and the host's ends of what it was given.
pub(crate) struct Process {
    pub(crate) running: Running,
    pub(crate) qmp: UnixStream,
    pub(crate) channel: UnixStream,
    pub(crate) stderr: Tail,
    pub(crate) jail: Arc<Jail>,
}

/// The last part of what was read from somewhere.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    fn add(&self, bytes: &[u8], limit: usize) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let surplus = kept.len().saturating_sub(limit);
        kept.drain(..surplus);
    }

    pub(crate) fn text(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        let start = lines.len().saturating_sub(6);
        lines.get(start..).unwrap_or_default().join("; ")
    }
}

/// What to run.
pub(crate) struct Launch<'a> {
    pub(crate) id: String,
    pub(crate) program: &'a Path,
    pub(crate) arguments: Vec<String>,
    pub(crate) jail: Jail,
    pub(crate) tap: OwnedFd,
    /// Device state, or the checkpoint.
    pub(crate) state: Option<OwnedFd>,
    /// Whether the state is a checkpoint, which is executed in QEMU's place.
    pub(crate) continues: bool,
    pub(crate) console_log: PathBuf,
}

/// Starts QEMU and waits until it has been executed.
pub(crate) async fn spawn(launch: Launch<'_>) -> Result<Process, VmmError> {
    let id = launch.id.clone();
    let failed = |step: &'static str| {
        let id = id.clone();
        move |source: io::Error| VmmError::Spawn { id, step, source }
    };
    let (qmp, qmp_theirs) = StdStream::pair().map_err(failed("making a socket"))?;
    let (channel, channel_theirs) = StdStream::pair().map_err(failed("making a socket"))?;
    let (console, console_theirs) = StdStream::pair().map_err(failed("making a socket"))?;
    let (errors, errors_theirs) = io::pipe().map_err(failed("making a pipe"))?;
    let (report, report_theirs) = io::pipe().map_err(failed("making a pipe"))?;
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(failed("opening /dev/null"))?;
    let mut descriptors: Vec<(OwnedFd, RawFd)> = vec![
        (null.try_clone().map_err(failed("/dev/null"))?.into(), 0),
        (null.into(), 1),
        (errors_theirs.into(), 2),
        (qmp_theirs.into(), fd::QMP),
        (channel_theirs.into(), fd::CHANNEL),
        (console_theirs.into(), fd::CONSOLE),
        (launch.tap, fd::TAP),
    ];
    descriptors.extend(launch.state.map(|state| (state, fd::STATE)));
    let program = text(launch.program.as_os_str().as_bytes()).map_err(failed("naming QEMU"))?;
    let arguments = [Ok(program.clone())]
        .into_iter()
        .chain(launch.arguments.iter().map(|argument| text(argument.as_bytes())))
        .collect::<io::Result<Vec<_>>>()
        .map_err(failed("writing the command line"))?;
    let jail = Arc::new(launch.jail);
    let program = (!launch.continues).then_some(program);
    let (pid, pidfd) =
        fork(&jail, &descriptors, report_theirs.as_fd(), program.as_deref(), &arguments)
            .map_err(failed("forking"))?;
    drop((descriptors, report_theirs));
    let running = Running::watch(pid, pidfd).map_err(failed("watching its process"))?;
    let tokio_stream = |stream: StdStream| {
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream)
    };
    let stderr = Tail::default();
    let (qmp, channel, console) = (|| {
        keep_errors(errors.into(), stderr.clone())?;
        Ok((tokio_stream(qmp)?, tokio_stream(channel)?, tokio_stream(console)?))
    })()
    .map_err(failed("registering descriptors"))?;
    let folder = launch.console_log.parent().unwrap_or(Path::new("/"));
    let folder = File::open(folder).map_err(failed("opening the console's folder"))?;
    let name = launch.console_log.file_name().unwrap_or_default().into();
    tokio::spawn(keep_console(console, folder, name));
    let process = Process { running, qmp, channel, stderr, jail };
    let mut message = Vec::new();
    let mut report = pipe::Receiver::from_owned_fd(report.into()).map_err(failed("the report"))?;
    report.read_to_end(&mut message).await.map_err(failed("the report"))?;
    match jail::parse_report(&message) {
        None => Ok(process),
        Some((step, source)) => Err(failed(step)(source)),
    }
}

fn text(bytes: &[u8]) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn fork(
    jail: &Jail,
    descriptors: &[(OwnedFd, RawFd)],
    report: BorrowedFd<'_>,
    program: Option<&CStr>,
    arguments: &[CString],
) -> io::Result<(i32, OwnedFd)> {
    let wanted = jail::raw(descriptors);
    let parent = sys::pidfd_open(nix::unistd::getpid().as_raw())?;
    // Time-zone and allocator: QEMU must not look for files, and should keep few heaps.
    let environment = [c"PATH=/", c"MALLOC_ARENA_MAX=1"].map(|text| text.to_owned());
    // SAFETY: the shim runs one thread; the child makes system calls and a few small allocations.
    #[allow(unsafe_code)]
    let forked = unsafe { sys::fork_into(jail::NAMESPACES) }?;
    match forked {
        Forked::Parent { pid, pidfd } => Ok((pid, pidfd)),
        Forked::Child => {
            let entered = jail.enter(parent.as_fd());
            let report = report.as_raw_fd();
            if let Err((step, error)) = entered {
                jail::report_and_exit(report, step, error as i32);
            }
            if let Err(error) = sys::place_descriptors(&wanted, report) {
                let errno = error.raw_os_error().unwrap_or(0);
                jail::report_and_exit(report, jail::Step::Descriptors, errno);
            }
            let error = match program {
                Some(program) => sys::execute(program, arguments, &environment),
                None => sys::execute_descriptor(fd::STATE, arguments, &environment),
            };
            let errno = error.raw_os_error().unwrap_or(0);
            jail::report_and_exit(sys::REPORT_FD, jail::Step::Execute, errno)
        }
    }
}

fn keep_errors(errors: OwnedFd, tail: Tail) -> io::Result<()> {
    let mut errors = pipe::Receiver::from_owned_fd(errors)?;
    tokio::spawn(async move {
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = errors.read(&mut buffer).await {
            tail.add(buffer.get(..read).unwrap_or_default(), STDERR_BYTES);
        }
    });
    Ok(())
}

/// Keeps the console in a file of bounded size: when full, it is started anew with the older half
/// dropped. The folder may get another name meanwhile, as a keeper's does when it is claimed.
async fn keep_console(mut console: impl AsyncRead + Unpin, folder: File, name: PathBuf) {
    let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    let mut written = 0;
    let mut file: Option<File> = None;
    let mut buffer = vec![0; 4096];
    while let Ok(read @ 1..) = console.read(&mut buffer).await {
        if written + read > CONSOLE_BYTES / 2 {
            file = None;
            let _ = std::fs::rename(&path, path.with_extension("log.1"));
        }
        if file.is_none() {
            file = File::create(&path).ok();
            written = 0;
        }
        if let Some(file) = &mut file {
            let _ = file.write_all(buffer.get(..read).unwrap_or_default());
            written += read;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn the_console_is_kept_where_its_folder_goes() {
        let root = tempfile::tempdir().unwrap();
        let (before, after) = (root.path().join("standby"), root.path().join("sandbox"));
        std::fs::create_dir(&before).unwrap();
        let (mut guest, console) = tokio::io::duplex(64);
        let folder = File::open(&before).unwrap();
        let kept = tokio::spawn(keep_console(console, folder, "console.log".into()));
        std::fs::rename(&before, &after).unwrap();
        guest.write_all(b"panic\n").await.unwrap();
        drop(guest);
        kept.await.unwrap();
        assert_eq!(std::fs::read(after.join("console.log")).unwrap(), b"panic\n");
    }
}

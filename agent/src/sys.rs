//! All `unsafe` of the agent outside the container engine, each call behind a safe function.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::NixPath;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `RNDADDENTROPY`: `_IOW('R', 0x03, int[2])`.
const RND_ADD_ENTROPY: libc::c_ulong = 0x4008_5203;
/// `RNDRESEEDCRNG`: `_IO('R', 0x07)`.
const RND_RESEED_CRNG: libc::c_ulong = 0x5207;
/// `BLKFLSBUF`: `_IO(0x12, 97)`.
const BLK_FLUSH_BUFFERS: libc::c_ulong = 0x1261;
/// Bytes of fresh entropy taken in one call.
const ENTROPY_MAX: usize = 512;

/// The kernel's `struct rand_pool_info` with room for one call's bytes.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; ENTROPY_MAX],
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Time since boot, without what the machine slept.
pub(crate) fn monotonic() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid, writable timespec for the length of the call.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    if result != 0 {
        return Duration::ZERO;
    }
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// Lets the wall clock run faster or slower until it has made up for so many microseconds, in place of what
/// was left of an earlier call; 0: as fast as it is.
pub(crate) fn slew_clock(microseconds: i64) -> io::Result<()> {
    // SAFETY: the structure is plain numbers, for all of which zero is valid.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_OFFSET_SINGLESHOT;
    change.offset = microseconds;
    // SAFETY: the structure is valid and writable for the length of the call.
    check(unsafe { libc::adjtimex(&mut change) }).map(drop)
}

/// Moves the wall clock by so much at once.
pub(crate) fn step_clock(nanoseconds: i64) -> io::Result<()> {
    const SECOND: i64 = 1_000_000_000;
    // SAFETY: the structure is plain numbers, for all of which zero is valid.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    change.time.tv_sec = nanoseconds.div_euclid(SECOND);
    // With ADJ_NANO these are nanoseconds, and never negative.
    change.time.tv_usec = nanoseconds.rem_euclid(SECOND);
    // SAFETY: the structure is valid and writable for the length of the call.
    check(unsafe { libc::adjtimex(&mut change) }).map(drop)
}

/// Lets a running process of a container go on when there is work for the agent, up to its time slice:
/// a process that prints much then fills its pipe before the agent empties it. Children do not inherit.
pub(crate) fn be_patient() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    let policy = libc::SCHED_BATCH | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the parameters are valid for the length of the call.
    check(unsafe { libc::sched_setscheduler(0, policy, &parameters) }).map(drop)
}

/// Credits `bytes` to the kernel's generator, eight bits of entropy a byte.
pub(crate) fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    for chunk in bytes.chunks(ENTROPY_MAX) {
        let mut info = RandPoolInfo {
            entropy_count: (chunk.len() * 8) as libc::c_int,
            buf_size: chunk.len() as libc::c_int,
            buf: [0; ENTROPY_MAX],
        };
        info.buf[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: `info` has the layout of rand_pool_info and lives through the call, and
        // buf_size bytes of its buffer are initialised.
        check(unsafe { libc::ioctl(random.as_raw_fd(), RND_ADD_ENTROPY as _, &info) })?;
    }
    Ok(())
}

/// Makes the kernel's generator take its next bytes from the freshly credited pool.
pub(crate) fn reseed(random: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RND_RESEED_CRNG as _) }).map(drop)
}

/// Drops the kernel's cached pages and buffers of a block device.
pub(crate) fn flush_block_device(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), BLK_FLUSH_BUFFERS as _, 0) }).map(drop)
}

/// The kernel's `struct fsxattr` (`linux/fs.h`).
#[repr(C)]
struct FsXattr {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

/// Makes a directory, and what will be made in it, count for a project (`FS_IOC_FSSETXATTR`).
pub(crate) fn set_project(directory: BorrowedFd<'_>, project: u32) -> io::Result<()> {
    /// `_IOW('X', 32, struct fsxattr)`.
    const SET: libc::c_ulong = 0x401c_5820;
    /// `FS_XFLAG_PROJINHERIT`.
    const INHERIT: u32 = 0x200;
    let attributes = FsXattr {
        flags: INHERIT,
        extent_size: 0,
        extents: 0,
        project,
        cow_extent_size: 0,
        padding: [0; 8],
    };
    // SAFETY: the structure is the kernel's and lives through the call.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), SET as _, &attributes) }).map(drop)
}

/// Sets the most bytes that a project may use on a file system, by its device.
pub(crate) fn limit_project(device: &Path, project: u32, bytes: u64) -> io::Result<()> {
    /// Units of limits are 1 KiB.
    const UNIT: u64 = 1024;
    let limits = |quota: &mut libc::dqblk| {
        quota.dqb_bhardlimit = bytes / UNIT;
        quota.dqb_valid = libc::QIF_BLIMITS;
    };
    project_quota(libc::Q_SETQUOTA, device, project, limits).map(drop)
}

/// Bytes and inodes that a project uses on a file system, by its device.
pub(crate) fn project_usage(device: &Path, project: u32) -> io::Result<(u64, u64)> {
    let quota = project_quota(libc::Q_GETQUOTA, device, project, |_| {})?;
    Ok((quota.dqb_curspace, quota.dqb_curinodes))
}

/// quotactl(2), for a project.
fn project_quota(
    command: libc::c_int,
    device: &Path,
    project: u32,
    fill: impl FnOnce(&mut libc::dqblk),
) -> io::Result<libc::dqblk> {
    const PROJECT: libc::c_int = 2;
    let device = std::ffi::CString::new(device.as_os_str().as_encoded_bytes())?;
    // SAFETY: the structure is plain numbers, for all of which zero is valid.
    let mut quota: libc::dqblk = unsafe { std::mem::zeroed() };
    fill(&mut quota);
    let command = libc::QCMD(command, PROJECT);
    let id = libc::c_int::try_from(project).map_err(io::Error::other)?;
    let pointer = std::ptr::from_mut(&mut quota).cast();
    // SAFETY: the path is NUL-terminated and the structure lives through the call.
    check(unsafe { libc::quotactl(command, device.as_ptr(), id, pointer) })?;
    Ok(quota)
}

/// A call to the device mapper; `buffer` is a `struct dm_ioctl` and what follows it.
pub(crate) fn device_mapper(
    control: BorrowedFd<'_>,
    request: u8,
    buffer: &mut [u8],
) -> io::Result<()> {
    /// `_IOWR(0xfd, …, struct dm_ioctl)` of 312 bytes.
    const DEVICE_MAPPER: libc::c_ulong = 3 << 30 | 312 << 16 | 0xfd << 8;
    let request = DEVICE_MAPPER | libc::c_ulong::from(request);
    // SAFETY: the buffer is as long as the length within it says, which is all the kernel writes to.
    check(unsafe { libc::ioctl(control.as_raw_fd(), request as _, buffer.as_mut_ptr()) }).map(drop)
}

/// Sets a terminal's size, which signals its foreground process group.
pub(crate) fn set_window_size(pty: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` is a valid winsize for the length of the call.
    check(unsafe { libc::ioctl(pty.as_raw_fd(), libc::TIOCSWINSZ, &size) }).map(drop)
}

/// Loads a kernel module from an open file.
pub(crate) fn finit_module(module: &File, parameters: &CStr, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open and the parameters are a NUL-terminated string.
    let result = unsafe {
        libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), parameters.as_ptr(), flags)
    };
    check(result as libc::c_int).map(drop)
}

/// `openat2`: opens a path below `root`, with `resolve` (RESOLVE_*) fencing the way to it.
pub(crate) fn open_below(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: libc::c_int,
    mode: libc::mode_t,
    resolve: u64,
) -> io::Result<OwnedFd> {
    // SAFETY: open_how is plain data for which all zeroes is a valid value.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = resolve;
    let result = path.with_nix_path(|path| {
        // SAFETY: the path is NUL-terminated, `how` is valid and its size is passed along.
        unsafe {
            libc::syscall(
                libc::SYS_openat2,
                root.as_raw_fd(),
                path.as_ptr(),
                &how as *const libc::open_how,
                size_of::<libc::open_how>(),
            )
        }
    })?;
    let descriptor = check(result as libc::c_int)?;
    // SAFETY: the kernel just returned this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Reads into `buffer`; `EINTR` is retried.
pub(crate) fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::read(fd, buffer) {
            Err(nix::Error::EINTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

/// Reads into the unfilled part of `buffer` and marks what was read as filled.
pub(crate) fn read_buf(
    fd: BorrowedFd<'_>,
    buffer: &mut tokio::io::ReadBuf<'_>,
) -> io::Result<usize> {
    loop {
        // SAFETY: only bytes written by the kernel are marked as initialised below.
        let room = unsafe { buffer.unfilled_mut() };
        // SAFETY: the pointer and length describe writable memory that outlives the call.
        let count = unsafe { libc::read(fd.as_raw_fd(), room.as_mut_ptr().cast(), room.len()) };
        if count >= 0 {
            // SAFETY: the kernel wrote `count` bytes to the start of the unfilled part.
            unsafe { buffer.assume_init(count as usize) };
            buffer.advance(count as usize);
            return Ok(count as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Registers what owns a non-blocking descriptor with the event loop.
pub(crate) fn register<T: AsRawFd + Into<OwnedFd>>(
    fd: T,
    interest: Interest,
) -> io::Result<AsyncFd<T>> {
    // SAFETY: what turns into an OwnedFd owns its descriptor: open, and the same, while it lives.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// Sends a signal by number: real-time signals have no name.
pub(crate) fn kill(pid: nix::unistd::Pid, signal: libc::c_int) -> nix::Result<()> {
    // SAFETY: kill takes two integers.
    nix::errno::Errno::result(unsafe { libc::kill(pid.as_raw(), signal) }).map(drop)
}

/// Sets a descriptor's `O_NONBLOCK`.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GETFL takes no pointer.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    let flags = flags | libc::O_NONBLOCK;
    // SAFETY: F_SETFL takes an integer.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

/// Runs `child` in a new process and returns its id; the child never returns from here.
///
/// The agent has one thread, so the child may use the allocator and ordinary Rust; callers keep
/// that true (`main` asserts it).
pub(crate) fn fork(child: impl FnOnce() -> i32) -> io::Result<libc::pid_t> {
    // SAFETY: the process has a single thread, so no lock can be held by a thread that the child
    // lacks; the child leaves by _exit and runs no destructor of the parent's.
    let pid = check(unsafe { libc::fork() })?;
    if pid == 0 {
        let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101);
        // SAFETY: _exit never returns and touches no memory of ours.
        unsafe { libc::_exit(status) }
    }
    Ok(pid)
}

/// Forks with the child as the init of a new pid namespace; the child never returns from here.
///
/// The agent has one thread, so the child may use the allocator and ordinary Rust.
pub(crate) fn fork_pid_namespace(child: impl FnOnce() -> i32) -> io::Result<libc::pid_t> {
    let flags = libc::CLONE_NEWPID | libc::SIGCHLD;
    // SAFETY: without CLONE_VM and with no stack this is fork with a new pid namespace; a single
    // thread makes the C library's own preparations for fork unnecessary.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } as libc::c_int)?;
    if pid == 0 {
        let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101);
        // SAFETY: _exit never returns and touches no memory of ours.
        unsafe { libc::_exit(status) }
    }
    Ok(pid)
}

/// Closes every descriptor of the process but the standard three.
pub(crate) fn close_all_descriptors() {
    // SAFETY: used by children that own nothing they would still use through a descriptor.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

/// Makes `fd` the process's standard input, output and error.
pub(crate) fn use_as_console(fd: &impl AsFd) -> io::Result<()> {
    for target in 0..=2 {
        // SAFETY: both are open descriptor numbers; the standard three are not owned elsewhere.
        check(unsafe { libc::dup2(fd.as_fd().as_raw_fd(), target) })?;
    }
    Ok(())
}

/// Gives freed memory back to the kernel.
pub(crate) fn trim_heap() {
    // SAFETY: takes an integer, and may be called at any time.
    unsafe { libc::malloc_trim(0) };
}

/// Has large pieces of memory mapped and unmapped one by one, whatever was freed before (`M_MMAP_THRESHOLD` of
/// mallopt(3), which is the C library's own at first, and would grow).
pub(crate) fn map_large_memory() {
    // SAFETY: takes integers.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024) };
}

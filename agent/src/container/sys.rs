//! All `unsafe` of the container engine: system calls that `nix` does not offer, each behind a safe
//! function.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::NixPath;

/// The kernel's `struct mount_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MountAttr {
    /// Attributes to set, `MOUNT_ATTR_*`.
    pub(crate) set: u64,
    /// Attributes to clear.
    pub(crate) clear: u64,
    /// `MS_SHARED` and its kin, or 0 to leave the propagation alone.
    pub(crate) propagation: u64,
    /// Not used.
    pub(crate) userns_fd: u64,
}

/// The kernel's `struct sock_filter`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BpfInstruction {
    pub(crate) code: u16,
    pub(crate) jt: u8,
    pub(crate) jf: u8,
    pub(crate) k: u32,
}

/// The kernel's `struct bpf_insn`, as its eight bytes.
pub(crate) type EbpfInstruction = u64;

pub(crate) const OPEN_TREE_CLONE: u32 = 1;
pub(crate) const AT_RECURSIVE: u32 = 0x8000;
/// Wider than the `int` that the C library has for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const OPEN_TREE_CLOEXEC: u32 = libc::O_CLOEXEC as u32;
const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
/// `TIOCGPTPEER`: `_IO('T', 0x41)`.
const TIOCGPTPEER: libc::c_ulong = 0x5441;
const EMPTY: &CStr = c"";

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn new_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    let descriptor = check(result)? as RawFd;
    // SAFETY: every caller passes the result of a system call that returns a fresh descriptor,
    // which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// `clone3` as a fork: the child returns `None` and runs on a copy of the whole process.
///
/// `flags` are `CLONE_NEW*`; with `cgroup` the child is born in that cgroup. The caller must be
/// single-threaded: the child goes on with ordinary Rust, so no other thread may have held a lock.
pub(crate) fn fork(flags: libc::c_int, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Option<i32>> {
    // SAFETY: clone_args is plain data for which all zeroes is a valid value.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags as u32 as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM and with no stack this is a fork; the arguments are valid and their
    // size is passed. The agent has one thread, so the child's copy of every lock is free.
    let result = unsafe {
        libc::syscall(libc::SYS_clone3, &arguments as *const _, size_of::<libc::clone_args>())
    };
    Ok(match check(result)? {
        0 => None,
        pid => Some(pid as i32),
    })
}

/// Ends the process at once, without destructors or exit handlers: the end of every forked child.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: _exit does not return and touches nothing of the process.
    unsafe { libc::_exit(status) }
}

/// Closes every descriptor from `first` up.
pub(crate) fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: the child calls this on descriptors whose owners never run again in it.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) }).map(drop)
}

/// Marks every descriptor from `first` up as closed by exec.
pub(crate) fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: only a flag of the descriptors changes.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) }).map(drop)
}

/// `dup2` to a fixed number, which then survives exec.
pub(crate) fn duplicate_to(fd: RawFd, target: RawFd) -> io::Result<()> {
    // SAFETY: numbers only; the child owns its whole table.
    check(unsafe { libc::dup2(fd, target) }.into()).map(drop)
}

/// Takes over a descriptor that the caller put at this number with [`duplicate_to`].
pub(crate) fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: the child put its own duplicate at this number, and owns it alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// `openat2` with `resolve` (`RESOLVE_*`).
pub(crate) fn open_at2(
    directory: BorrowedFd<'_>,
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
    new_fd(path.with_nix_path(|path| {
        // SAFETY: the path is NUL-terminated, `how` is valid and its size is passed.
        unsafe {
            libc::syscall(
                libc::SYS_openat2,
                directory.as_raw_fd(),
                path.as_ptr(),
                &how as *const libc::open_how,
                size_of::<libc::open_how>(),
            )
        }
    })?)
}

/// Starts configuring a file system of type `kind`.
pub(crate) fn fs_open(kind: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the name is NUL-terminated.
    new_fd(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })
}

/// Sets one option of a file system under configuration; without a value, a flag.
pub(crate) fn fs_set(fs: BorrowedFd<'_>, key: &CStr, value: Option<&CStr>) -> io::Result<()> {
    let (command, value) = match value {
        Some(value) => (FSCONFIG_SET_STRING, value.as_ptr()),
        None => (FSCONFIG_SET_FLAG, std::ptr::null()),
    };
    let fs = fs.as_raw_fd();
    // SAFETY: key and value are NUL-terminated, or null where the command takes none.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fs, command, key.as_ptr(), value, 0) })
        .map(drop)
}

/// Creates the configured file system and a detached mount of it.
pub(crate) fn fs_mount(fs: BorrowedFd<'_>, attributes: u64) -> io::Result<OwnedFd> {
    let fs = fs.as_raw_fd();
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: the command takes neither key nor value.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, none, none, 0) })?;
    // SAFETY: descriptor and flags only.
    new_fd(unsafe { libc::syscall(libc::SYS_fsmount, fs, FSMOUNT_CLOEXEC, attributes as u32) })
}

/// A detached copy of the mount at `path` below `directory` (an empty path: `directory` itself).
pub(crate) fn clone_tree(
    directory: BorrowedFd<'_>,
    path: &Path,
    recursive: bool,
) -> io::Result<OwnedFd> {
    let mut flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as u32;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    new_fd(path.with_nix_path(|path| {
        // SAFETY: the path is NUL-terminated.
        unsafe { libc::syscall(libc::SYS_open_tree, directory.as_raw_fd(), path.as_ptr(), flags) }
    })?)
}

/// Attaches a detached mount on top of what `target` refers to.
pub(crate) fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both paths are empty and NUL-terminated, and the flags say so.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            EMPTY.as_ptr(),
            target.as_raw_fd(),
            EMPTY.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Changes the attributes of the mount that `mount` refers to.
pub(crate) fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    attributes: &MountAttr,
    recursive: bool,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH as u32 | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the attributes have the kernel's layout and their size is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            EMPTY.as_ptr(),
            flags,
            attributes as *const MountAttr,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// Opens the other end of a pseudo terminal, without a path that could lead elsewhere.
pub(crate) fn pty_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    let unlock: libc::c_int = 0;
    // SAFETY: `unlock` is a valid int for the length of the call.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlock) }.into())?;
    // SAFETY: the argument is an integer.
    new_fd(unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER as _, flags) }.into())
}

/// Sets a terminal's size.
pub(crate) fn set_window_size(pty: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` is a valid winsize for the length of the call.
    check(unsafe { libc::ioctl(pty.as_raw_fd(), libc::TIOCSWINSZ, &size) }.into()).map(drop)
}

/// Makes a terminal the session's controlling one.
pub(crate) fn take_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the argument is an integer.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }.into()).map(drop)
}

/// A descriptor of the given process.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    new_fd(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Borrows a descriptor that its owner in the parent's copy of the stack keeps open.
pub(crate) fn borrow(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: a forked child calls this for a descriptor whose owner never runs again in it.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// One of the process's own descriptors 0 to 2, which stay open until it ends.
pub(crate) fn standard(fd: RawFd) -> BorrowedFd<'static> {
    assert!((0..=2).contains(&fd), "{fd} is no standard descriptor");
    // SAFETY: a child has put its stdio there and never closes it.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Sets the thread's effective, permitted and inheritable capabilities.
pub(crate) fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let header: [u32; 2] = [CAPABILITY_VERSION_3, 0];
    let halves = |shift: u32| [effective, permitted, inheritable].map(|set| (set >> shift) as u32);
    let data: [[u32; 3]; 2] = [halves(0), halves(32)];
    // SAFETY: header and data have the layout of version 3: one header, two data elements.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// `prctl` with up to two integers.
pub(crate) fn process_control(option: libc::c_int, first: u64, second: u64) -> io::Result<i32> {
    // SAFETY: only options that take integers are used.
    let result = unsafe { libc::prctl(option, first, second, 0u64, 0u64) };
    check(result.into()).map(|value| value as i32)
}

/// Sets one resource limit by the kernel's number.
pub(crate) fn set_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the limit is valid for the length of the call, the old one is not asked for.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            &limit as *const libc::rlimit64,
            std::ptr::null_mut::<libc::rlimit64>(),
        )
    })
    .map(drop)
}

/// Sets the supplementary groups of this thread (the process has only one).
pub(crate) fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: pointer and length describe `groups`.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) }).map(drop)
}

/// Sets real, effective and saved group and then user.
pub(crate) fn set_user(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: integers only; the plain calls suffice because there is one thread.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }).map(drop)
}

/// Loads a seccomp filter for the whole process.
pub(crate) fn load_seccomp(program: &[BpfInstruction], flags: u32) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast::<libc::sock_filter>().cast_mut(),
    };
    // SAFETY: BpfInstruction has the layout of sock_filter, and the kernel only reads the program.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &program as *const libc::sock_fprog,
        )
    })
    .map(drop)
}

/// `execve`; returns only the reason why it failed.
pub(crate) fn exec(path: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end with a null and their strings live through the call.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Puts every signal back to its default action and unblocks all of them.
pub(crate) fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: the default action needs no handler; numbers that cannot be set are refused.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: sigset_t is plain data, emptied before use.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

/// Sets the process's execution domain.
pub(crate) fn set_personality(domain: libc::c_ulong) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::personality(domain) }.into()).map(drop)
}

/// Loads a `BPF_PROG_TYPE_CGROUP_DEVICE` program.
pub(crate) fn load_device_program(program: &[EbpfInstruction]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    #[repr(C)]
    struct Load {
        kind: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        rest: [u64; 14],
    }
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache".as_ptr() as u64,
        rest: [0; 14],
    };
    // SAFETY: `load` has the layout of the start of union bpf_attr with the rest zeroed, and the
    // buffers it names live through the call.
    new_fd(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &load as *const Load, size_of::<Load>())
    })
}

/// Attaches a device program to a cgroup.
pub(crate) fn attach_device_program(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let (cgroup, program) = (cgroup.as_raw_fd() as u32, program.as_raw_fd() as u32);
    let attributes: [u32; 4] = [cgroup, program, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI];
    // SAFETY: the four words are the whole of bpf_attr for this command.
    check(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, attributes.as_ptr(), size_of_val(&attributes))
    })
    .map(drop)
}

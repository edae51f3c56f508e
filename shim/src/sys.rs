//! The shim's unsafe code: what neither the standard library nor `nix` offers safely.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Which side of [`fork_into`] this is.
pub(crate) enum Forked {
    /// The new process.
    Child,
    /// The old one: the child's id, and a descriptor for it.
    Parent {
        /// Process id.
        pid: i32,
        /// Readable when the process has ended.
        pidfd: OwnedFd,
    },
}

/// Forks into new namespaces.
///
/// # Safety
/// The child runs in a copy of one thread of a process that may have others: until it executes
/// another program or exits it must not wait for a lock that another thread may hold.
pub(crate) unsafe fn fork_into(namespaces: i32) -> io::Result<Forked> {
    let mut pidfd: RawFd = -1;
    let flags = namespaces | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: without CLONE_VM and with no stack this is fork(2); the third argument is where the
    // kernel stores the pidfd, a live local.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone,
            flags as libc::c_ulong,
            0usize,
            &raw mut pidfd,
            0usize,
            0usize,
        )
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent {
            pid: i32::try_from(pid).unwrap_or(-1),
            // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

/// Places descriptors at fixed numbers, which the program to be executed then finds, and closes all
/// others but `keep`. For a forked child only.
pub(crate) fn place_descriptors(wanted: &[(RawFd, RawFd)], keep: RawFd) -> io::Result<()> {
    const ABOVE: RawFd = 200;
    const MANY: usize = 16;
    let mut moved = [(0, 0); MANY];
    let count = wanted.len().min(MANY);
    for (slot, (source, target)) in moved.iter_mut().zip(wanted) {
        // SAFETY: plain system call on numbers; a bad one is an error.
        let high = unsafe { libc::fcntl(*source, libc::F_DUPFD, ABOVE) };
        if high < 0 {
            return Err(io::Error::last_os_error());
        }
        *slot = (high, *target);
    }
    // SAFETY: as above; the child has no other user of descriptor numbers.
    unsafe {
        let report = libc::fcntl(keep, libc::F_DUPFD_CLOEXEC, ABOVE);
        if report < 0 || libc::dup3(report, REPORT_FD, libc::O_CLOEXEC) < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut present = [false; 20];
        for (high, target) in moved.iter().take(count) {
            if libc::dup2(*high, *target) < 0 {
                return Err(io::Error::last_os_error());
            }
            if let Some(flag) = present.get_mut(usize::try_from(*target).unwrap_or(usize::MAX)) {
                *flag = true;
            }
        }
        for (number, present) in present.iter().enumerate() {
            if !present && number != REPORT_FD as usize {
                libc::close(i32::try_from(number).unwrap_or(-1));
            }
        }
        if libc::syscall(libc::SYS_close_range, 20, u32::MAX, 0) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Where [`place_descriptors`] puts the descriptor on which a child reports.
pub(crate) const REPORT_FD: RawFd = 19;

/// Replaces the process; returns only with an error.
pub(crate) fn execute(program: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: all three are null-terminated and live until the call returns.
    unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Like [`execute`], with the file that a descriptor stands for.
pub(crate) fn execute_descriptor(
    program: RawFd,
    arguments: &[CString],
    environment: &[CString],
) -> io::Error {
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: as in [`execute`]; a bad number is an error.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program,
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Ends a forked child without running anything of the parent's.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process; no destructor or handler runs.
    unsafe { libc::_exit(code) }
}

/// Makes a descriptor of `/dev/net/tun` the tap `name` in the calling thread's network namespace.
pub(crate) fn make_tap(tun: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Chooses the interface index of the tap that [`make_tap`] is about to make of the descriptor.
pub(crate) fn set_tap_index(tun: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    // `_IOW('T', 218, unsigned int)`
    const TUNSETIFINDEX: libc::c_ulong = 0x4004_54DA;
    // SAFETY: the kernel reads one unsigned int, which lives until the call returns.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFINDEX, &raw const index) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a virtual machine with one processor that halts, and says why that does not work.
pub(crate) fn run_kvm_guest(kvm: BorrowedFd<'_>) -> Result<(), (&'static str, io::Error)> {
    const KVM_CREATE_VM: libc::c_ulong = 0xAE01;
    const KVM_GET_VCPU_MMAP_SIZE: libc::c_ulong = 0xAE04;
    const KVM_CREATE_VCPU: libc::c_ulong = 0xAE41;
    const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_AE46;
    const KVM_RUN: libc::c_ulong = 0xAE80;
    const KVM_SET_REGS: libc::c_ulong = 0x4090_AE82;
    const KVM_GET_SREGS: libc::c_ulong = 0x8138_AE83;
    const KVM_SET_SREGS: libc::c_ulong = 0x4138_AE84;
    const KVM_EXIT_HLT: u32 = 5;
    const PAGE: usize = 4096;

    let check = |step: &'static str, result: i32| {
        if result < 0 {
            return Err((step, io::Error::last_os_error()));
        }
        Ok(result)
    };
    // SAFETY: ioctls of KVM's documented interface on structures of the sizes in their numbers; the
    // mappings are checked, written within bounds, and live until the process ends (a short-lived
    // child), as do the descriptors.
    unsafe {
        let vm = check("creating a machine", libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0))?;
        let map = |fd: i32, length: usize, flags: i32| {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                fd,
                0,
            )
        };
        let memory = map(-1, PAGE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        if memory == libc::MAP_FAILED {
            return Err(("mapping memory", io::Error::last_os_error()));
        }
        memory.cast::<u8>().write(0xF4); // hlt
        // slot and flags, guest address, size, host address
        let region: [u64; 4] = [0, 0x1000, PAGE as u64, memory as u64];
        check("giving it memory", libc::ioctl(vm, KVM_SET_USER_MEMORY_REGION, region.as_ptr()))?;
        let cpu = check("creating a processor", libc::ioctl(vm, KVM_CREATE_VCPU, 0))?;
        let size = check(
            "sizing the processor's page",
            libc::ioctl(kvm.as_raw_fd(), KVM_GET_VCPU_MMAP_SIZE, 0),
        )?;
        let run = map(cpu, usize::try_from(size).unwrap_or(PAGE), libc::MAP_SHARED);
        if run == libc::MAP_FAILED {
            return Err(("mapping the processor", io::Error::last_os_error()));
        }
        let mut system = [0_u64; 39];
        check("reading registers", libc::ioctl(cpu, KVM_GET_SREGS, system.as_mut_ptr()))?;
        // Code segment: base 0, selector 0 (the low half of the word after base).
        system[0] = 0;
        system[1] &= !(0xFFFF << 32);
        check("setting segments", libc::ioctl(cpu, KVM_SET_SREGS, system.as_ptr()))?;
        let mut registers = [0_u64; 18];
        registers[16] = 0x1000; // instruction pointer
        registers[17] = 2; // flags: the bit that is always set
        check("setting registers", libc::ioctl(cpu, KVM_SET_REGS, registers.as_ptr()))?;
        check("running an instruction", libc::ioctl(cpu, KVM_RUN, 0))?;
        let reason = run.cast::<u8>().add(8).cast::<u32>().read_unaligned();
        if reason != KVM_EXIT_HLT {
            let what = format!("it ended with KVM's exit reason {reason} instead of a halt");
            return Err(("running an instruction", io::Error::other(what)));
        }
    }
    Ok(())
}

/// Takes a capability out of the bounding set; `EINVAL` when the kernel has no such capability.
pub(crate) fn drop_bounding(capability: u64) -> nix::Result<()> {
    // SAFETY: a system call on numbers.
    let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    nix::Error::result(result).map(drop)
}

/// From now on a change of the user id leaves the capabilities as they are (`SECBIT_NO_SETUID_FIXUP`).
pub(crate) fn keep_capabilities_with_user() -> nix::Result<()> {
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: a system call on numbers.
    let result = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0) };
    nix::Error::result(result).map(drop)
}

/// Has the kernel run a filter of system calls for this thread, and for those it will make.
pub(crate) fn set_seccomp_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel only reads the program, which is as long as it says.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes every descriptor from this number on, in a process that owns none of them yet.
pub(crate) fn close_from(first: libc::c_uint) -> io::Result<()> {
    // SAFETY: the caller has nothing open that anything relies on.
    let result = unsafe { libc::close_range(first, libc::c_uint::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes a mount and those below it read-only (mount_setattr(2)).
pub(crate) fn make_read_only(path: &std::path::Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is NUL-terminated, and the kernel reads as much of the structure as it is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Writes to a descriptor by its number, in a forked child that placed it there.
pub(crate) fn write_raw(fd: RawFd, bytes: &[u8]) {
    // SAFETY: the buffer is valid for its length; a bad descriptor is an error nobody could be told.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

/// A descriptor for the process `pid`, readable once it has ended (pidfd_open(2)).
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call without pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal to the process that a pidfd stands for, whoever has its number now
/// (pidfd_send_signal(2)).
pub(crate) fn pidfd_send_signal(
    pidfd: &OwnedFd,
    signal: nix::sys::signal::Signal,
) -> io::Result<()> {
    let (fd, signal) = (pidfd.as_raw_fd(), signal as libc::c_int);
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: without a siginfo the kernel makes the one of kill(2); no other pointer is passed.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, no_info, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Waits until `fd` is readable; `false` if `limit` passed first.
pub(crate) fn wait_readable(fd: &OwnedFd, limit: std::time::Duration) -> io::Result<bool> {
    use std::os::fd::AsFd as _;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let timeout = PollTimeout::try_from(limit).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, timeout)? > 0)
}

/// Forks the shim's server from the process that containerd waits for. `true` in the child, which
/// has left containerd's session and has nothing on its standard streams.
pub fn fork_server() -> io::Result<bool> {
    // SAFETY: called by `start` before any thread or runtime exists, so the child may run anything.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { .. } => Ok(false),
        nix::unistd::ForkResult::Child => {
            nix::unistd::setsid()?;
            let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
            for target in 0..=2 {
                // SAFETY: dup2 onto the standard streams, which this process owns alone.
                if unsafe { libc::dup2(null.as_raw_fd(), target) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(true)
        }
    }
}

/// Shows another command line for this process, in the memory of its own (proc(5), `cmdline`). What
/// does not fit is cut off. Call while no other thread reads the program's arguments.
pub(crate) fn set_command_line(text: &str) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 48 and 49, arg_start and arg_end; the name, in parentheses, may hold anything.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let mut bounds = fields.split_whitespace().skip(45).filter_map(|it| it.parse::<usize>().ok());
    let (Some(start), Some(end)) = (bounds.next(), bounds.next()) else { return };
    let Some(room) = end.checked_sub(start).filter(|room| start != 0 && *room > 1) else { return };
    let text = text.as_bytes().get(..text.len().min(room - 1)).unwrap_or_default();
    // SAFETY: the kernel put this program's arguments there, on its stack, writable and never freed;
    // `room` is their length. The standard library copies arguments before it gives them out.
    unsafe {
        let arguments = start as *mut u8;
        std::ptr::write_bytes(arguments, 0, room);
        std::ptr::copy_nonoverlapping(text.as_ptr(), arguments, text.len());
    }
}

/// Has the calling thread be run before all that is not as urgent, and in turn with what is, from now on; not what
/// it starts.
pub(crate) fn hurry() -> io::Result<()> {
    let lowest = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: plain numbers; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const lowest) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Fills `buffer` from the kernel's generator (getrandom(2)); waits only right after the host's boot.
pub(crate) fn random(buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        // SAFETY: pointer and length are those of a live, writable slice.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => filled += got,
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

/// The processor's time-stamp counter.
pub(crate) fn time_stamp() -> u64 {
    // SAFETY: every x86-64 processor has the instruction and Linux lets programs use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Sets a variable of this process's environment. Only while it has a single thread.
pub(crate) fn set_environment(name: &str, value: &std::path::Path) {
    // SAFETY: called by the forked server before its runtime exists, so nobody reads meanwhile.
    unsafe { std::env::set_var(name, value) }
}

//! What a process has besides memory, as the system calls that make it again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;

use super::script::{Row, Script};
use super::stopped::{Stopped, Thread};

/// Descriptors that are as they were whoever made them: /dev/null, /dev/null, a pipe.
const STANDARD: i32 = 3;

/// A descriptor's line of `/proc/PID/fdinfo` (proc_pid_fdinfo(5)).
struct Info(String);

impl Info {
    fn field(&self, name: &str) -> Option<&str> {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim())
    }

    fn number(&self, name: &str, radix: u32) -> io::Result<u64> {
        let text = self.field(name).unwrap_or_default();
        u64::from_str_radix(text, radix)
            .map_err(|_| io::Error::other(format!("{name} is {text:?}")))
    }
}

/// Makes its descriptors, beside those below `passed`, which are there already.
pub(super) fn descriptors(pid: i32, passed: i32, script: &mut Script) -> io::Result<Vec<Row>> {
    let mut links = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let number: i32 = entry.file_name().to_string_lossy().parse().map_err(io::Error::other)?;
        links.insert(number, fs::read_link(entry.path())?.to_string_lossy().into_owned());
    }
    let mut rows = Vec::new();
    let mut taken: BTreeSet<i32> = (0..passed).collect();
    for (number, link) in links {
        let info = Info(fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?);
        let flags = info.number("flags:", 8)?;
        if number < passed {
            if number >= STANDARD {
                let flags = flags & (libc::O_NONBLOCK | libc::O_ACCMODE) as u64;
                let arguments = [number as u64, libc::F_SETFL as u64, flags];
                rows.push(Row::new(libc::SYS_fcntl, &arguments, 0));
            }
            if link == "/dev/net/tun" {
                rows.extend(tap(number, script));
            }
            continue;
        }
        let lowest = (0..).find(|free| !taken.contains(free)).unwrap_or(number);
        rows.push(make(number, &link, &info, flags, script)?.giving(lowest as u64));
        if lowest != number {
            let close = flags & libc::O_CLOEXEC as u64;
            let arguments = [lowest as u64, number as u64, close];
            rows.push(Row::new(libc::SYS_dup3, &arguments, number as u64));
            rows.push(Row::new(libc::SYS_close, &[lowest as u64], 0));
        }
        taken.insert(number);
    }
    Ok(rows)
}

/// The call that makes a descriptor, which gets the lowest free number.
fn make(number: i32, link: &str, info: &Info, flags: u64, script: &mut Script) -> io::Result<Row> {
    // EFD_, SFD_ and EPOLL_ have the values of these.
    let options = flags & (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    Ok(match link {
        "anon_inode:[eventfd]" => {
            let count = info.number("eventfd-count:", 16)?;
            let semaphore = info.field("eventfd-semaphore:") == Some("1");
            Row::new(libc::SYS_eventfd2, &[count, options | u64::from(semaphore)], 0)
        }
        "anon_inode:[signalfd]" => {
            let mask = script.add(&info.number("sigmask:", 16)?.to_le_bytes());
            Row::new(libc::SYS_signalfd4, &[u64::MAX, mask, 8, options], 0)
        }
        "anon_inode:[eventpoll]" if info.field("tfd:").is_none() => {
            Row::new(libc::SYS_epoll_create1, &[options & libc::O_CLOEXEC as u64], 0)
        }
        // The file of the machine's memory, which is mapped and not read.
        "/" => Row::new(libc::SYS_dup, &[0], 0),
        _ => return Err(io::Error::other(format!("descriptor {number} is {link}"))),
    })
}

/// What QEMU asked of its tap: virtio's header of 12 bytes, no bound on what is under way, and all of
/// what its guest takes in large pieces, as far as the kernel knows of it.
fn tap(number: i32, script: &mut Script) -> Vec<Row> {
    const SET_HEADER: u64 = 0x4004_54d8;
    const SET_BUFFER: u64 = 0x4004_54d4;
    const SET_OFFLOAD: u64 = 0x4004_54d0;
    // CSUM, TSO4, TSO6, TSO_ECN; then UFO; then USO4 and USO6.
    const OFFLOADS: [u64; 3] = [0x0f, 0x1f, 0x7f];
    let ioctl = |request, value| Row::new(libc::SYS_ioctl, &[number as u64, request, value], 0);
    let (header, buffer) = (script.add(&12_i32.to_le_bytes()), script.add(&i32::MAX.to_le_bytes()));
    let mut rows = vec![ioctl(SET_HEADER, header), ioctl(SET_BUFFER, buffer)];
    rows.extend(OFFLOADS.map(|offloads| ioctl(SET_OFFLOAD, offloads).or_not()));
    rows
}

/// Where its heap ends, which the C library asks the kernel for, and its arguments are, for whoever looks at
/// it (prctl(2), `PR_SET_MM_MAP`).
pub(super) fn bounds(
    process: &Stopped,
    first: &Thread,
    script: &mut Script,
) -> io::Result<Vec<Row>> {
    const PR_SET_MM: u64 = 35;
    const PR_SET_MM_MAP: u64 = 14;
    /// Of proc_pid_stat(5), counted from the field after the name, `state`: code, data, start of the heap;
    /// stack, arguments, environment.
    const FIELDS: [usize; 10] = [23, 24, 42, 43, 44, 25, 45, 46, 47, 48];
    const HEAP: usize = 5;
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid))?;
    let fields: Vec<&str> =
        stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace().collect();
    let field = |at: usize| fields.get(at).and_then(|it| it.parse::<u64>().ok());
    let mut bounds: Vec<u64> = FIELDS.iter().filter_map(|at| field(*at)).collect();
    bounds.insert(HEAP.min(bounds.len()), process.call(first, libc::SYS_brk, [0; 4])?);
    let mut map: Vec<u8> = bounds.into_iter().flat_map(u64::to_le_bytes).collect();
    // No auxiliary vector, and the program stays what it is.
    map.extend([0; 12]);
    map.extend(u32::MAX.to_le_bytes());
    let size = map.len() as u64;
    let map = script.add(&map);
    Ok(vec![Row::new(libc::SYS_prctl, &[PR_SET_MM, PR_SET_MM_MAP, map, size, 0], 0)])
}

/// What it does about signals.
pub(super) fn signals(
    process: &Stopped,
    first: &Thread,
    script: &mut Script,
) -> io::Result<Vec<Row>> {
    /// `struct sigaction` of the kernel: handler, flags, restorer, mask.
    const SIZE: usize = 32;
    let mut rows = Vec::new();
    for signal in (1..=64).filter(|it| ![libc::SIGKILL, libc::SIGSTOP].contains(it)) {
        let (signal, at) = (signal as u64, first.scratch());
        process.call(first, libc::SYS_rt_sigaction, [signal, 0, at, 8])?;
        let mut action = [0; SIZE];
        process.read(at, &mut action)?;
        if action.iter().any(|byte| *byte != 0) {
            let action = script.add(&action);
            rows.push(Row::new(libc::SYS_rt_sigaction, &[signal, action, 0, 8], 0));
        }
    }
    Ok(rows)
}

/// The filters of its system calls, for all of its threads.
pub(super) fn filters(process: &Stopped, script: &mut Script) -> io::Result<Vec<Row>> {
    const SET_MODE_FILTER: u64 = 1;
    const ALL_THREADS: u64 = 1;
    let mut rows = Vec::new();
    for filter in process.filters()? {
        let length = filter.len() as u64 / 8;
        let code = script.add(&filter);
        let program = script.add(&[length, code].map(u64::to_le_bytes).concat());
        let arguments = [SET_MODE_FILTER, ALL_THREADS, program];
        rows.push(Row::new(libc::SYS_seccomp, &arguments, 0));
    }
    Ok(rows)
}

/// What a thread has of its own.
pub(super) fn thread(thread: &Thread, script: &mut Script) -> Vec<Row> {
    let (head, length) = thread.robust_list;
    let mut rows = vec![Row::new(libc::SYS_set_robust_list, &[head, length], 0)];
    if let Some(rseq) = &thread.rseq {
        let arguments = [rseq.address, rseq.size.into(), 0, rseq.signature.into()];
        rows.push(Row::new(libc::SYS_rseq, &arguments, 0).or_not());
    }
    let mut name = thread.name.clone().into_bytes();
    name.resize(16, 0);
    let name = script.add(&name);
    rows.push(Row::new(libc::SYS_prctl, &[libc::PR_SET_NAME as u64, name], 0));
    rows
}

/// The call that lets a thread go on: its registers and signal mask, in a frame as a signal handler
/// returns to (the kernel's `struct ucontext`).
pub(super) fn last(thread: &Thread, script: &mut Script) -> Row {
    const ALTERNATE_STACK_DISABLED: u64 = 2;
    /// The frame tells of SS, and means it.
    const FLAGS: u64 = 2 | 4;
    let floating_point = script.add(&thread.floating_point);
    let it = &thread.registers;
    let (mut rax, mut rip) = (it.rax, it.rip);
    // ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK: the call is made again.
    if [-512, -513, -514, -516].contains(&rax.cast_signed()) {
        (rax, rip) = (it.orig_rax, rip.wrapping_sub(2));
    }
    let segments = it.cs & 0xffff | (it.ss & 0xffff) << 48;
    let mut frame = vec![FLAGS, 0, 0, ALTERNATE_STACK_DISABLED, 0];
    frame.extend([it.r8, it.r9, it.r10, it.r11, it.r12, it.r13, it.r14, it.r15]);
    frame.extend([it.rdi, it.rsi, it.rbp, it.rbx, it.rdx, rax, it.rcx, it.rsp, rip, it.eflags]);
    frame.extend([segments, 0, 0, 0, 0, floating_point]);
    frame.extend([0; 8]);
    frame.push(thread.signal_mask);
    let bytes: Vec<u8> = frame.into_iter().flat_map(u64::to_le_bytes).collect();
    let frame = script.add(&bytes);
    Row::new(libc::SYS_rt_sigreturn, &[frame], 0)
}

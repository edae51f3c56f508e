//! The checkpoint's system calls, and the restorer's code.
#![allow(unsafe_code)]

use std::io;

use nix::unistd::Pid;

std::arch::global_asm!(include_str!("restore.s"));

unsafe extern "C" {
    static joey_restore_begin: u8;
    static joey_restore_table: u8;
    static joey_restore_end: u8;
}

/// The restorer's code, which runs anywhere, and where in it the address of its table belongs.
pub(super) fn restorer() -> (&'static [u8], usize) {
    // SAFETY: the three symbols are places in one piece of code, in this order.
    unsafe {
        let (begin, end) = (&raw const joey_restore_begin, &raw const joey_restore_end);
        let code = std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin));
        (code, (&raw const joey_restore_table).offset_from_unsigned(begin))
    }
}

const SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;

/// What a stopped thread is asked for (ptrace(2)).
#[derive(Clone, Copy)]
pub(super) enum Ask {
    /// 512 bytes in the layout of FXSAVE.
    FloatingPoint,
    /// 8 bytes.
    SignalMask,
    /// `struct ptrace_rseq_configuration`.
    Rseq,
    /// Instructions of 8 bytes of the filter with this number, the newest first; an empty buffer asks how
    /// many there are.
    Filter(usize),
}

/// Asks a stopped thread; the kernel's number. The buffer is as large as the answer or empty.
pub(super) fn ask(thread: Pid, what: Ask, answer: &mut [u8]) -> io::Result<usize> {
    let (request, address, size) = match what {
        Ask::FloatingPoint => (libc::PTRACE_GETFPREGS, 0, 512),
        Ask::SignalMask => (libc::PTRACE_GETSIGMASK, 8, 8),
        Ask::Rseq => (GET_RSEQ_CONFIGURATION, answer.len(), answer.len()),
        Ask::Filter(number) => (SECCOMP_GET_FILTER, number, 0),
    };
    if answer.len() < size {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let data = if answer.is_empty() { std::ptr::null_mut() } else { answer.as_mut_ptr() };
    // SAFETY: the kernel writes no more than the sizes checked above; a filter is asked for with room for
    // as many instructions as the kernel said there are, while the thread is stopped and cannot change it.
    let result = unsafe { libc::ptrace(request, thread.as_raw(), address, data) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Address and length of the list of a thread's robust mutexes (get_robust_list(2)).
pub(super) fn robust_list(thread: Pid) -> io::Result<(u64, u64)> {
    let (mut head, mut length) = (0_u64, 0_u64);
    // SAFETY: the kernel writes one word to each.
    let result = unsafe {
        libc::syscall(libc::SYS_get_robust_list, thread.as_raw(), &raw mut head, &raw mut length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok((head, length)) }
}

//! What the process that answers for a share may ask of the kernel, once it is ready: what is done with files that
//! it can reach, and what threads and memory take. Nothing else: no sockets, processes, signals or mounts.

use std::io;

use libc::{c_long, sock_filter};

use crate::sys;

/// Instructions of classic BPF (linux/bpf_common.h).
const LOAD_WORD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// Where `struct seccomp_data` has the call's number and the architecture.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// linux/audit.h.
#[cfg(target_arch = "x86_64")]
const OWN: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const OWN: u32 = 0xc000_00b7;

const ALLOWED: [c_long; 88] = [
    // The socket, which is there already.
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    // Content.
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_copy_file_range,
    // Names and attributes.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_getdents64,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_statfs,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_umask,
    libc::SYS_getxattr,
    libc::SYS_fgetxattr,
    libc::SYS_setxattr,
    libc::SYS_fsetxattr,
    libc::SYS_listxattr,
    libc::SYS_flistxattr,
    libc::SYS_removexattr,
    libc::SYS_fremovexattr,
    libc::SYS_name_to_handle_at,
    // Whose a new file is.
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_getuid,
    libc::SYS_getgid,
    libc::SYS_geteuid,
    libc::SYS_getegid,
    libc::SYS_getpid,
    libc::SYS_gettid,
    // Threads, memory and time.
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_futex,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
];

/// Holds this process, and the threads it will have, to [`ALLOWED`]; any other call fails with `EPERM`.
pub(super) fn restrict() -> io::Result<()> {
    sys::set_seccomp_filter(&program())
}

fn program() -> Vec<sock_filter> {
    let then = |code, k| sock_filter { code, jt: 0, jf: 0, k };
    let refuse = then(RETURN, libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs());
    let allow = then(RETURN, libc::SECCOMP_RET_ALLOW);
    let mut program = vec![
        then(LOAD_WORD, ARCHITECTURE),
        sock_filter { code: JUMP_EQUAL, jt: 1, jf: 0, k: OWN },
        refuse,
        then(LOAD_WORD, NUMBER),
    ];
    // A pair each: no jump is long.
    for number in ALLOWED.iter().filter_map(|number| u32::try_from(*number).ok()) {
        program.push(sock_filter { code: JUMP_EQUAL, jt: 0, jf: 1, k: number });
        program.push(allow);
    }
    program.push(refuse);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would do with a call.
    fn run(architecture: u32, number: u32) -> u32 {
        let program = program();
        let (mut at, mut word) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            match step.code {
                LOAD_WORD if step.k == NUMBER => word = number,
                LOAD_WORD => word = architecture,
                JUMP_EQUAL => at += usize::from(if word == step.k { step.jt } else { step.jf }),
                _ => return step.k,
            }
        }
    }

    #[test]
    fn only_what_is_listed_is_allowed() {
        let call = |number: c_long| run(OWN, u32::try_from(number).unwrap());
        for number in ALLOWED {
            assert_eq!(call(number), libc::SECCOMP_RET_ALLOW, "{number}");
            assert_ne!(run(OWN ^ 1, u32::try_from(number).unwrap()), libc::SECCOMP_RET_ALLOW);
        }
        for number in [libc::SYS_socket, libc::SYS_kill, libc::SYS_execve, libc::SYS_mount] {
            assert_eq!(call(number), libc::SECCOMP_RET_ERRNO | 1, "{number}");
        }
        // The same number of the x32 ABI.
        assert_eq!(run(OWN, 0x4000_0000), libc::SECCOMP_RET_ERRNO | 1);
    }
}

//! A process that was stopped, and what the kernel knows of its threads.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;

use libc::user_regs_struct as Registers;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::sys::{self, Ask};

/// `syscall`.
const SYSTEM_CALL: [u8; 2] = [0x0f, 0x05];
/// Free stack below what a function may use without telling (the red zone of the ABI is 128 bytes).
const SCRATCH: u64 = 4096;

/// A process of which every thread is stopped. It goes on when this is dropped.
pub(super) struct Stopped {
    pub(super) pid: i32,
    ids: Vec<Pid>,
    memory: File,
}

/// A thread of it.
pub(super) struct Thread {
    id: Pid,
    /// Its number in its own PID namespace.
    pub(super) number: u64,
    pub(super) name: String,
    pub(super) registers: Registers,
    pub(super) floating_point: Vec<u8>,
    pub(super) signal_mask: u64,
    pub(super) robust_list: (u64, u64),
    pub(super) rseq: Option<Rseq>,
    /// Where the kernel writes a zero at its end.
    pub(super) clear_at_end: u64,
}

/// A thread's area of restartable sequences (rseq(2)).
pub(super) struct Rseq {
    pub(super) address: u64,
    pub(super) size: u32,
    pub(super) signature: u32,
}

fn stop(thread: Pid) -> io::Result<()> {
    ptrace::seize(thread, ptrace::Options::empty())?;
    ptrace::interrupt(thread)?;
    wait(thread)
}

fn wait(thread: Pid) -> io::Result<()> {
    match waitpid(thread, Some(WaitPidFlag::__WALL))? {
        WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) | WaitStatus::PtraceSyscall(_) => {
            Ok(())
        }
        other => Err(io::Error::other(format!("thread {thread} did not stop: {other:?}"))),
    }
}

fn threads(pid: i32) -> io::Result<Vec<Pid>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let number = entry?.file_name().to_string_lossy().parse().map_err(io::Error::other)?;
        all.push(Pid::from_raw(number));
    }
    all.sort();
    Ok(all)
}

impl Stopped {
    /// Stops a process, of which the caller must be allowed to trace every thread.
    pub(super) fn new(pid: i32) -> io::Result<Self> {
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        let mut stopped = Self { pid, ids: Vec::new(), memory };
        // A thread that still ran may have made another.
        while let Some(id) = threads(pid)?.into_iter().find(|id| !stopped.ids.contains(id)) {
            stop(id)?;
            stopped.ids.push(id);
        }
        Ok(stopped)
    }

    /// Its threads by their numbers, so that its own is the first.
    pub(super) fn threads(&self) -> io::Result<Vec<Thread>> {
        let mut all: Vec<_> =
            self.ids.iter().map(|id| self.thread(*id)).collect::<io::Result<_>>()?;
        all.sort_by_key(|thread| thread.number);
        Ok(all)
    }

    fn thread(&self, id: Pid) -> io::Result<Thread> {
        let registers = ptrace::getregs(id)?;
        let mut floating_point = vec![0; 512];
        sys::ask(id, Ask::FloatingPoint, &mut floating_point)?;
        let mut mask = [0; 8];
        sys::ask(id, Ask::SignalMask, &mut mask)?;
        let folder = format!("/proc/{}/task/{id}", self.pid);
        let name = fs::read_to_string(format!("{folder}/comm"))?.trim_end().to_owned();
        let status = fs::read_to_string(format!("{folder}/status"))?;
        let number = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        let number = number.and_then(|line| line.split_whitespace().last()?.parse().ok());
        let mut thread = Thread {
            id,
            number: number.ok_or_else(|| io::Error::other("its status has no NSpid"))?,
            name,
            registers,
            floating_point,
            signal_mask: u64::from_ne_bytes(mask),
            robust_list: sys::robust_list(id)?,
            rseq: rseq(id)?,
            clear_at_end: 0,
        };
        let at = thread.scratch();
        self.call(&thread, libc::SYS_prctl, [PR_GET_TID_ADDRESS, at, 0, 0])?;
        let mut address = [0; 8];
        self.read(at, &mut address)?;
        thread.clear_at_end = u64::from_ne_bytes(address);
        Ok(thread)
    }

    /// Has a thread make a system call, and be as before.
    pub(super) fn call(
        &self,
        thread: &Thread,
        number: i64,
        [rdi, rsi, rdx, r10]: [u64; 4],
    ) -> io::Result<u64> {
        // It was stopped in a system call.
        let place = thread.registers.rip.wrapping_sub(2);
        let mut code = [0; 2];
        self.read(place, &mut code)?;
        if code != SYSTEM_CALL {
            let problem = format!("thread {} ({}) was not waiting", thread.id, thread.name);
            return Err(io::Error::other(problem));
        }
        let registers = Registers {
            rax: number.cast_unsigned(),
            orig_rax: u64::MAX,
            rip: place,
            rdi,
            rsi,
            rdx,
            r10,
            ..thread.registers
        };
        ptrace::setregs(thread.id, registers)?;
        ptrace::step(thread.id, None)?;
        wait(thread.id)?;
        let result = ptrace::getregs(thread.id)?.rax.cast_signed();
        ptrace::setregs(thread.id, thread.registers)?;
        match i32::try_from(result) {
            Ok(error @ -4095..=-1) => Err(io::Error::from_raw_os_error(-error)),
            _ => Ok(result.cast_unsigned()),
        }
    }

    /// Reads its memory.
    pub(super) fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(buffer, at)
    }

    /// The filters of its system calls, each as instructions, the oldest first.
    pub(super) fn filters(&self) -> io::Result<Vec<Vec<u8>>> {
        let thread = Pid::from_raw(self.pid);
        let mut all = Vec::new();
        loop {
            let count = match sys::ask(thread, Ask::Filter(all.len()), &mut []) {
                Ok(count) => count,
                // No more; none at all.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
                    break;
                }
                Err(error) => return Err(error),
            };
            let mut filter = vec![0; count * 8];
            sys::ask(thread, Ask::Filter(all.len()), &mut filter)?;
            all.push(filter);
        }
        all.reverse();
        Ok(all)
    }
}

impl Thread {
    /// Memory that it does not use.
    pub(super) fn scratch(&self) -> u64 {
        (self.registers.rsp - SCRATCH) & !15
    }
}

fn rseq(thread: Pid) -> io::Result<Option<Rseq>> {
    let mut answer = [0; 24];
    sys::ask(thread, Ask::Rseq, &mut answer)?;
    let mut words =
        answer.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap_or_default()));
    let mut word = || words.next().unwrap_or_default();
    let address = u64::from(word()) | u64::from(word()) << 32;
    let (size, signature) = (word(), word());
    Ok((address != 0).then_some(Rseq { address, size, signature }))
}

/// Where a thread's `set_tid_address` points (prctl(2)).
const PR_GET_TID_ADDRESS: u64 = 40;

impl Drop for Stopped {
    fn drop(&mut self) {
        for id in &self.ids {
            let _ = ptrace::detach(*id, None);
        }
    }
}

//! A checkpoint: a process made into a program that continues it, any number of times, side by side.
//!
//! ```text
//!   stopped process ── take ──▶ file: header │ memory … │ restorer, table of system calls
//!   execve(file) ─▶ restorer: map the memory, make descriptors and threads, rt_sigreturn ─▶ it goes on
//! ```
//!
//! What such processes have not written is the file's, and so in the node's memory once. That is the point:
//! a VMM under software emulation holds tens of megabytes of translated code, and milliseconds of work
//! to start, all of it the same in each clone (decision 0009). CRIU (criu.org) restores processes in the
//! same way, but copies their memory.
//!
//! Only what QEMU's process is made of is understood; anything else is refused by name. The kernel must be
//! the one on which the checkpoint was taken, as the layout of its vDSO is part of it.

mod memory;
mod resources;
mod script;
mod stopped;
mod sys;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;

use nix::unistd::Pid;

use self::memory::{copy, mappings};
use self::script::{BASE, PAGE, ROOM, Row, Script};
use self::stopped::Stopped;

/// Where the restored process finds its own file while it is being made, apart from all its others.
const SOURCE: u64 = 1000;
/// Where the kernel's mappings wait until their place is free: below the restorer.
const ASIDE: u64 = 0x0800_0000;
/// End of what a process can map.
const TOP: u64 = 0x7fff_ffff_f000;

/// Writes a checkpoint of the process `pid` to an empty file, which is to be executed with itself as the
/// descriptor `passed`; those below are the new process's own, as the old one had them. The process must
/// be at rest. It is left running.
///
/// # Errors
/// The process has something that is not understood, or the kernel does not let itself be asked.
pub(crate) fn take(pid: i32, passed: i32, file: &File) -> io::Result<()> {
    let process = Stopped::new(pid)?;
    let threads = process.threads()?;
    let (first, others) =
        threads.split_first().ok_or_else(|| io::Error::other("it has no threads"))?;
    let mut script = Script::new();
    let mut rows = Vec::new();
    let (kernels, own): (Vec<_>, Vec<_>) =
        mappings(pid)?.into_iter().filter(|it| !it.is_fixed()).partition(|it| it.is_kernels());
    if own.iter().any(|it| it.start < BASE + ROOM) {
        return Err(io::Error::other("its memory is where the restorer belongs"));
    }
    // The kernel's own mappings, which it put anywhere, go where the process knows them; all else is unmapped.
    let vdso = kernels.iter().find(|it| it.is_vdso()).map_or(0, |it| it.start);
    let moving = |from, length, to| {
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        Row::new(libc::SYS_mremap, &[from, length, length, flags, to], to)
    };
    let lowest = kernels.iter().map(|it| it.start).min().unwrap_or_default();
    for it in &kernels {
        let aside = ASIDE + (it.start - lowest);
        rows.push(moving(it.start.wrapping_sub(vdso), it.end - it.start, aside).relative_to_vdso());
    }
    let free = BASE + ROOM;
    rows.push(Row::new(libc::SYS_munmap, &[free, TOP - free], 0));
    for it in &kernels {
        rows.push(moving(ASIDE + (it.start - lowest), it.end - it.start, it.start));
    }
    // The memory, from a descriptor that is then closed.
    let source = passed as u64;
    rows.push(Row::new(libc::SYS_fcntl, &[source, libc::F_DUPFD as u64, SOURCE], SOURCE));
    rows.push(Row::new(libc::SYS_close, &[source], 0));
    let (maps, end) = copy(&process, &own, file, PAGE, SOURCE)?;
    rows.extend(maps);
    rows.push(Row::new(libc::SYS_close, &[SOURCE], 0));
    // What is the process's, then the threads, which wait as they did; the filters are for all of them.
    rows.extend(resources::descriptors(pid, passed, &mut script)?);
    rows.extend(resources::bounds(&process, first, &mut script)?);
    rows.extend(resources::signals(&process, first, &mut script)?);
    rows.push(Row::new(libc::SYS_arch_prctl, &[ARCH_SET_FS, first.registers.fs_base], 0));
    let mark = Row::new(libc::SYS_set_tid_address, &[first.clear_at_end], first.number);
    rows.push(mark.or_not());
    for thread in others {
        let mut calls = resources::thread(thread, &mut script);
        calls.push(resources::last(thread, &mut script));
        let table = script.table(&calls);
        let tls = thread.registers.fs_base;
        let arguments = [THREAD as u64, table, 0, thread.clear_at_end, tls];
        rows.push(Row::new(libc::SYS_clone, &arguments, thread.number));
    }
    rows.extend(resources::filters(&process, &mut script)?);
    rows.extend(resources::thread(first, &mut script));
    rows.push(resources::last(first, &mut script));
    let table = script.table(&rows);
    script.write(file, end, table)
}

const ARCH_SET_FS: u64 = 0x1002;
/// As pthread_create(3) makes threads, whose own structures are in memory already.
const THREAD: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_CHILD_CLEARTID;

/// How many threads a process has.
pub(crate) fn threads(pid: i32) -> io::Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{}/task", Pid::from_raw(pid)))?.count())
}

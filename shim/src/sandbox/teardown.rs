//! The one undo of a sandbox: after a failed start, on stop, and from `delete` after a crash.
//!
//! It works from the [`Record`] alone and may run any number of times: what is gone is fine. Every
//! step is tried even if another failed; the record stays until all have succeeded, so that the next
//! run knows what is left.

use std::io;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::record::{Record, directory};
use crate::host::cgroup;
use crate::host::net::Wire;
use crate::sys;

/// How long killed processes may take to end: the kernel may have memory to free.
const PATIENCE: Duration = Duration::from_secs(10);

/// Something that could not be undone.
#[derive(Debug, thiserror::Error)]
#[error("sandbox {id}: clean-up incomplete: {}; run `joey ps` and remove the pod again", .left.join("; "))]
pub struct Incomplete {
    /// The sandbox.
    pub id: String,
    /// What is left, and why.
    pub left: Vec<String>,
}

/// Kills one process and waits until it has ended.
fn end(pid: u32) -> io::Result<()> {
    let Ok(raw) = i32::try_from(pid) else { return Ok(()) };
    let pidfd = match sys::pidfd_open(raw) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        other => other?,
    };
    match kill(Pid::from_raw(raw), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => return Err(error.into()),
    }
    if sys::wait_readable(&pidfd, PATIENCE)? {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::TimedOut, "still there after SIGKILL"))
    }
}

/// Ends every process of the sandbox but this one: the VMM, and a shim that still runs when `delete`
/// is called in its stead.
fn end_processes(record: &Record, left: &mut Vec<String>) {
    let me = std::process::id();
    let known = [record.vmm, record.shim].into_iter().flatten().filter(|process| process.alive());
    let pids = known.map(|process| process.pid).chain(cgroup::processes(&record.cgroups));
    for pid in pids.filter(|pid| *pid != me) {
        if let Err(error) = end(pid) {
            left.push(format!("process {pid}: {error}"));
        }
    }
}

/// Undoes everything that `record` names; the run directory goes last.
///
/// # Errors
/// [`Incomplete`] lists what is left.
pub fn undo(run_dir: &Path, record: &Record) -> Result<(), Incomplete> {
    let mut left = Vec::new();
    end_processes(record, &mut left);
    if let Some(netns) = &record.netns
        && let Err(error) = Wire::unplug(netns)
    {
        left.push(format!("wire in {}: {error}", netns.display()));
    }
    if let Err(error) = cgroup::remove(&record.cgroups) {
        left.push(error.to_string());
    }
    remove(&record.socket, |path| std::fs::remove_file(path), &mut left);
    if left.is_empty() {
        remove(&directory(run_dir, &record.id), |path| std::fs::remove_dir_all(path), &mut left);
    }
    if left.is_empty() { Ok(()) } else { Err(Incomplete { id: record.id.clone(), left }) }
}

fn remove(path: &Path, how: impl FnOnce(&Path) -> io::Result<()>, left: &mut Vec<String>) {
    if path.as_os_str().is_empty() {
        return;
    }
    match how(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            left.push(format!("{}: {error}", path.display()));
        }
        _ => {}
    }
}

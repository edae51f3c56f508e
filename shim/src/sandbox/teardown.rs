//! The one undo of a sandbox: after a failed start, on stop, and from `delete` after a crash.
//!
//! It works from the [`Record`] alone and may run any number of times: what is gone is fine. Every
//! step is tried even if another failed; the record stays until all have succeeded, so that the next
//! run knows what is left.

use std::io;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::record::{Record, directory};
use crate::failpoint;
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

/// Whether a system call's answer is that there is no such process.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH)
}

/// Kills one process and waits until it has ended. `is_meant` is asked once the process is held by a
/// descriptor: from then on the number may go to another process, the signal may not.
fn end(pid: u32, is_meant: impl FnOnce() -> bool) -> io::Result<()> {
    let Ok(raw) = i32::try_from(pid) else { return Ok(()) };
    let pidfd = match sys::pidfd_open(raw) {
        Err(error) if is_gone(&error) => return Ok(()),
        other => other?,
    };
    if !is_meant() {
        return Ok(());
    }
    match sys::pidfd_send_signal(&pidfd, Signal::SIGKILL) {
        Err(error) if !is_gone(&error) => return Err(error),
        _ => {}
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
    let mut note = |pid: u32, ended: io::Result<()>| {
        if let Err(error) = ended {
            left.push(format!("process {pid}: {error}"));
        }
    };
    for process in [record.vmm, record.shim].into_iter().flatten().filter(|it| it.pid != me) {
        note(process.pid, end(process.pid, || process.alive()));
    }
    let in_cgroups = || cgroup::processes(&record.cgroups);
    for pid in in_cgroups().into_iter().filter(|pid| *pid != me) {
        note(pid, end(pid, || in_cgroups().contains(&pid)));
    }
}

/// Undoes everything that `record` names; the run directory goes last.
///
/// # Errors
/// [`Incomplete`] lists what is left.
pub fn undo(run_dir: &Path, record: &Record) -> Result<(), Incomplete> {
    release(run_dir, record)?;
    let mut left = Vec::new();
    failpoint::hold(run_dir, "teardown.directory");
    remove(&directory(run_dir, &record.id), |path| std::fs::remove_dir_all(path), &mut left);
    if left.is_empty() { Ok(()) } else { Err(Incomplete { id: record.id.clone(), left }) }
}

/// Undoes all but the run directory: for a shim that stays, and is to be found by its record.
///
/// # Errors
/// [`Incomplete`] lists what is left.
pub fn release(run_dir: &Path, record: &Record) -> Result<(), Incomplete> {
    let mut left = Vec::new();
    failpoint::hold(run_dir, "teardown.processes");
    end_processes(record, &mut left);
    failpoint::hold(run_dir, "teardown.wire");
    if let Some(netns) = &record.netns
        && let Err(error) = Wire::unplug(netns)
    {
        left.push(format!("wire in {}: {error}", netns.display()));
    }
    failpoint::hold(run_dir, "teardown.policy");
    // Only once nobody and nothing speaks for it any more: the next pod gets its number.
    if let Some(place) = record.network.as_ref().filter(|_| left.is_empty())
        && let Err(error) = Wire::dismiss(place)
    {
        left.push(format!("place in the node's policy: {error}"));
    }
    failpoint::hold(run_dir, "teardown.cgroups");
    if let Err(error) = cgroup::remove(&record.cgroups) {
        left.push(error.to_string());
    }
    remove(&record.socket, |path| std::fs::remove_file(path), &mut left);
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

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::super::record::ProcessId;
    use super::*;

    #[test]
    fn only_the_recorded_process_is_killed_not_a_later_one_of_its_number() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        let earlier = ProcessId { start: process.start - 1, ..process };
        let mut left = Vec::new();
        end_processes(&Record { vmm: Some(earlier), ..Record::default() }, &mut left);
        assert!(child.try_wait().unwrap().is_none());
        end_processes(&Record { vmm: Some(process), ..Record::default() }, &mut left);
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        end_processes(&Record { vmm: Some(process), ..Record::default() }, &mut left);
        assert_eq!(left, [""; 0]);
    }
}

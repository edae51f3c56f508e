//! Which accelerator this node has, found by trying: `/dev/kvm` may exist where guests do not run.
//!
//! A child process makes a machine that halts at once. It has a deadline, since a broken KVM may hang.
//! The result is kept in the run directory, a tmpfs, and so lasts until the node boots again.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::sys::{self, Forked};

const DEADLINE: Duration = Duration::from_secs(3);
const DEVICE: &str = "/dev/kvm";

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acceleration {
    /// Whether KVM runs guests here.
    pub kvm: bool,
    /// Why not, or that it does.
    pub reason: String,
    /// Under software emulation the guest reads the host's time-stamp counter, and finding its speed
    /// out by itself takes longer than its kernel waits on a busy node: so it is told, in kHz.
    pub tsc_khz: Option<u64>,
    /// The processor's model and abilities: what a machine has seen of them it remembers.
    pub processor: String,
}

impl Acceleration {
    /// `kvm` or `tcg`.
    pub fn name(&self) -> &'static str {
        if self.kvm { "kvm" } else { "tcg" }
    }

    /// All that a guest which has booted depends on: a template's disk may come to another node.
    pub(crate) fn identity(&self) -> String {
        // The speed as far as it is the same at each measurement.
        let mhz = self.tsc_khz.map(|khz| (khz + 5_000) / 10_000 * 10);
        // A checkpoint is of one kernel.
        let kernel = (!self.kvm).then(nix::sys::utsname::uname).and_then(Result::ok);
        let kernel = kernel.map(|it| (it.release().to_owned(), it.version().to_owned()));
        format!("{} {mhz:?} {} {kernel:?}", self.name(), self.processor)
    }
}

/// The accelerator of this node; probes at most once per boot of the node.
pub fn probe(run_dir: &Path) -> Acceleration {
    let path = run_dir.join("accelerator.json");
    if let Some(known) = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
        return known;
    }
    let found = probe_now();
    if !found.kvm {
        tracing::warn!(
            "KVM is not usable on this node ({}): sandboxes run in software emulation, which is \
             slower and a weaker boundary",
            found.reason
        );
    }
    if let Err(error) = keep(&path, &found) {
        tracing::warn!("keeping the accelerator's probe in {}: {error}", path.display());
    }
    found
}

fn keep(path: &Path, found: &Acceleration) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let temporary = path.with_extension(format!("{}", std::process::id()));
    fs::write(&temporary, serde_json::to_vec(found)?)?;
    fs::rename(temporary, path)
}

/// Probes without looking at what is known.
pub fn probe_now() -> Acceleration {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = |name| cpuinfo.lines().find(|line: &&str| line.starts_with(name));
    let processor = ["vendor_id", "model name", "flags"].map(|name| line(name).unwrap_or_default());
    let processor = processor.join("\n");
    match try_kvm(line("flags").unwrap_or_default()) {
        Ok(()) => {
            let reason = "a trial guest ran".to_owned();
            Acceleration { kvm: true, reason, tsc_khz: None, processor }
        }
        Err(reason) => Acceleration { kvm: false, reason, tsc_khz: Some(tsc_khz()), processor },
    }
}

/// Speed of the time-stamp counter against the monotonic clock: 100 ms give it to a few parts in a
/// million.
fn tsc_khz() -> u64 {
    let (begun, from) = (std::time::Instant::now(), sys::time_stamp());
    std::thread::sleep(Duration::from_millis(100));
    let (took, ticks) = (begun.elapsed(), sys::time_stamp().wrapping_sub(from));
    let khz = u128::from(ticks) * 1_000_000 / took.as_nanos().max(1);
    u64::try_from(khz).unwrap_or(0)
}

fn try_kvm(flags: &str) -> Result<(), String> {
    if !flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        return Err("the processor offers no virtualization (no vmx or svm flag)".to_owned());
    }
    let kvm = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(|error| format!("{DEVICE}: {error}"))?;
    let (answer, report) = std::io::pipe().map_err(|error| format!("pipe: {error}"))?;
    // SAFETY of the child: it makes system calls on its own stack, formats one short text and exits.
    #[allow(unsafe_code)]
    // SAFETY: see above; the shim has one thread when it probes.
    let forked = unsafe { sys::fork_into(0) }.map_err(|error| format!("fork: {error}"))?;
    match forked {
        Forked::Child => {
            let mut report = report;
            let text = match sys::run_kvm_guest(kvm.as_fd()) {
                Ok(()) => "ok".to_owned(),
                Err((step, error)) => format!("{DEVICE}: {step}: {error}"),
            };
            let _ = report.write_all(text.as_bytes());
            sys::exit_now(0)
        }
        Forked::Parent { pid, pidfd } => {
            drop(report);
            wait_for_trial(pid, &pidfd, answer)
        }
    }
}

fn wait_for_trial(
    pid: i32,
    pidfd: &OwnedFd,
    mut answer: std::io::PipeReader,
) -> Result<(), String> {
    let mut wait = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(DEADLINE).unwrap_or(PollTimeout::MAX);
    let ended = poll(&mut wait, limit).is_ok_and(|ready| ready > 0);
    if !ended {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = waitpid(Pid::from_raw(pid), None);
    if !ended {
        return Err(format!("{DEVICE}: a trial guest did not end within {DEADLINE:?}"));
    }
    let mut text = String::new();
    let _ = answer.read_to_string(&mut text);
    match text.as_str() {
        "ok" => Ok(()),
        "" => Err(format!("{DEVICE}: the trial guest's process died")),
        _ => Err(text),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn says_why() {
        assert!(!probe_now().reason.is_empty());
    }

    #[test]
    fn what_is_known_is_not_probed_again() {
        let directory = tempfile::tempdir().unwrap();
        let known = Acceleration {
            kvm: true,
            reason: "known".to_owned(),
            tsc_khz: None,
            processor: String::new(),
        };
        keep(&directory.path().join("accelerator.json"), &known).unwrap();
        assert_eq!(probe(directory.path()), known);
    }
}

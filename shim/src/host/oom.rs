//! How readily the host's memory killer takes a process (proc(5), `oom_score_adj`).
//!
//! containerd runs at -999, which every child inherits. A shim stands one above it, as containerd's own
//! shims do. A VMM has all the memory of its pod, and counts as the pod's containers do: the host must
//! be able to kill it.

use std::fs;
use std::io;

/// The highest there is: taken first.
const MAX: i32 = 1000;

fn path(pid: i32) -> String {
    format!("/proc/{pid}/oom_score_adj")
}

/// One more than `text`, which is another process's.
fn above(text: &str) -> Option<i32> {
    text.trim().parse::<i32>().ok().map(|score| score.saturating_add(1).min(MAX))
}

/// Puts this process one above its parent, containerd. Where that is not allowed it keeps what it has:
/// a shim that is spared too much is no reason to start no pod.
pub fn set_above_parent() {
    let parent = nix::unistd::getppid().as_raw();
    if let Some(score) = fs::read_to_string(path(parent)).ok().as_deref().and_then(above) {
        let _ = write(nix::unistd::getpid().as_raw(), score);
    }
}

fn write(pid: i32, score: i32) -> io::Result<()> {
    fs::write(path(pid), score.to_string())
}

/// Gives a VMM the score of its pod: of the container of the pod that is to be spared most, for all of
/// them end with it. The sandbox's own specification does not count: containerd writes -998 there, for
/// a pause process that has no memory to speak of.
pub(crate) fn set_of_pod(vmm: i32, containers: impl Iterator<Item = i32>) {
    let score = containers.min().unwrap_or(0);
    if let Err(error) = write(vmm, score) {
        // To go below what it had when it was started takes CAP_SYS_RESOURCE.
        tracing::debug!(vmm, score, %error, "the VMM keeps its oom_score_adj");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shims_stand_one_above_containerd() {
        assert_eq!(above("-999\n"), Some(-998));
        assert_eq!(above("1000\n"), Some(1000));
        assert_eq!(above(""), None);
    }

    #[test]
    fn a_vmm_counts_as_the_container_that_is_spared_most() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let score = || fs::read_to_string(path(pid)).unwrap().trim().to_owned();
        set_of_pod(pid, [1000, 900, 950].into_iter());
        assert_eq!(score(), "900");
        child.kill().unwrap();
        child.wait().unwrap();
        // It may end at any moment.
        set_of_pod(pid, std::iter::empty());
    }
}

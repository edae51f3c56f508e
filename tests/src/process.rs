//! Ending and measuring processes by pid.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;

/// Sends SIGKILL; a process that is gone already is fine.
pub fn kill(pid: u32) -> Result<()> {
    signal(pid, Signal::SIGKILL)
}

/// Sends SIGSTOP: the process exists and does nothing.
pub fn stop(pid: u32) -> Result<()> {
    signal(pid, Signal::SIGSTOP)
}

/// Sends SIGCONT to what was stopped.
pub fn go_on(pid: u32) -> Result<()> {
    signal(pid, Signal::SIGCONT)
}

/// SIGTERM, then SIGKILL after `grace`; returns when the process is gone or a zombie.
pub fn terminate(pid: u32, grace: Duration) -> Result<()> {
    let start = Instant::now();
    if grace > Duration::ZERO {
        signal(pid, Signal::SIGTERM)?;
        while alive(pid) && start.elapsed() < grace {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    if alive(pid) {
        kill(pid)?;
    }
    while alive(pid) && start.elapsed() < grace + Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    match send(Pid::from_raw(i32::try_from(pid)?), signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("send {signal} to {pid}")),
    }
}

/// Whether the process runs (a zombie does not).
pub fn alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

/// User and system time the process and its waited-for children used.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    // utime, stime, cutime, cstime are fields 14 to 17; `rest` starts with field 3.
    let ticks = rest.split(' ').skip(11).take(4).filter_map(|field| field.parse::<u64>().ok());
    // USER_HZ is 100 on every Linux this runs on.
    Some(Duration::from_millis(ticks.sum::<u64>() * 10))
}

/// Memory of one process in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Pages of its own that no file backs up: written, and given back only with the process.
    pub private: u64,
    /// Private pages and its share of the others.
    pub proportional: u64,
}

/// Reads `smaps_rollup`.
pub fn memory(pid: u32) -> Option<Memory> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    Some(parse_rollup(&text))
}

fn parse_rollup(text: &str) -> Memory {
    let field = |name: &str| {
        let value = |line: &str| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok();
        text.lines().find_map(value).unwrap_or(0)
    };
    Memory { private: field("Private_Dirty:"), proportional: field("Pss:") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rollup_is_read_by_field() {
        let text = "00-ff [rollup]\nRss: 100 kB\nPss:  40 kB\nPss_Dirty: 7 kB\n\
                    Private_Clean:  3 kB\nPrivate_Dirty:  20 kB\n";
        assert_eq!(parse_rollup(text), Memory { private: 20, proportional: 40 });
    }

    #[test]
    fn own_process_is_alive() {
        assert!(alive(std::process::id()));
        assert!(cpu_time(std::process::id()).is_some());
    }
}

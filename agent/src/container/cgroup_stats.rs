//! What a cgroup says about the use of the guest: a container's, or the one that all are in.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use joey_protocol::api::{IoStat, StatsResponse};

use super::Error;
use super::cgroup::lookup;

/// Reads a file of the cgroup; empty when the controller is not there.
fn text(cgroup: &Path, file: &str) -> Result<String, Error> {
    match fs::read_to_string(cgroup.join(file)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        result => {
            result.map_err(|error| Error::failed(format!("reading {file} of {cgroup:?}: {error}")))
        }
    }
}

/// A single number; "max" and an absent file are 0: no limit.
fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

fn map(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(key, value)| (key.to_string(), number(value)))
        .collect()
}

fn io_stat(line: &str) -> Option<IoStat> {
    let (device, counts) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let mut stat = IoStat::new();
    stat.major = major.parse().ok()?;
    stat.minor = minor.parse().ok()?;
    for (key, value) in counts.split(' ').filter_map(|pair| pair.split_once('=')) {
        match key {
            "rbytes" => stat.rbytes = number(value),
            "wbytes" => stat.wbytes = number(value),
            "rios" => stat.rios = number(value),
            "wios" => stat.wios = number(value),
            _ => {}
        }
    }
    Some(stat)
}

/// What the containers below this cgroup use and used.
pub(crate) fn usage(cgroup: &Path) -> Result<StatsResponse, Error> {
    let mut stats = StatsResponse::new();
    let cpu = text(cgroup, "cpu.stat")?;
    let of_cpu = |key: &str| lookup(&cpu, key).map_or(0, number);
    stats.cpu_usage_usec = of_cpu("usage_usec");
    stats.cpu_user_usec = of_cpu("user_usec");
    stats.cpu_system_usec = of_cpu("system_usec");
    stats.cpu_nr_periods = of_cpu("nr_periods");
    stats.cpu_nr_throttled = of_cpu("nr_throttled");
    stats.cpu_throttled_usec = of_cpu("throttled_usec");
    stats.memory_current = number(&text(cgroup, "memory.current")?);
    stats.memory_max = number(&text(cgroup, "memory.max")?);
    stats.memory_peak = number(&text(cgroup, "memory.peak")?);
    stats.swap_current = number(&text(cgroup, "memory.swap.current")?);
    stats.swap_max = number(&text(cgroup, "memory.swap.max")?);
    stats.memory_stat = map(&text(cgroup, "memory.stat")?);
    stats.memory_events = map(&text(cgroup, "memory.events")?);
    stats.pids_current = number(&text(cgroup, "pids.current")?);
    stats.pids_max = number(&text(cgroup, "pids.max")?);
    stats.io = text(cgroup, "io.stat")?.lines().filter_map(io_stat).collect();
    Ok(stats)
}

/// `oom_kill` of memory.events; 0 when it cannot be read.
pub(crate) fn oom_kills(cgroup: &Path) -> u64 {
    let events = text(cgroup, "memory.events").unwrap_or_default();
    lookup(&events, "oom_kill").map_or(0, number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_kernel_are_read() {
        assert_eq!(number("max\n"), 0);
        assert_eq!(number("12\n"), 12);
        assert_eq!(map("oom 1\noom_kill 2\n")["oom_kill"], 2);
        let stat = io_stat("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0").unwrap();
        assert_eq!((stat.major, stat.minor, stat.rbytes, stat.wios), (254, 0, 1, 4));
        assert!(io_stat("").is_none());
    }
}

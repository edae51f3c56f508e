//! Processors of the host that a pod's containers are bound to (OCI's `linux.resources.cpu.cpus`, as a kubelet with
//! the static CPU manager sets it). Their numbers mean nothing in the guest: the VMM's threads are kept to those of
//! all of the pod's containers together.

use std::fs;
use std::io;
use std::path::Path;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;

const CPUS: &str = "/sys/devices/system/cpu/online";
const NODES: &str = "/sys/devices/system/node/online";

/// Takes processors and memory nodes out of what the guest is told; gives the processors, none if there are none.
///
/// # Errors
/// The message names field and value: a list that cannot be read, processors that the host does not have, or fewer
/// memory nodes than it has.
pub fn take(resources: &mut LinuxResources) -> Result<Option<CpuSet>, String> {
    let Some(cpu) = resources.cpu_mut() else { return Ok(None) };
    let (cpus, nodes) = (cpu.cpus().clone(), cpu.mems().clone());
    cpu.set_cpus(None).set_mems(None);
    let of_host = |field: &str, list: &str, online: &str| {
        let wrong = |reason: &str| format!("linux.resources.cpu.{field} {list:?}: {reason}");
        let set = parse(list).ok_or_else(|| wrong("not a list such as 0-3,8"))?;
        // Where the host does not say what it has, it is asked for nothing that it lacks.
        let online = fs::read_to_string(online).ok().and_then(|text| parse(text.trim()));
        let online = online.unwrap_or(set);
        match numbers(&set).find(|number| !online.is_set(*number).unwrap_or(false)) {
            Some(number) => Err(wrong(&format!("the host has no {number}"))),
            None => Ok((set, online)),
        }
    };
    if let Some(list) = nodes.filter(|list| !list.is_empty()) {
        let (set, online) = of_host("mems", &list, NODES)?;
        if set != online {
            return Err(format!(
                "linux.resources.cpu.mems {list:?}: the machine's memory is not bound to some of the host's nodes"
            ));
        }
    }
    match cpus.filter(|list| !list.is_empty()) {
        Some(list) => of_host("cpus", &list, CPUS).map(|(set, _)| Some(set)),
        None => Ok(None),
    }
}

/// Keeps the threads of `vmm` to the processors of all its containers, to all that this process may use where one of
/// them is bound to none.
///
/// # Errors
/// The process has ended, or the kernel refuses.
pub fn keep(vmm: i32, sets: impl Iterator<Item = Option<CpuSet>>) -> io::Result<()> {
    let all: Option<Vec<CpuSet>> = sets.collect();
    let together = all.filter(|sets| !sets.is_empty()).map(|sets| union(&sets));
    let wanted = together.map_or_else(|| sched_getaffinity(Pid::from_raw(0)), Ok)?;
    for thread in fs::read_dir(Path::new("/proc").join(vmm.to_string()).join("task"))?.flatten() {
        let Some(thread) = thread.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        match sched_setaffinity(Pid::from_raw(thread), &wanted) {
            // It has ended meanwhile.
            Ok(()) | Err(nix::Error::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn union(sets: &[CpuSet]) -> CpuSet {
    let mut all = CpuSet::new();
    for number in sets.iter().flat_map(numbers) {
        let _ = all.set(number);
    }
    all
}

fn numbers(set: &CpuSet) -> impl Iterator<Item = usize> {
    (0..CpuSet::count()).filter(|number| set.is_set(*number).unwrap_or(false))
}

/// Reads a list such as `0-3,8` (cpuset(7), "List format").
fn parse(list: &str) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= CpuSet::count() {
            return None;
        }
        for number in first..=last {
            set.set(number).ok()?;
        }
    }
    Some(set)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxCpuBuilder;

    use super::*;

    fn taken(cpus: &str, mems: &str) -> Result<Option<CpuSet>, String> {
        let cpu = LinuxCpuBuilder::default().cpus(cpus).mems(mems).shares(7_u64).build().unwrap();
        let mut resources = LinuxResources::default();
        resources.set_cpu(Some(cpu));
        let taken = take(&mut resources);
        let left = resources.cpu().clone().unwrap();
        assert_eq!((left.cpus(), left.mems(), left.shares()), (&None, &None, Some(7)));
        taken
    }

    #[test]
    fn lists_are_read_and_what_the_host_lacks_is_named() {
        let numbers_of = |list| parse(list).map(|set| numbers(&set).collect::<Vec<_>>());
        assert_eq!(numbers_of("0-2,8"), Some(vec![0, 1, 2, 8]));
        for wrong in ["", "a", "3-1", "1-", "99999"] {
            assert_eq!(numbers_of(wrong), None, "{wrong:?}");
        }
        assert_eq!(taken("", "").unwrap(), None);
        assert_eq!(taken("0", "").unwrap(), parse("0"));
        assert!(taken("1000", "").unwrap_err().contains("cpus \"1000\": the host has no 1000"));
        assert!(taken("x", "").unwrap_err().contains("cpus \"x\""));
        assert!(taken("", "900").unwrap_err().contains("mems \"900\""));
    }

    #[test]
    fn a_process_is_kept_to_what_all_containers_may_use() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let (vmm, pid) = (child.id().cast_signed(), Pid::from_raw(child.id().cast_signed()));
        let own = sched_getaffinity(Pid::from_raw(0)).unwrap();
        keep(vmm, [parse("0"), parse("0")].into_iter()).unwrap();
        assert_eq!(sched_getaffinity(pid).unwrap(), parse("0").unwrap());
        keep(vmm, [parse("0"), None].into_iter()).unwrap();
        assert_eq!(sched_getaffinity(pid).unwrap(), own);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(keep(vmm, std::iter::empty()).is_err());
    }
}

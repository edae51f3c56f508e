//! A container's cgroup (version 2): its limits, its processes, its end.
//!
//! The container's first process and every exec are born in it (`CLONE_INTO_CGROUP`), so nothing
//! of the container is ever outside. Waiting is for the kernel's notice on `cgroup.events`.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};
use tokio::io::Interest;

use super::device_policy;
use super::{Error, Kind};

/// How often a cgroup is killed anew when a process was born in it before it could be removed.
const REMOVAL_ATTEMPTS: u32 = 16;

/// A container's cgroup.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: File,
}

impl Cgroup {
    /// Makes the cgroup, without limits.
    pub(crate) fn create(root: &Path, id: &str) -> Result<Self, Error> {
        if id.is_empty() || id.contains('/') || id.starts_with('.') {
            return Err(Error::new(Kind::Invalid, format!("{id:?} is no container id")));
        }
        let path = root.join(id);
        let bad = |error| Error::failed(format!("making cgroup {path:?}: {error}"));
        fs::create_dir(&path).map_err(bad)?;
        match File::open(&path) {
            Ok(directory) => Ok(Cgroup { path, directory }),
            Err(error) => {
                let error = bad(error);
                // The failure to open is what matters; the directory is empty.
                let _ = fs::remove_dir(&path);
                Err(error)
            }
        }
    }

    /// Puts the policy for devices in force. Not before the container's root is mounted: the kernel
    /// asks the policy for the disks that are mounted too.
    pub(crate) fn restrict_devices(&self, limits: &LinuxResources) -> Result<(), Error> {
        device_policy::attach(self.fd(), limits)
    }

    /// Its directory, for a process to be born in.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes a cgroup without processes, as well as possible.
    pub(crate) fn remove_now(&self) {
        // Only on the way out of another failure, which is the one to report.
        let _ = fs::remove_dir(&self.path);
    }

    fn write(&self, file: &str, value: &str) -> Result<(), Error> {
        fs::write(self.path.join(file), value).map_err(|error| {
            let kind = match error.kind() {
                io::ErrorKind::NotFound => Kind::Unsupported,
                _ => Kind::Failed,
            };
            Error::new(kind, format!("writing {value:?} to {file} of the cgroup: {error}"))
        })
    }

    /// As `write`, for what may be absent when the value is what the kernel does anyway.
    fn write_unless_absent(&self, file: &str, value: &str, moot: bool) -> Result<(), Error> {
        match self.write(file, value) {
            Err(error) if error.kind == Kind::Unsupported && moot => Ok(()),
            result => result,
        }
    }

    /// Sets the limits that `resources` names.
    pub(crate) fn apply(&self, resources: &LinuxResources) -> Result<(), Error> {
        if let Some(memory) = resources.memory() {
            self.apply_memory(memory)?;
        }
        if let Some(cpu) = resources.cpu() {
            self.apply_cpu(cpu)?;
        }
        if let Some(pids) = resources.pids().as_ref().filter(|pids| pids.limit() != 0) {
            self.write_unless_absent("pids.max", &limit(pids.limit()), pids.limit() < 0)?;
        }
        if let Some(block_io) = resources.block_io() {
            self.apply_block_io(block_io)?;
        }
        for huge in resources.hugepage_limits().iter().flatten() {
            self.apply_hugepages(huge)?;
        }
        if resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
            return Err(Error::new(Kind::Unsupported, "rdma limits: a VM pod has no RDMA devices"));
        }
        for (file, value) in resources.unified().iter().flatten() {
            if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
                let text = format!("unified resource {file:?} is no limit of a cgroup");
                return Err(Error::new(Kind::Invalid, text));
            }
            self.write(file, value)?;
        }
        Ok(())
    }

    fn apply_memory(&self, memory: &LinuxMemory) -> Result<(), Error> {
        let bytes = memory.limit().filter(|bytes| *bytes != 0);
        if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
            let value = swap_limit(swap, bytes)?;
            // Kernels without swap accounting lack the file; the guest has no swap anyway.
            self.write_unless_absent("memory.swap.max", &value, true)?;
        }
        if let Some(bytes) = bytes {
            self.write_unless_absent("memory.max", &limit(bytes), bytes < 0)?;
        }
        if let Some(bytes) = memory.reservation().filter(|bytes| *bytes != 0) {
            self.write("memory.low", &limit(bytes))?;
        }
        Ok(())
    }

    fn apply_cpu(&self, cpu: &LinuxCpu) -> Result<(), Error> {
        if cpu.realtime_runtime().is_some_and(|value| value != 0)
            || cpu.realtime_period().is_some_and(|value| value != 0)
        {
            let text = "realtime CPU limits do not exist with cgroup version 2";
            return Err(Error::new(Kind::Unsupported, text));
        }
        if let Some(idle) = cpu.idle() {
            self.write_unless_absent("cpu.idle", &idle.to_string(), idle == 0)?;
        }
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            self.write("cpu.weight", &cpu_weight(shares).to_string())?;
        }
        if let Some(value) = cpu_max(cpu.quota(), cpu.period()) {
            self.write("cpu.max", &value)?;
        }
        if let Some(burst) = cpu.burst() {
            self.write("cpu.max.burst", &burst.to_string())?;
        }
        for (file, set) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(set) = set.as_deref().filter(|set| !set.is_empty()) {
                self.write(file, set)?;
            }
        }
        Ok(())
    }

    fn apply_block_io(&self, block_io: &LinuxBlockIo) -> Result<(), Error> {
        let named = block_io.weight_device().iter().flatten().next().is_some()
            || [
                block_io.throttle_read_bps_device(),
                block_io.throttle_write_bps_device(),
                block_io.throttle_read_iops_device(),
                block_io.throttle_write_iops_device(),
            ]
            .iter()
            .any(|devices| devices.iter().flatten().next().is_some());
        if named {
            let text = "blockIO limits of single devices name devices of the host, which a VM pod \
                        does not have";
            return Err(Error::new(Kind::Unsupported, text));
        }
        match block_io.weight().filter(|weight| *weight != 0) {
            Some(weight) => {
                let weight = 1 + u64::from(weight.max(10) - 10) * 9999 / 990;
                self.write("io.weight", &format!("default {weight}"))
            }
            None => Ok(()),
        }
    }

    /// containerd sends a limit of 0 for every page size that the host has.
    fn apply_hugepages(&self, huge: &LinuxHugepageLimit) -> Result<(), Error> {
        let size = huge.page_size();
        if size.contains('/') {
            return Err(Error::new(Kind::Invalid, format!("{size:?} is no page size")));
        }
        let file = format!("hugetlb.{size}.max");
        self.write_unless_absent(&file, &limit(huge.limit()), huge.limit() <= 0)
    }

    /// All processes in it and below, as the agent sees them.
    pub(crate) fn pids(&self) -> Result<Vec<u32>, Error> {
        let mut pids = Vec::new();
        let bad = |error| Error::failed(format!("listing processes of {:?}: {error}", self.path));
        for directory in tree(&self.path).map_err(bad)? {
            let text = match fs::read_to_string(directory.join("cgroup.procs")) {
                Err(error) if directory != self.path && gone(&error) => continue,
                result => result.map_err(bad)?,
            };
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
        }
        Ok(pids)
    }

    /// Signals every process.
    pub(crate) fn kill_all(&self, signal: Signal) -> Result<(), Error> {
        if signal == Signal::SIGKILL {
            return self.write("cgroup.kill", "1");
        }
        for pid in self.pids()? {
            match kill(Pid::from_raw(pid as i32), signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => {
                    return Err(Error::failed(format!("signal {signal} to {pid}: {error}")));
                }
            }
        }
        Ok(())
    }

    /// Freezes or thaws, and waits until the kernel has done so. What cannot be frozen within `patience`
    /// (a process may be in a system call that does not end) is thawed again.
    pub(crate) async fn freeze(&self, frozen: bool, patience: Duration) -> Result<(), Error> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)?;
        match tokio::time::timeout(patience, self.until("frozen", value)).await {
            Ok(done) => done,
            Err(_) if !frozen => {
                Err(Error::failed(format!("not all of it is thawed within {patience:?}")))
            }
            Err(_) => {
                self.write("cgroup.freeze", "0")?;
                Err(Error::failed(format!(
                    "not all of it is frozen within {patience:?}: it goes on"
                )))
            }
        }
    }

    /// Kills what is left, waits for its end and removes the cgroup. Idempotent.
    pub(crate) async fn destroy(&self) -> Result<(), Error> {
        if !self.path.exists() {
            return Ok(());
        }
        let remove = || -> io::Result<()> {
            for directory in tree(&self.path)?.iter().rev() {
                match fs::remove_dir(directory) {
                    Err(error) if gone(&error) => {}
                    result => result?,
                }
            }
            Ok(())
        };
        let mut attempts = REMOVAL_ATTEMPTS;
        loop {
            self.write("cgroup.kill", "1")?;
            self.until("populated", "0").await?;
            match remove() {
                // An exec was being born between the kill and the removal.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempts > 1 => {
                    attempts -= 1;
                }
                result => {
                    return result.map_err(|error| {
                        Error::failed(format!("removing {:?}: {error}", self.path))
                    });
                }
            }
        }
    }

    /// Waits until `cgroup.events` says so.
    async fn until(&self, key: &str, value: &str) -> Result<(), Error> {
        let wait = async {
            let events = File::open(self.path.join("cgroup.events"))?;
            let events = crate::sys::register(events, Interest::PRIORITY)?;
            loop {
                let mut text = String::new();
                let mut file = events.get_ref();
                file.rewind()?;
                file.read_to_string(&mut text)?;
                if lookup(&text, key) == Some(value) {
                    return io::Result::Ok(());
                }
                events.ready(Interest::PRIORITY).await?.clear_ready();
            }
        };
        wait.await.map_err(|error| {
            Error::failed(format!("waiting for {key} {value} of {:?}: {error}", self.path))
        })
    }
}

fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// The cgroup and all below it, parents first.
fn tree(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = vec![path.to_path_buf()];
    let mut next = 0;
    while next < all.len() {
        match fs::read_dir(&all[next]) {
            Ok(entries) => {
                for entry in entries.flatten() {
                    if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                        all.push(entry.path());
                    }
                }
            }
            Err(error) if next > 0 && gone(&error) => {}
            Err(error) => return Err(error),
        }
        next += 1;
    }
    Ok(all)
}

/// The value of `key` in a file of "key value" lines.
pub(crate) fn lookup<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
}

fn limit(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

/// The specification's swap includes memory, the kernel's does not.
fn swap_limit(swap: i64, memory: Option<i64>) -> Result<String, Error> {
    match memory {
        _ if swap < 0 => Ok("max".into()),
        Some(memory) if memory >= 0 && swap >= memory => Ok((swap - memory).to_string()),
        _ => {
            let text = format!("memory.swap {swap} needs a memory.limit that is not above it");
            Err(Error::new(Kind::Invalid, text))
        }
    }
}

/// Shares of version 1 (2 to 262144) on the scale of version 2 (1 to 10000), as runc has it.
fn cpu_weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn cpu_max(quota: Option<i64>, period: Option<u64>) -> Option<String> {
    let quota = quota.filter(|quota| *quota != 0);
    let period = period.filter(|period| *period != 0);
    match (quota, period) {
        (None, None) => None,
        (quota, period) => {
            let quota = limit(quota.unwrap_or(-1));
            Some(format!("{quota} {}", period.unwrap_or(100_000)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_does_not_freeze_in_time_is_thawed() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::create(root.path(), "c").unwrap();
        // A file of the kernel that can be waited for, and never says frozen.
        let events = cgroup.path.join("cgroup.events");
        std::os::unix::fs::symlink("/proc/self/mountinfo", events).unwrap();
        let state = || fs::read_to_string(cgroup.path.join("cgroup.freeze")).unwrap();
        let patience = Duration::from_millis(300);
        let (error, ()) = tokio::join!(cgroup.freeze(true, patience), async {
            tokio::time::sleep(patience / 3).await;
            assert_eq!(state(), "1");
        });
        assert!(error.unwrap_err().to_string().contains("within 300ms: it goes on"));
        assert_eq!(state(), "0");
    }

    #[test]
    fn limits_are_converted() {
        assert_eq!((cpu_weight(2), cpu_weight(1024), cpu_weight(262_144)), (1, 39, 10_000));
        assert_eq!(cpu_max(Some(50_000), None).unwrap(), "50000 100000");
        assert_eq!(cpu_max(Some(-1), Some(5000)).unwrap(), "max 5000");
        assert_eq!(cpu_max(None, Some(0)), None);
        assert_eq!(swap_limit(150, Some(100)).unwrap(), "50");
        assert_eq!(swap_limit(-1, None).unwrap(), "max");
        assert!(swap_limit(50, Some(100)).is_err());
        assert_eq!(lookup("populated 1\nfrozen 0\n", "frozen"), Some("0"));
    }
}

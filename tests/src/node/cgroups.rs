//! The pods' cgroups, which on a real node the kubelet makes and removes.

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Every mounted cgroup hierarchy.
fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_path_buf()];
    }
    let folders = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    folders.filter(|p| p.join("cgroup.procs").exists() && !p.is_symlink()).collect()
}

/// Makes the cgroup in every hierarchy.
pub fn make(cgroup: &str) -> Result<()> {
    for hierarchy in hierarchies() {
        let mut folder = hierarchy;
        for part in cgroup.split('/').filter(|part| !part.is_empty()) {
            let parent = folder.clone();
            folder.push(part);
            match fs::create_dir(&folder) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(error).with_context(|| format!("make {}", folder.display()));
                }
                _ => inherit(&parent, &folder),
            }
        }
    }
    Ok(())
}

/// Puts a process where its CPU time, and that of its children, is counted.
pub fn count_cpu(cgroup: &str, pid: u32) -> Result<()> {
    make(cgroup)?;
    let name = cgroup.trim_start_matches('/');
    let root = Path::new("/sys/fs/cgroup");
    let versioned = [root.join("cpuacct").join(name), root.join(name)];
    let folder = versioned.iter().find(|folder| folder.join("cgroup.procs").exists());
    let folder = folder.with_context(|| format!("no cgroup {cgroup} that counts CPU time"))?;
    fs::write(folder.join("cgroup.procs"), pid.to_string())
        .with_context(|| format!("put {pid} into {}", folder.display()))
}

/// The file of a cgroup's memory controller, by its names in version 1 and version 2.
fn memory_file(cgroup: &str, names: [&str; 2]) -> Result<PathBuf> {
    let name = cgroup.trim_start_matches('/');
    let root = Path::new("/sys/fs/cgroup");
    let files = [root.join("memory").join(name).join(names[0]), root.join(name).join(names[1])];
    let file = files.iter().find(|file| file.exists()).cloned();
    file.with_context(|| format!("cgroup {cgroup} has no memory controller"))
}

/// Limits the memory of a cgroup, as the kubelet does a pod's.
pub fn limit_memory(cgroup: &str, bytes: i64) -> Result<()> {
    let file = memory_file(cgroup, ["memory.limit_in_bytes", "memory.max"])?;
    fs::write(&file, bytes.to_string()).with_context(|| format!("write {}", file.display()))
}

/// Memory of a cgroup's processes that nothing but swap could take from them, in bytes.
pub fn own_memory(cgroup: &str) -> Result<u64> {
    let file = memory_file(cgroup, ["memory.stat", "memory.stat"])?;
    let text = fs::read_to_string(&file)?;
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let (_, value) = lines
        .find(|(name, _)| ["total_rss", "anon"].contains(name))
        .with_context(|| format!("no total_rss or anon in {}", file.display()))?;
    Ok(value.trim().parse()?)
}

/// A new cpuset (v1) is empty and takes no process; controllers (v2) must be switched on by the parent.
fn inherit(parent: &Path, folder: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(value) = fs::read_to_string(parent.join(file))
            && fs::read_to_string(folder.join(file)).is_ok_and(|own| own.trim().is_empty())
        {
            let _ = fs::write(folder.join(file), value);
        }
    }
    if let Ok(controllers) = fs::read_to_string(parent.join("cgroup.controllers")) {
        for controller in controllers.split_whitespace() {
            let _ = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

/// Removes the cgroup; what others left below it stays and is returned.
pub fn remove(cgroup: &str) -> Vec<PathBuf> {
    let mut left = Vec::new();
    for hierarchy in hierarchies() {
        let folder = hierarchy.join(cgroup.trim_start_matches('/'));
        let below = below(&folder);
        if below.is_empty() {
            let _ = fs::remove_dir(&folder);
        }
        left.extend(below);
    }
    left
}

/// Removes the cgroup with all below it, as the last means.
pub fn purge(cgroup: &str) {
    for hierarchy in hierarchies() {
        let folder = hierarchy.join(cgroup.trim_start_matches('/'));
        let mut all = below(&folder);
        all.push(folder);
        all.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
        for path in all {
            let _ = fs::remove_dir(path);
        }
    }
}

/// All cgroups below one, in all hierarchies.
pub fn list(cgroup: &str) -> Vec<PathBuf> {
    let folder = |hierarchy: PathBuf| hierarchy.join(cgroup.trim_start_matches('/'));
    hierarchies().into_iter().flat_map(|hierarchy| below(&folder(hierarchy))).collect()
}

/// CPU time in nanoseconds that the cgroup's processes used so far.
pub fn cpu_nanoseconds(cgroup: &str) -> Option<u64> {
    let name = cgroup.trim_start_matches('/');
    let root = Path::new("/sys/fs/cgroup");
    if let Ok(text) = fs::read_to_string(root.join("cpuacct").join(name).join("cpuacct.usage")) {
        return text.trim().parse().ok();
    }
    let text = fs::read_to_string(root.join(name).join("cpu.stat")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    line.trim().parse::<u64>().ok().map(|microseconds| microseconds * 1000)
}

/// Processes in the cgroup and below it, in any hierarchy.
pub fn processes(cgroup: &str) -> HashSet<u32> {
    let folders = hierarchies().into_iter().flat_map(|hierarchy| {
        let folder = hierarchy.join(cgroup.trim_start_matches('/'));
        below(&folder).into_iter().chain([folder])
    });
    let lists = folders.filter_map(|path| fs::read_to_string(path.join("cgroup.procs")).ok());
    lists
        .flat_map(|list| list.lines().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

fn below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else {
        return found;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(below(&entry.path()));
            found.push(entry.path());
        }
    }
    found
}

//! The pod's cgroup on the host: shim and VMM run in it and are accounted to the pod.
//!
//! No limit is set here: containers are limited inside the guest, and the pod's own cgroup, made by
//! the kubelet, bounds the pod with its overhead. The sandbox gets one child group, named as CRI says
//! (`<parent>/<id>`, or `<slice>:cri-containerd:<id>` for the systemd driver), in the unified tree
//! where the host has one with controllers, and in every v1 hierarchy otherwise.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

/// Mount point of the host's control groups.
const ROOT: &str = "/sys/fs/cgroup";

/// Why the pod's cgroup could not be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The specification names a path that leaves the tree.
    #[error("cgroupsPath {0:?}: not a path below the root of the control groups")]
    Path(String),
    /// The kernel refused a step.
    #[error("control group {path}: {step}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn fail(path: &Path, step: &'static str) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { path, step, source }
}

/// The directories that hold the sandbox's processes: one on a unified host, one per hierarchy on v1.
///
/// # Errors
/// `cgroups_path` is not one that CRI or a container tool writes.
pub fn directories(cgroups_path: &str) -> Result<Vec<PathBuf>, CgroupError> {
    directories_below(Path::new(ROOT), cgroups_path)
}

fn directories_below(root: &Path, cgroups_path: &str) -> Result<Vec<PathBuf>, CgroupError> {
    let relative = relative(cgroups_path)?;
    if root.join("cgroup.controllers").exists() {
        return Ok(vec![root.join(relative)]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).map_err(fail(root, "list"))? {
        let entry = entry.map_err(fail(root, "list"))?;
        // `cpu,cpuacct` is a hierarchy; `cpu` and `cpuacct` beside it are links to it.
        let is_hierarchy = entry.file_type().is_ok_and(|kind| kind.is_dir())
            && entry.path().join("cgroup.procs").exists();
        if is_hierarchy {
            found.push(entry.path().join(&relative));
        }
    }
    found.sort();
    Ok(found)
}

/// The groups that this process is in, as directories (cgroups(7), `/proc/[pid]/cgroup`).
#[must_use]
pub fn own() -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    own_below(Path::new(ROOT), &text)
}

fn own_below(root: &Path, text: &str) -> Vec<PathBuf> {
    let unified = root.join("cgroup.controllers").exists();
    let group = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let hierarchy = match controllers {
            "" if unified => root.to_owned(),
            "" => root.join("unified"),
            name => root.join(name.trim_start_matches("name=")),
        };
        Some(hierarchy.join(path.trim_start_matches('/')))
    };
    text.lines().filter_map(group).filter(|path| path.join("cgroup.procs").exists()).collect()
}

/// Turns `/kubepods/pod1/abc` or `kubepods-pod1.slice:cri-containerd:abc` into a relative path.
fn relative(cgroups_path: &str) -> Result<PathBuf, CgroupError> {
    let refuse = || CgroupError::Path(cgroups_path.to_owned());
    let path = match cgroups_path.split(':').collect::<Vec<_>>().as_slice() {
        [slice, prefix, name] if slice.ends_with(".slice") => {
            let mut path = PathBuf::new();
            let stem = slice.trim_end_matches(".slice");
            let mut so_far = String::new();
            // a-b-c.slice lies in a.slice/a-b.slice (systemd.slice(5)).
            for part in stem.split('-') {
                if !so_far.is_empty() {
                    so_far.push('-');
                }
                so_far.push_str(part);
                path.push(format!("{so_far}.slice"));
            }
            path.join(format!("{prefix}-{name}.scope"))
        }
        [path] => PathBuf::from(path.trim_start_matches('/')),
        _ => return Err(refuse()),
    };
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if plain && path.components().next().is_some() { Ok(path) } else { Err(refuse()) }
}

/// Makes the groups.
///
/// # Errors
/// A directory cannot be made.
pub fn create(directories: &[PathBuf]) -> Result<(), CgroupError> {
    for path in directories {
        std::fs::create_dir_all(path).map_err(fail(path, "create"))?;
        inherit_cpuset(path)?;
    }
    Ok(())
}

/// A new cpuset group of version 1 has no CPUs, and takes no process before it does.
fn inherit_cpuset(path: &Path) -> Result<(), CgroupError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = path.join(file);
        // Version 2 inherits by itself and calls what is in force `.effective`.
        let Ok(text) = std::fs::read_to_string(&own) else { continue };
        if !text.trim().is_empty() || path.join("cgroup.controllers").exists() {
            continue;
        }
        if parent.join(file).exists() {
            inherit_cpuset(parent)?;
            let above = std::fs::read_to_string(parent.join(file)).unwrap_or_default();
            std::fs::write(&own, above.trim()).map_err(fail(&own, "inherit"))?;
        }
    }
    Ok(())
}

/// Opens each group's list of processes, for a child that puts itself in before it executes.
///
/// # Errors
/// The groups do not exist.
pub fn open(directories: &[PathBuf]) -> Result<Vec<OwnedFd>, CgroupError> {
    let open = |path: &PathBuf| {
        let file = path.join("cgroup.procs");
        OpenOptions::new().write(true).open(&file).map(OwnedFd::from).map_err(fail(&file, "open"))
    };
    directories.iter().map(open).collect()
}

/// Puts this process into the groups.
///
/// # Errors
/// The kernel refuses.
pub fn join(directories: &[PathBuf]) -> Result<(), CgroupError> {
    put(std::process::id(), directories)
}

/// Puts a process, with all its threads, into the groups.
///
/// # Errors
/// The kernel refuses.
pub fn put(pid: u32, directories: &[PathBuf]) -> Result<(), CgroupError> {
    for path in directories {
        move_to(path, pid).map_err(fail(path, "enter"))?;
    }
    Ok(())
}

fn move_to(group: &Path, pid: u32) -> io::Result<()> {
    let mut file: File = OpenOptions::new().write(true).open(group.join("cgroup.procs"))?;
    file.write_all(pid.to_string().as_bytes())
}

/// Processes in the groups.
#[must_use]
pub fn processes(directories: &[PathBuf]) -> Vec<u32> {
    let mut pids: Vec<u32> = directories
        .iter()
        .filter_map(|path| std::fs::read_to_string(path.join("cgroup.procs")).ok())
        .flat_map(|text| text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<u32>>())
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

/// Root of the hierarchy that a group is in: the root of the tree on a unified host.
fn hierarchy(group: &Path) -> PathBuf {
    let root = Path::new(ROOT);
    let first = group.strip_prefix(root).ok().and_then(|rest| rest.components().next());
    match first {
        Some(first) if !root.join("cgroup.controllers").exists() => root.join(first),
        _ => root.to_owned(),
    }
}

/// Removes the groups; what is gone already is fine. This process, if it is in one, leaves first: to
/// the root, since the kubelet removes the parent next.
///
/// # Errors
/// A group still has processes.
pub fn remove(directories: &[PathBuf]) -> Result<(), CgroupError> {
    let me = std::process::id();
    for path in directories {
        if processes(std::slice::from_ref(path)).contains(&me) {
            // If it fails, so does the removal, which says why.
            let _ = move_to(&hierarchy(path), me);
        }
        match std::fs::remove_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(fail(path, "remove")(error));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_of_cri_forms_are_understood() {
        assert_eq!(relative("/kubepods/pod1/abc").unwrap(), Path::new("kubepods/pod1/abc"));
        assert_eq!(
            relative("kubepods-burstable-pod1.slice:cri-containerd:abc").unwrap(),
            Path::new(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/\
                 cri-containerd-abc.scope"
            )
        );
    }

    #[test]
    fn own_groups_are_found_in_either_version() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            std::fs::create_dir_all(root.path().join(path)).unwrap();
            std::fs::write(root.path().join(path).join("cgroup.procs"), "").unwrap();
        };
        ["memory/system", "systemd/a", "unified/b", "c"].into_iter().for_each(make);
        let text = "4:memory:/system\n1:name=systemd:/a\n2:cpu:/none\n0::/b\n";
        let expected = ["memory/system", "systemd/a", "unified/b"].map(|p| root.path().join(p));
        assert_eq!(own_below(root.path(), text), expected);
        std::fs::write(root.path().join("cgroup.controllers"), "cpu").unwrap();
        assert_eq!(own_below(root.path(), "0::/c\n"), [root.path().join("c")]);
    }

    #[test]
    fn a_path_that_leaves_the_tree_is_refused_by_name() {
        for path in ["../x", "/a/../b", "", "/", "a:b", "a:b:c"] {
            let error = relative(path).unwrap_err().to_string();
            assert!(error.contains(&format!("{path:?}")), "{error}");
        }
    }

    #[test]
    fn a_host_with_version_2_has_one_directory() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("cgroup.controllers"), "cpu").unwrap();
        let found = directories_below(root.path(), "/pods/a").unwrap();
        assert_eq!(found, [root.path().join("pods/a")]);
        create(&found).unwrap();
        assert!(found[0].is_dir());
        remove(&found).unwrap();
        remove(&found).unwrap();
        assert!(!found[0].exists());
    }
}

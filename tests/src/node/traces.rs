//! What exists on a node at one moment, so that what a test left behind can be named.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use joey_ebpf::policy::maps::Maps;

use super::cgroups;

/// Names of everything a pod can leave behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// Looks at the node that `holder` keeps.
    pub fn take(holder: u32, dir: &Path, cgroup: &str) -> Self {
        let mut found = BTreeSet::new();
        let processes = processes(holder);
        let keepers: Vec<u32> = processes.iter().copied().filter(|pid| is_keeper(*pid)).collect();
        for process in processes {
            if waits(process, &keepers) {
                found.insert(format!("{STANDBY}process {process}"));
                continue;
            }
            // A kernel-side zombie or an exiting process without a name is on its way out.
            if let Some(name) = command(process).filter(|name| !is_daemon(name)) {
                found.insert(format!("process {process}: {name}"));
            }
        }
        let mounts = fs::read_to_string(format!("/proc/{holder}/mountinfo")).unwrap_or_default();
        for line in mounts.lines() {
            if let Some(target) = line.split(' ').nth(4) {
                found.insert(format!("mount {target}"));
            }
        }
        let links = fs::read_to_string(format!("/proc/{holder}/net/dev")).unwrap_or_default();
        for line in links.lines().skip(2) {
            if let Some((name, _)) = line.split_once(':') {
                found.insert(format!("network device {}", name.trim()));
            }
        }
        let root = PathBuf::from(format!("/proc/{holder}/root"));
        for (what, folder) in [
            ("network namespace", root.join("run/netns")),
            ("socket", root.join("run/containerd/s")),
            ("BPF object", root.join("sys/fs/bpf")),
            ("address lease", dir.join("ipam/joey-test")),
            ("sandbox record", dir.join("jrun/sandboxes")),
            ("bundle", dir.join("state/io.containerd.runtime.v2.task/k8s.io")),
        ] {
            for name in names(&folder) {
                if what == "sandbox record" && name.starts_with("standby-") {
                    found.insert(format!("{STANDBY}record {name}"));
                    continue;
                }
                // host-local keeps its lock and its last address.
                if !name.starts_with("last_reserved") && name != "lock" {
                    found.insert(format!("{what} {name}"));
                }
            }
        }
        // What a keeper or a builder has that still runs is for the pods to come.
        let numbers: Vec<String> = keepers
            .iter()
            .filter_map(|pid| levels(*pid)?.get(1).map(ToString::to_string))
            .collect();
        let kept =
            |name: &str| name.split(['.', '/']).any(|part| numbers.iter().any(|n| n == part));
        for (what, folder, expected) in [
            ("state", dir.join("joey"), is_cached as fn(&str) -> bool),
            ("disk", dir.join("joey/disks"), |_| false),
            ("runtime", dir.join("jrun"), is_of_the_node),
        ] {
            for name in names(&folder).into_iter().filter(|name| !expected(name)) {
                let standby = if kept(&name) { STANDBY } else { "" };
                found.insert(format!("{standby}{what} file {name}"));
            }
        }
        // A node that could not load its programs has none.
        let pods = Maps::open(&root.join("sys/fs/bpf/joey"))
            .and_then(|maps| maps.pods().map_err(|error| std::io::Error::other(error.to_string())));
        for id in pods.unwrap_or_default().into_keys() {
            found.insert(format!("pod {id} in the node's policy"));
        }
        for path in cgroups::list(cgroup) {
            found.insert(format!("cgroup {}", path.display()));
        }
        Self(found)
    }

    /// What is here but was not in `before`. A machine that waits for the next pod is no leftover of
    /// the last one.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).filter(|name| !name.starts_with(STANDBY)).cloned().collect()
    }

    /// All of it.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// Whether a file of Joey's state is of a finished template or image: these are kept for the pods to come.
fn is_cached(name: &str) -> bool {
    let is_key = |text: &str| text.len() >= 24 && text.chars().all(|c| c.is_ascii_hexdigit());
    match name.split_once('/') {
        None => ["templates", "images", "disks", "network"].contains(&name),
        Some(("network", _)) => true,
        Some(("templates", name)) => {
            let (first, rest) = name.split_once('/').unwrap_or((name, ""));
            // A lock is a file that stays; which builder holds it is another matter.
            is_key(first.strip_suffix(".lock").filter(|_| rest.is_empty()).unwrap_or(first))
        }
        Some(("images", name)) => {
            let (first, _) = name.split_once('/').unwrap_or((name, ""));
            first.strip_suffix(".disk").is_some_and(is_key)
        }
        Some(_) => false,
    }
}

/// Whether a file of Joey's run directory is the node's, not a sandbox's: what was once found out, locks,
/// the last words of keepers and builders. What sandboxes have is looked at by itself.
fn is_of_the_node(name: &str) -> bool {
    let (first, rest) = name.split_once('/').unwrap_or((name, ""));
    match first {
        "sandboxes" => true,
        // The folders of classes; the sockets in them are keepers'.
        "standby" => !rest.contains('/'),
        // The folder and the log of who has no services; others' are their tenants'.
        "services" => matches!(rest, "" | "shared"),
        "services.lock" | "network.sock" | "network.lock" | "metrics.sock" | "accelerator.json"
        | "qemu.json" | "orphans.lock" | "standby.lock" | "standby.log" | "template-build.log" => {
            true
        }
        name => ["containerd-", "template-", "build-"].iter().any(|kind| name.starts_with(kind)),
    }
}

/// How names of what is there for the pods to come begin.
const STANDBY: &str = "standby ";

/// Whether a process keeps a machine in reserve or builds a template.
pub fn is_keeper(pid: u32) -> bool {
    let works = ["-v2 standby ", "/joey template build "];
    command(pid).is_some_and(|command| works.iter().any(|work| command.contains(work)))
}

/// Whether it is one of the keepers or the child of one.
pub fn waits(pid: u32, keepers: &[u32]) -> bool {
    keepers.contains(&pid) || parent(pid).is_some_and(|parent| keepers.contains(&parent))
}

/// containerd and the snapshotter belong to the node: a restart is no leak.
fn is_daemon(command: &str) -> bool {
    let program = command.split(' ').next().unwrap_or_default();
    ["/containerd", "/joey-snapshotter"].iter().any(|daemon| program.ends_with(daemon))
        || command.contains("/joey network serve")
}

/// Waits until nothing is left beyond `before`; returns what still is at the deadline.
pub fn settle(deadline: Duration, before: &Traces, take: impl Fn() -> Traces) -> Vec<String> {
    let end = Instant::now() + deadline;
    loop {
        let left = take().beyond(before);
        if left.is_empty() || Instant::now() > end {
            return left;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Processes of the holder's pid namespace and of those nested in it, without the holder.
pub fn processes(holder: u32) -> Vec<u32> {
    let Some(depth) = levels(holder).map(|pids| pids.len()) else {
        return Vec::new();
    };
    let Ok(own) = fs::read_link(format!("/proc/{holder}/ns/pid")) else {
        return Vec::new();
    };
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let inside = |pid: u32| {
        pid != holder
            && match fs::read_link(format!("/proc/{pid}/ns/pid")) {
                Ok(namespace) if namespace == own => true,
                Ok(_) => {
                    levels(pid).is_some_and(|pids| pids.len() > depth) && descends(pid, holder)
                }
                Err(_) => false,
            }
    };
    pids.filter(|pid| inside(*pid)).collect()
}

/// A process's numbers in the pid namespaces that it is in, the outermost first.
pub fn levels(pid: u32) -> Option<Vec<u32>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().map(|pid| pid.parse().ok()).collect()
}

/// Whether `holder`'s namespace is among the ancestors: some parent lives directly in it.
fn descends(mut pid: u32, holder: u32) -> bool {
    let own = fs::read_link(format!("/proc/{holder}/ns/pid")).ok();
    while let Some(parent) = parent(pid).filter(|parent| *parent > 1) {
        if parent == holder || fs::read_link(format!("/proc/{parent}/ns/pid")).ok() == own {
            return true;
        }
        pid = parent;
    }
    false
}

/// A process's parent.
pub fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// A process's command line.
pub fn command(pid: u32) -> Option<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let text = String::from_utf8_lossy(&bytes).replace('\0', " ");
    let text = text.trim();
    (!text.is_empty()).then(|| text.chars().take(600).collect())
}

fn names(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(names(&entry.path()).into_iter().map(|below| format!("{name}/{below}")));
        }
        found.push(name);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cached_is_told_from_what_was_left() {
        let key = "0123456789abcdef01234567";
        for name in ["", ".lock", "/memory"].map(|end| format!("templates/{key}{end}")) {
            assert!(is_cached(&name), "{name}");
        }
        for name in ["", "/disk.json", "/0/data"].map(|end| format!("images/{key}.disk{end}")) {
            assert!(is_cached(&name), "{name}");
        }
        for end in [".1234.new", ".1234.new/memory", ".1234.old"] {
            assert!(!is_cached(&format!("templates/{key}{end}")), "{end}");
        }
        for name in [".new", ".lock", ".gone/index"].map(|end| format!("images/{key}{end}")) {
            assert!(!is_cached(&name), "{name}");
        }
        assert!(!is_of_the_node("standby/0123/17"));
        assert!(!is_of_the_node("qemu.17"));
        assert!(is_of_the_node("standby/0123"));
    }
}

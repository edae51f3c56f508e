//! `joey check`: what this node has, what is missing, and what to do about it.

use std::fs::OpenOptions;
use std::path::Path;

use anyhow::Result;
use joey_ebpf::policy::maps::Maps;
use joey_shim::config::Config;
use joey_shim::policy::state::Store;
use joey_shim::policy::versions;
use joey_shim::sandbox::pod_disk;
use joey_shim::vmm::template::TemplateStore;
use joey_shim::vmm::{accel, qemu};
use serde::Serialize;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    Ok,
    /// Pods run, but slower or less well confined.
    Warning,
    /// No pod runs.
    Missing,
}

#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    level: Level,
    found: String,
    /// What to do; empty if nothing is.
    advice: String,
}

fn finding(what: &'static str, level: Level, found: impl ToString, advice: &str) -> Finding {
    Finding { what, level, found: found.to_string(), advice: advice.to_owned() }
}

/// Prints the findings; `false` if a pod could not run.
pub(crate) fn run(config: &Config, json: bool) -> Result<bool> {
    let findings = findings(config)?;
    let able = findings.iter().all(|finding| finding.level != Level::Missing);
    if json {
        let all = serde_json::json!({"able": able, "findings": findings});
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(able);
    }
    for finding in &findings {
        let mark = match finding.level {
            Level::Ok => "ok",
            Level::Warning => "WARNING",
            Level::Missing => "MISSING",
        };
        println!("{mark:<8} {:<14} {}", finding.what, finding.found);
        if !finding.advice.is_empty() {
            println!("{:<23} → {}", "", finding.advice);
        }
    }
    println!("\n{}", if able { "this node can run pods" } else { "this node cannot run pods" });
    Ok(able)
}

fn findings(config: &Config) -> Result<Vec<Finding>> {
    let vmm = config.vmm()?;
    let mut all = Vec::new();
    let found = accel::probe(&config.run_dir);
    all.push(if found.kvm {
        finding("accelerator", Level::Ok, "KVM", "")
    } else {
        finding(
            "accelerator",
            Level::Warning,
            format!("software emulation (TCG): {}", found.reason),
            "enable virtualization in the firmware or the cloud's instance type; emulation is \
             slower and a weaker boundary",
        )
    });
    all.push(match qemu::version(&vmm.qemu, &config.run_dir) {
        Ok(version) => finding("QEMU", Level::Ok, version.text, ""),
        Err(error) => finding("QEMU", Level::Missing, error, "install qemu-system-x86"),
    });
    let guest = ["vmlinuz", "initrd", "manifest.json"].map(|name| vmm.guest_dir.join(name));
    all.push(match guest.iter().find(|path| !path.is_file()) {
        None => finding("guest image", Level::Ok, vmm.guest_dir.display(), ""),
        Some(path) => finding(
            "guest image",
            Level::Missing,
            format!("{} is not there", path.display()),
            "reinstall the package, or `cargo xtask guest` and set guest_dir",
        ),
    });
    all.push(ebpf(config));
    all.push(policy(config));
    all.push(taps(Path::new("/dev/net/tun")));
    all.push(cgroups());
    all.push(match TemplateStore::new(&vmm).map(|store| store.list().len()) {
        Ok(0) => finding(
            "templates",
            Level::Warning,
            "none yet",
            "`joey template build` makes one; otherwise the first pod boots cold",
        ),
        Ok(count) => finding("templates", Level::Ok, format!("{count} on this node"), ""),
        Err(error) => finding("templates", Level::Missing, error, ""),
    });
    // A template and a few images.
    all.push(space("disk space", &config.state_dir, 2 << 30, "free some, or move state_dir"));
    all.push(disks(config));
    Ok(all)
}

fn ebpf(config: &Config) -> Finding {
    match super::ebpf::load(config) {
        Ok(path) => finding("eBPF programs", Level::Ok, path.display(), ""),
        Err(error) => {
            finding("eBPF programs", Level::Missing, error, "mount -t bpf bpf /sys/fs/bpf, as root")
        }
    }
}

/// Who may reach whom.
fn policy(config: &Config) -> Finding {
    const WHAT: &str = "policy";
    if !config.isolation {
        let advice = "set isolation = true, or see to it that the CNI keeps tenants apart";
        return finding(WHAT, Level::Warning, "isolation is off: every packet passes", advice);
    }
    match versions::warning(config) {
        Ok(None) => {}
        Ok(Some(found)) => {
            return finding(WHAT, Level::Warning, found, "drain the node, or delete these pods");
        }
        Err(error) => {
            let found = format!("whether pods have another version's: {error}");
            return finding(WHAT, Level::Warning, found, "joey ps");
        }
    }
    let (store, maps) = (Store::new(&config.state_dir), Maps::open(&config.bpf_dir));
    let active = maps.map_err(anyhow::Error::from).and_then(|maps| Ok(maps.active()?));
    let applied =
        store.policy().and_then(|it| Ok((it.epoch, it.epoch.max(store.identities()?.epoch))));
    match (active, applied) {
        (Err(error), _) => finding(WHAT, Level::Missing, error, "joey ebpf load"),
        (_, Err(error)) => finding(WHAT, Level::Warning, error, "joey policy apply -f FILE"),
        (Ok(_), Ok((0, _))) => finding(
            WHAT,
            Level::Warning,
            "none applied: pods reach their own tenant and nothing else, no DNS either",
            "joey policy apply -f FILE; docs/examples/policy has one to begin with",
        ),
        (Ok(active), Ok((_, read))) if active.epoch < read => finding(
            WHAT,
            Level::Warning,
            format!("epoch {} is in force, {read} was written down", active.epoch),
            "joey policy apply -f FILE, once more",
        ),
        (Ok(active), Ok(_)) => {
            finding(WHAT, Level::Ok, format!("epoch {} is in force", active.epoch), "")
        }
    }
}

/// Does with it what a pod's start does.
fn taps(tun: &Path) -> Finding {
    match OpenOptions::new().read(true).write(true).open(tun) {
        Ok(_) => finding("taps", Level::Ok, tun.display(), ""),
        Err(error) => {
            let found = format!("open {}: {error}", tun.display());
            finding("taps", Level::Missing, found, "as root: modprobe tun")
        }
    }
}

fn cgroups() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        finding("cgroups", Level::Ok, "version 2", "")
    } else {
        finding("cgroups", Level::Ok, "version 1 (hybrid)", "")
    }
}

/// Makes a file as every pod's start does.
fn disks(config: &Config) -> Finding {
    let (folder, bytes) = (config.disk_dir(), config.default_disk_mib << 20);
    match pod_disk::nameless(&folder, bytes) {
        Ok(_) => {
            let advice =
                "less than one pod may write (default_disk_mib): free some, or move disk_dir";
            space("pods' disks", &folder, bytes, advice)
        }
        Err(error) => finding(
            "pods' disks",
            Level::Missing,
            format!("make a file in {}: {error}", folder.display()),
            "set disk_dir to a folder that is writable, on ext4, XFS, btrfs or tmpfs",
        ),
    }
}

fn space(what: &'static str, folder: &Path, needed: u64, advice: &str) -> Finding {
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(folder);
    match nix::sys::statvfs::statvfs(existing) {
        Ok(stat) => {
            let free = stat.blocks_available() * stat.fragment_size();
            let text = format!("{} MiB free at {}", free >> 20, folder.display());
            if free < needed {
                finding(what, Level::Warning, text, advice)
            } else {
                finding(what, Level::Ok, text, "")
            }
        }
        Err(error) => {
            let found = format!("look at {}: {error}", existing.display());
            finding(what, Level::Missing, found, "make the folder")
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use joey_shim::sandbox::record::{PodNetwork, Record, directory};

    use super::*;

    fn missing(finding: &Finding, words: &[&str]) {
        assert_eq!(finding.level, Level::Missing, "{finding:?}");
        for word in words {
            assert!(finding.found.contains(word), "{finding:?}");
        }
        assert!(!finding.advice.is_empty(), "{finding:?}");
    }

    #[test]
    fn the_folder_of_disks_is_made_and_room_in_it_is_told() {
        let root = tempfile::tempdir().unwrap();
        let state_dir = root.path().join("state");
        let mut config = Config { state_dir, default_disk_mib: 0, ..Config::default() };
        std::fs::write(root.path().join("file"), "").unwrap();
        let found = disks(&config);
        assert_eq!((found.level, config.disk_dir().is_dir()), (Level::Ok, true), "{found:?}");
        assert!(found.found.contains("MiB free at"), "{found:?}");
        config.disk_dir = Some(root.path().join("file/disks"));
        missing(&disks(&config), &["file/disks", "Not a directory"]);
        config.disk_dir = Some("/proc/disks".into());
        missing(&disks(&config), &["/proc/disks"]);
    }

    #[test]
    fn room_for_less_than_is_needed_is_a_warning() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("not/there/yet");
        let enough = space("room", &folder, 1, "move it");
        assert_eq!((enough.level, enough.advice.as_str()), (Level::Ok, ""));
        let little = space("room", &folder, u64::MAX, "move it");
        assert_eq!((little.level, little.advice.as_str()), (Level::Warning, "move it"));
    }

    #[test]
    fn pods_that_no_change_reaches_are_told_by_name() {
        let root = tempfile::tempdir().unwrap();
        let [bpf_dir, run_dir] = ["bpf", "run"].map(|name| root.path().join(name));
        let network = PodNetwork { maps: bpf_dir.join("policy-1"), ..PodNetwork::default() };
        let pod = Some("a/old".to_owned());
        let record = Record { pod, network: Some(network), ..Record::default() };
        record.write(&directory(&run_dir, "1")).unwrap();
        let config = Config { bpf_dir, run_dir, ..Config::default() };
        let found = policy(&config);
        assert_eq!(found.level, Level::Warning, "{found:?}");
        assert!(found.found.contains("do not reach: a/old"), "{found:?}");
    }

    #[test]
    fn a_kernel_without_taps_is_told() {
        assert_eq!(taps(Path::new("/dev/null")).level, Level::Ok);
        let root = tempfile::tempdir().unwrap();
        missing(&taps(&root.path().join("tun")), &["tun", "No such file"]);
    }

    #[test]
    fn json_has_levels_as_words() {
        let json = serde_json::json!(finding("taps", Level::Missing, "none", "modprobe"));
        let expected = serde_json::json!({
            "what": "taps", "level": "missing", "found": "none", "advice": "modprobe"
        });
        assert_eq!(json, expected);
    }
}

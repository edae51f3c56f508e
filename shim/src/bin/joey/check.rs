//! `joey check`: what this node has, what is missing, and what to do about it.

use std::path::Path;

use anyhow::Result;
use joey_shim::config::Config;
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
    all.push(space(&config.state_dir));
    Ok(all)
}

fn ebpf(config: &Config) -> Finding {
    match joey_ebpf::loader::load(&config.bpf_dir) {
        Ok(path) => finding("eBPF wire", Level::Ok, path.display(), ""),
        Err(error) => {
            finding("eBPF wire", Level::Missing, error, "mount -t bpf bpf /sys/fs/bpf, as root")
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

fn space(state_dir: &Path) -> Finding {
    /// A template and a few images.
    const NEEDED: u64 = 2 << 30;
    let existing = state_dir.ancestors().find(|path| path.exists()).unwrap_or(state_dir);
    match nix::sys::statvfs::statvfs(existing) {
        Ok(stat) => {
            let free = stat.blocks_available() * stat.fragment_size();
            let text = format!("{} MiB free at {}", free >> 20, state_dir.display());
            if free < NEEDED {
                finding("disk space", Level::Warning, text, "free some, or move state_dir")
            } else {
                finding("disk space", Level::Ok, text, "")
            }
        }
        Err(error) => finding("disk space", Level::Missing, error, "make state_dir"),
    }
}

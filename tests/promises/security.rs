//! A container's process has the rights it was given, and no more.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use joey_tests::node::{config, traces};
use joey_tests::pod::{self, SOON};
use k8s_cri::v1::{Capability, Int64Value, SecurityProfile, security_profile::ProfileType};

use crate::context::{Context, Test, holds, refused, same, skip};

pub const TESTS: &[Test] = &[
    Test { name: "security::vmm_is_jailed", run: vmm_is_jailed },
    Test { name: "security::user_by_number", run: user_by_number },
    Test { name: "security::user_by_name", run: user_by_name },
    Test { name: "security::unknown_user_is_refused", run: unknown_user },
    Test { name: "security::capabilities", run: capabilities },
    Test { name: "security::no_new_privileges", run: no_new_privileges },
    Test { name: "security::read_only_root", run: read_only_root },
    Test { name: "security::seccomp", run: seccomp },
    Test { name: "security::seccomp_compares_arguments", run: seccomp_compares_arguments },
    Test { name: "security::rlimits", run: rlimits },
    Test { name: "security::masked_paths", run: masked_paths },
    Test { name: "security::sysctl", run: sysctl },
];

fn user_by_number(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("uid")?;
    let mut config =
        pod::script("c", "id -u; id -g; id -G; touch /tmp/mine && stat -c %u:%g /tmp/mine");
    let security = pod::security(&mut config);
    security.run_as_user = Some(Int64Value { value: 1234 });
    security.run_as_group = Some(Int64Value { value: 4321 });
    security.supplemental_groups = vec![7, 8];
    same("ids", pod.finish(&config)?.text(), "1234\n4321\n4321 7 8\n1234:4321")?;
    pod.remove()
}

fn user_by_name(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("username")?;
    let mut config = pod::script("c", "id -u; id -g; id -G; echo $HOME");
    pod::security(&mut config).run_as_username = "app".into();
    same("ids", pod.finish(&config)?.text(), "1000\n1000\n1000 2000\n/home/app")?;
    let container = pod.start(&pod::script("root", "sleep 1000"))?;
    same("root", container.sh("id -u")?.text(), "0")?;
    pod.remove()
}

fn unknown_user(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("nouser")?;
    let mut config = pod::script("c", "id");
    pod::security(&mut config).run_as_username = "nobody-here".into();
    refused("unknown user", pod.start(&config), "user")?;
    pod.remove()
}

fn capabilities(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("caps")?;
    let show = "grep -E 'CapEff|CapBnd' /proc/self/status | cut -f2";
    let default = pod.script(show)?.text();
    same("default", default.as_str(), "00000000a80425fb\n00000000a80425fb")?;
    let mut config = pod::script("none", show);
    pod::security(&mut config).capabilities =
        Some(Capability { drop_capabilities: vec!["ALL".into()], ..Capability::default() });
    same("none", pod.finish(&config)?.text(), "0000000000000000\n0000000000000000")?;
    let mut config = pod::script("one", show);
    pod::security(&mut config).capabilities = Some(Capability {
        drop_capabilities: vec!["ALL".into()],
        add_capabilities: vec!["NET_ADMIN".into()],
        ..Capability::default()
    });
    same("one", pod.finish(&config)?.text(), "0000000000001000\n0000000000001000")?;
    let mut config = pod::script("user", "grep CapEff /proc/self/status | cut -f2");
    pod::security(&mut config).run_as_user = Some(Int64Value { value: 1000 });
    same("not root", pod.finish(&config)?.text(), "0000000000000000")?;
    pod.remove()
}

fn no_new_privileges(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("nnp")?;
    let mut config = pod::script("c", "grep NoNewPrivs /proc/self/status | cut -f2");
    pod::security(&mut config).no_new_privs = true;
    same("set", pod.finish(&config)?.text(), "1")?;
    pod::security(&mut config).no_new_privs = false;
    config.log_path = "second.log".into();
    same("unset", pod.finish(&config)?.text(), "0")?;
    pod.remove()
}

fn read_only_root(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("readonly")?;
    let mut config =
        pod::script("c", "touch /new; touch /etc/replaced; touch /dev/shm/ok && echo shm");
    pod::security(&mut config).readonly_rootfs = true;
    let output = pod.finish(&config)?;
    same("stdout", output.text(), "shm")?;
    holds("stderr", &String::from_utf8_lossy(&output.stderr), "Read-only file system")?;
    pod.remove()
}

fn seccomp(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("seccomp")?;
    let text = "grep Seccomp: /proc/self/status | cut -f2; unshare -m true 2>/dev/null || echo refused; \
                kill -0 $$ && echo ordinary";
    let mut config = pod::script("c", text);
    pod::security(&mut config).seccomp = Some(SecurityProfile {
        profile_type: ProfileType::RuntimeDefault.into(),
        localhost_ref: String::new(),
    });
    same("default profile", pod.finish(&config)?.text(), "2\nrefused\nordinary")?;
    pod.remove()
}

fn seccomp_compares_arguments(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("seccompargs")?;
    let set_user_id = |call: &str, index: u32| {
        serde_json::json!({
            "names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": nix::libc::EPERM,
            "args": [{"index": index, "value": 0o4000, "valueTwo": 0o4000, "op": "SCMP_CMP_MASKED_EQ"}]
        })
    };
    // A signal below another: two arguments at once.
    let signals = serde_json::json!({
        "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": nix::libc::EPERM,
        "args": [
            {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
            {"index": 1, "value": nix::libc::SIGUSR2, "op": "SCMP_CMP_LT"}
        ]
    });
    let rules = [set_user_id("chmod", 1), set_user_id("fchmodat", 2), signals];
    let profile = serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules});
    let file = ctx.node.dir().join("seccomp-arguments.json");
    fs::write(&file, profile.to_string())?;
    let text = "touch /tmp/f; chmod 1755 /tmp/f && echo sticky; chmod 4755 /tmp/f || echo refused; \
        trap : USR1 USR2; kill -USR2 1 && echo second; kill -USR1 1 || echo refused; \
        sleep 1000 & kill -USR1 $! && echo another";
    let mut config = pod::script("c", &format!("exec 2>/dev/null; {text}"));
    pod::security(&mut config).seccomp = Some(SecurityProfile {
        profile_type: ProfileType::Localhost.into(),
        localhost_ref: file.display().to_string(),
    });
    let expected = "sticky\nrefused\nsecond\nrefused\nanother";
    same("what is refused", pod.finish(&config)?.text(), expected)?;
    fs::remove_file(file)?;
    pod.remove()
}

/// containerd takes them from the runtime's base specification, where an administrator writes them.
fn rlimits(ctx: &Context<'_>) -> Result<()> {
    let handler = match ctx.handler {
        "joey" => config::LIMITED,
        _ => return skip("a handler of the node with its own base specification, Joey's alone"),
    };
    let pod = pod::Pod::run_with(ctx.node, handler, pod::config(ctx.node, "rlimits"))?;
    let text = "ulimit -Sn; ulimit -Hn; ulimit -c; grep -E '^Max (locked|open)' /proc/1/limits";
    let found = pod.script(text)?.text();
    let found: Vec<_> = found.split_whitespace().collect();
    let expected =
        "1234 4321 0 Max open files 1234 4321 files Max locked memory 65536 131072 bytes";
    same("limits", found.join(" ").as_str(), expected)?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    same("limit of an exec", container.sh("ulimit -Hn")?.text(), "4321")?;
    pod.remove()
}

fn masked_paths(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("masked")?;
    let mut config = pod::script(
        "c",
        "cat /proc/timer_list | wc -c; ls /proc/scsi 2>/dev/null | wc -l; \
        echo 1 2>/dev/null > /proc/sys/kernel/dmesg_restrict || echo refused; sleep 1000",
    );
    let security = pod::security(&mut config);
    security.masked_paths =
        vec!["/proc/timer_list".into(), "/proc/scsi".into(), "/not/there".into()];
    security.readonly_paths = vec!["/proc/sys".into()];
    let container = pod.start(&config)?;
    container.wait_output("0\n0\nrefused", SOON)?;
    pod.remove()
}

fn sysctl(ctx: &Context<'_>) -> Result<()> {
    let mut config = pod::config(ctx.node, "sysctl");
    if let Some(linux) = &mut config.linux {
        linux.sysctls.insert("net.ipv4.ip_local_port_range".into(), "2000 3000".into());
        linux.sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
    }
    let pod = pod::Pod::run_with(ctx.node, ctx.handler, config)?;
    let text = "cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/shm_rmid_forced";
    same("values", pod.script(text)?.text(), "2000\t3000\n1")?;
    pod.remove()
}

/// What the kernel says of the VMM while its guest runs.
fn vmm_is_jailed(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = ctx.pod("jailed")?;
    same("output", pod.script("echo ok")?.text(), "ok")?;
    let shim = ctx.node.processes().into_iter().find(|(_, command)| command.contains(&pod.id));
    let (shim, _) = shim.context("the pod has no shim")?;
    let mut processes = ctx.node.processes().into_iter().map(|(pid, _)| pid);
    let vmm = processes.find(|pid| traces::parent(*pid) == Some(shim));
    let proc = PathBuf::from(format!("/proc/{}", vmm.context("the shim has no VMM")?));
    let status = fs::read_to_string(proc.join("status"))?;
    let field = |name: &str| -> Vec<&str> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().split_whitespace().collect()
    };
    for ids in ["Uid", "Gid"] {
        ensure!(field(ids).len() == 4 && !field(ids).contains(&"0"), "{ids}: {:?}", field(ids));
    }
    same("supplementary groups", field("Groups").len(), 0)?;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        same(set, field(set), ["0000000000000000"])?;
    }
    same("no_new_privs", field("NoNewPrivs"), ["1"])?;
    same("seccomp", field("Seccomp"), ["2"])?;
    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        let of = |proc: &Path| fs::read_link(proc.join("ns").join(namespace));
        ensure!(of(&proc)? != of(Path::new("/proc/self"))?, "the test's {namespace} namespace");
        let shims = PathBuf::from(format!("/proc/{shim}"));
        ensure!(of(&proc)? != of(&shims)?, "the shim's {namespace} namespace");
    }
    // What is left of the root is what things were mounted on.
    for (path, kind) in files_below(&proc.join("root")) {
        ensure!(kind == 0, "{} has {kind} bytes", path.display());
    }
    let mounts = fs::read_to_string(proc.join("mountinfo"))?;
    same("mounts", mounts.lines().count(), 1)?;
    ensure!(mounts.contains(" / / ro"), "{mounts}");
    for entry in fs::read_dir(proc.join("fd"))? {
        let entry = entry?;
        let target = fs::read_link(entry.path())?.to_string_lossy().into_owned();
        let info = fs::read_to_string(proc.join("fdinfo").join(entry.file_name()))?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("1");
        let read_only = !flags.ends_with(['1', '2', '3']);
        // Files of the node: the template's memory and state and images, and none to write to. A mount
        // that has been taken away since is shown as "/".
        let file = target == "/" || target.contains("/templates/") || target.contains("/images/");
        let file = file && read_only && entry.path().metadata()?.is_file();
        let others = ["socket:", "pipe:", "anon_inode:", "/dev/null", "/dev/net/tun", "/dev/kvm"];
        let other =
            target.starts_with("/memfd:") || others.iter().any(|known| target.starts_with(known));
        // The pod's own disk, which no name leads to.
        let own = target.contains("/joey/disks/#") && target.ends_with(" (deleted)");
        ensure!(file || other || own, "open: {target} {info}");
    }
    pod.remove()
}

/// Regular files with their sizes.
fn files_below(folder: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => found.extend(files_below(&entry.path())),
            Ok(meta) if meta.is_file() => found.push((entry.path(), meta.len())),
            _ => {}
        }
    }
    found
}

//! Limits hold, and what was used is told.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use joey_tests::node::cgroups;
use joey_tests::pod::{self, Pod, SOON};
use k8s_cri::v1::{LinuxContainerResources, UpdateContainerResourcesRequest};

use crate::context::{Context, Test, refused, same};
use crate::faults::vmm;

pub const TESTS: &[Test] = &[
    Test { name: "limits::memory_kill_is_told", run: memory_kill_is_told },
    Test { name: "limits::memory_kill_spares_neighbours", run: memory_kill_spares_neighbours },
    Test { name: "limits::memory_kill_spares_the_vmm", run: memory_kill_spares_the_vmm },
    Test { name: "limits::oom_score_follows_the_containers", run: oom_score_follows },
    Test { name: "limits::statistics", run: statistics },
    Test { name: "limits::cpu_quota", run: cpu_quota },
    Test { name: "limits::update", run: update },
    Test { name: "limits::processors_are_the_hosts", run: processors_are_the_hosts },
];

/// Fills memory: tail keeps what it read as there is no line end.
const EAT: &str = "dd if=/dev/zero bs=1M count=200 2>/dev/null | tail";

fn limited(name: &str, text: &str, mib: i64) -> k8s_cri::v1::ContainerConfig {
    let mut config = pod::script(name, text);
    pod::resources(&mut config).memory_limit_in_bytes = mib << 20;
    pod::resources(&mut config).memory_swap_limit_in_bytes = mib << 20;
    config
}

/// As the kubelet's static CPU manager sets them. In the guest such numbers would be others'.
fn processors_are_the_hosts(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = ctx.pod("processors")?;
    let vmm = vmm(ctx, &pod)?;
    let bound = || -> Result<String> {
        let status = fs::read_to_string(format!("/proc/{vmm}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        Ok(line.unwrap_or_default().trim().to_owned())
    };
    let all = bound()?;
    let on = |name: &str, cpus: &str| {
        let mut config = pod::script(name, "sleep 1000");
        pod::resources(&mut config).cpuset_cpus = cpus.into();
        config
    };
    let container = pod.start(&on("last", "1"))?;
    same("bound to", bound()?.as_str(), "1")?;
    ctx.node.cri.update(UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(LinuxContainerResources { cpuset_cpus: "0".into(), ..Default::default() }),
        ..Default::default()
    })?;
    same("bound anew", bound()?.as_str(), "0")?;
    let free = pod.start(&pod::script("free", "sleep 1000"))?;
    same("beside one that is not bound", bound()?, all)?;
    ctx.node.cri.remove(&free.id)?;
    same("without it", bound()?.as_str(), "0")?;
    let wrong = pod.start(&on("wrong", "0,4000"));
    refused("a processor that is not there", wrong, "cpus \"0,4000\"")?;
    pod.remove()
}

fn memory_kill_is_told(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("oom")?;
    let container = pod.start(&limited("c", &format!("exec sh -c '{EAT}'; wait; exit 137"), 24))?;
    let status = container.wait(SOON)?;
    same("reason", status.reason.as_str(), "OOMKilled")?;
    pod.remove()
}

fn memory_kill_spares_neighbours(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("oomspare")?;
    let other = pod.start(&pod::script("other", "sleep 1000"))?;
    pod.start(&limited("c", EAT, 24))?.wait(SOON)?;
    same("neighbour", other.sh("echo ok")?.text(), "ok")?;
    pod.remove()
}

/// The RuntimeClass's `overhead.podFixed` that docs/configuration.md asks for.
const OVERHEAD: i64 = 160 << 20;

/// With the limit that the kubelet sets on the node for a pod of one container, which uses all it may.
fn memory_kill_spares_the_vmm(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let limit = 128 << 20;
    let mut config = pod::config(ctx.node, "hostlimit");
    let linux = config.linux.get_or_insert_default();
    let bytes = |memory_limit_in_bytes| LinuxContainerResources {
        memory_limit_in_bytes,
        ..LinuxContainerResources::default()
    };
    linux.resources = Some(bytes(limit));
    linux.overhead = Some(bytes(OVERHEAD));
    let cgroup = linux.cgroup_parent.clone();
    cgroups::make(&cgroup)?;
    cgroups::limit_memory(&cgroup, limit + OVERHEAD)?;
    let pod = Pod::run_with(ctx.node, ctx.handler, config)?;
    let before = vmm(ctx, &pod)?;
    // Writes more than it may keep in memory, then keeps more than it may.
    let text = "dd if=/dev/zero of=/big bs=1M count=300 2>/dev/null; echo written; \
        dd if=/dev/zero bs=1M count=300 2>/dev/null | tail";
    let container = pod.start(&limited("c", &format!("{text}; exit 137"), 128))?;
    let status = container.wait(Duration::from_secs(200))?;
    same("reason", status.reason.as_str(), "OOMKilled")?;
    same("before it", container.logs()?.0, b"written\n".to_vec())?;
    same("pod lives on", pod.script("echo ok")?.text(), "ok")?;
    same("VMM", vmm(ctx, &pod)?, before)?;
    let (own, most) = (cgroups::own_memory(&cgroup)? >> 20, (limit + OVERHEAD) >> 20);
    println!("        {own} MiB are the VMM's and the shim's own, of {most} MiB");
    pod.remove()
}

fn oom_score_follows(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = ctx.pod("oomscore")?;
    let vmm = vmm(ctx, &pod)?;
    let score = || -> Result<String> {
        Ok(fs::read_to_string(format!("/proc/{vmm}/oom_score_adj"))?.trim().to_owned())
    };
    let start = |name: &str, score| {
        let mut config = pod::script(name, "sleep 1000");
        pod::resources(&mut config).oom_score_adj = score;
        pod.start(&config)
    };
    start("first", 900)?;
    same("score of one", score()?, "900")?;
    let second = start("second", 300)?;
    same("score of two", score()?, "300")?;
    second.remove(Duration::ZERO)?;
    same("score when one has gone", score()?, "900")?;
    pod.remove()
}

fn statistics(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("stats")?;
    let container = pod.start(&pod::script(
        "c",
        "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo up; sleep 1000",
    ))?;
    container.wait_output("up", SOON)?;
    let stats = ctx.node.cri.stats(&container.id)?;
    let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).unwrap_or_default().value;
    let memory = stats.memory.and_then(|memory| memory.working_set_bytes).unwrap_or_default().value;
    ensure!(cpu > 20_000_000, "CPU time {cpu} ns");
    ensure!((4 << 10..256 << 20).contains(&memory), "memory {memory} bytes");
    pod.remove()
}

fn cpu_quota(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("quota")?;
    let mut config = pod::script("c", "while :; do :; done");
    pod::resources(&mut config).cpu_period = 100_000;
    pod::resources(&mut config).cpu_quota = 20_000;
    let container = pod.start(&config)?;
    let used = || -> Result<u64> {
        let stats = ctx.node.cri.stats(&container.id)?;
        Ok(stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).unwrap_or_default().value)
    };
    std::thread::sleep(Duration::from_millis(500));
    let before = used()?;
    std::thread::sleep(Duration::from_secs(2));
    let share = (used()? - before) as f64 / 2e9;
    ensure!((0.02..0.4).contains(&share), "used {share:.2} of a CPU with a quota of 0.2");
    pod.remove()
}

fn update(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("update")?;
    let container = pod.start(&limited("c", "sleep 1000", 64))?;
    let limit = || -> Result<String> {
        let files = "/sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes";
        Ok(container.sh(&format!("cat {files} 2>/dev/null"))?.text())
    };
    same("limit", limit()?, (64 << 20).to_string())?;
    let mut resources = pod::resources(&mut pod::script("x", "")).clone();
    resources.memory_limit_in_bytes = 32 << 20;
    resources.memory_swap_limit_in_bytes = 32 << 20;
    ctx.node.cri.update(UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(resources),
        ..UpdateContainerResourcesRequest::default()
    })?;
    same("limit after the update", limit()?, (32 << 20).to_string())?;
    pod.remove()
}

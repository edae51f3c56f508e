//! A machine in reserve: quick, nobody's before it is claimed, one sandbox's after that.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use joey_tests::pod::{self, SOON};
use joey_tests::process;
use serde_json::Value;

use crate::context::{Context, Test, same};
use crate::identity;

pub const TESTS: &[Test] = &[
    Test { name: "standby::serves_one_sandbox", run: serves_one_sandbox },
    Test { name: "standby::pods_differ", run: pods_differ },
    Test { name: "standby::killed_is_no_matter", run: killed_is_no_matter },
    Test { name: "standby::other_sizes_are_cloned", run: other_sizes_are_cloned },
    Test { name: "standby::outdated_leaves", run: outdated_leaves },
];

pub fn list(ctx: &Context<'_>) -> Result<Vec<Value>> {
    Ok(serde_json::from_str(&ctx.node.joey(&["--json", "standby", "ls"])?)?)
}

/// Has a machine prepared, if there is none, and waits for it: its record.
pub fn ready(ctx: &Context<'_>) -> Result<Value> {
    if list(ctx)?.is_empty() {
        ctx.pod("before")?.remove()?;
    }
    let end = Instant::now() + SOON;
    loop {
        // A machine listens as soon as its record has the clone.
        match list(ctx)?.into_iter().find(|one| one["cloned"] == true) {
            Some(one) => return Ok(one),
            None => ensure!(Instant::now() < end, "no machine was prepared: {:?}", list(ctx)?),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The VMM of a pod, as its record names it.
fn vmm(ctx: &Context<'_>, id: &str) -> Result<Value> {
    let seen: Value = serde_json::from_str(&ctx.node.joey(&["--json", "inspect", id])?)?;
    Ok(seen["record"]["vmm"].clone())
}

fn serves_one_sandbox(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let machine = ready(ctx)?;
    let (first, second) = (ctx.pod("first")?, ctx.pod("second")?);
    same("the first pod's VMM", vmm(ctx, &first.id)?, machine["vmm"].clone())?;
    ensure!(vmm(ctx, &second.id)? != machine["vmm"], "two pods in one machine");
    for pod in [first, second] {
        same("output", pod.script("echo ok")?.text(), "ok")?;
        let command = ctx.node.processes().into_iter().find(|(_, line)| line.contains(&pod.id));
        ensure!(command.is_some(), "no shim names sandbox {}", pod.id);
        pod.remove()?;
    }
    Ok(())
}

fn pods_differ(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let mut seen = BTreeSet::new();
    for number in 0..3 {
        ready(ctx)?;
        for value in identity::identity(ctx, number)? {
            ensure!(seen.insert(value.clone()), "{value:?} twice");
        }
    }
    Ok(())
}

fn killed_is_no_matter(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    for part in ["shim", "vmm"] {
        let machine = ready(ctx)?;
        let pid = machine[part]["pid"].as_u64().unwrap_or_default();
        // The record has the number that the process has on the node.
        let Some(pid) = ctx.node.outside(u32::try_from(pid)?) else { bail!("no process {pid}") };
        process::kill(pid)?;
        let pod = ctx.pod("after")?;
        same("output", pod.script("echo ok")?.text(), "ok")?;
        pod.remove()?;
        // What a killed keeper has left is removed as an orphan, after a while.
        let end = Instant::now() + SOON;
        while list(ctx)?.iter().any(|one| one["id"] == machine["id"]) {
            ensure!(Instant::now() < end, "{} is left", machine["id"]);
            std::thread::sleep(Duration::from_millis(500));
            ctx.node.joey(&["clean"])?;
        }
    }
    Ok(())
}

fn other_sizes_are_cloned(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let machine = ready(ctx)?;
    let mut config = pod::config(ctx.node, "larger");
    config.annotations.insert("io.joey.memory".into(), "300Mi".into());
    let pod = pod::Pod::run_with(ctx.node, ctx.handler, config)?;
    ensure!(vmm(ctx, &pod.id)? != machine["vmm"], "a pod of another size got the machine");
    same("processors", processors_and_mebibytes(&pod)?.0, 1)?;
    sized(&pod, 300)?;
    pod.remove()?;
    sized_as_cri_says(ctx)
}

/// As the kubelet sums up a pod's limits for its sandbox.
fn sized_as_cri_says(ctx: &Context<'_>) -> Result<()> {
    let mut config = pod::config(ctx.node, "summed");
    let resources = config.linux.get_or_insert_default().resources.get_or_insert_default();
    (resources.cpu_period, resources.cpu_quota) = (100_000, 150_000);
    resources.memory_limit_in_bytes = 500 << 20;
    let pod = pod::Pod::run_with(ctx.node, ctx.handler, config)?;
    same("processors", processors_and_mebibytes(&pod)?.0, 2)?;
    sized(&pod, 500)?;
    pod.remove()
}

/// Checks that the guest has what the pod asked for, and no more than the next size.
fn sized(pod: &pod::Pod<'_>, wanted: u64) -> Result<()> {
    let (_, memory) = processors_and_mebibytes(pod)?;
    ensure!((wanted..4 * wanted).contains(&memory), "{memory} MiB for {wanted} MiB");
    Ok(())
}

fn processors_and_mebibytes(pod: &pod::Pod<'_>) -> Result<(u32, u64)> {
    let text =
        pod.script("nproc; sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?.text();
    let Some((processors, memory)) = text.split_once('\n') else { bail!("{text:?}") };
    Ok((processors.trim().parse()?, memory.trim().parse::<u64>()? / 1024))
}

fn outdated_leaves(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let machine = ready(ctx)?;
    let path = ctx.node.dir().join("joey.toml");
    let normal = fs::read_to_string(&path)?;
    fs::write(&path, format!("standby = 0\n{normal}"))?;
    let left = || -> Result<()> {
        let pod = ctx.pod("without")?;
        ensure!(vmm(ctx, &pod.id)? != machine["vmm"], "claimed with another configuration");
        pod.remove()?;
        let end = Instant::now() + SOON;
        while !list(ctx)?.is_empty() {
            ensure!(Instant::now() < end, "still there: {:?}", list(ctx)?);
            std::thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    }();
    fs::write(&path, normal)?;
    left
}

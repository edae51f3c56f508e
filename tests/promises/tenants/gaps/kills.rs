//! Kills while pods send and are sent to.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use joey_tests::capture::Capture;
use joey_tests::node::{cgroups, config};
use joey_tests::pod::{self, Container, Pod};
use joey_tests::process;
use k8s_cri::v1::PodSandboxConfig;

use super::{Arrived, Flood, forget_maps, heard_nothing, only_joey, to_the_node, watched};
use crate::context::Context;
use crate::faults;
use crate::kills::Victim::{self, Containerd, Shim, Vmm};
use crate::kills::{interrupt, kill_at, settled, standby};
use crate::tenants::{Policy, told};

/// How long things stay as they are while who holds them is held, or is gone.
const A_WHILE: Duration = Duration::from_millis(200);

/// A pod whose container sends, and has begun to.
fn sending<'n>(
    ctx: &Context<'n>,
    arrived: &Arrived,
    name: &str,
) -> Result<(Pod<'n>, Container<'n>)> {
    let pod = ctx.pod(name)?;
    let container = pod.start(&to_the_node())?;
    arrived.more()?;
    Ok((pod, container))
}

/// Shim, VMM, containerd, the network daemon, a policy that is being applied: killed while a pod sends.
pub fn by_kills(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let policy = Policy::new(ctx);
    let flood = Flood::run(ctx, 8)?;
    watched(ctx, |arrived| {
        // The daemon: the pod goes on.
        let (pod, container) = sending(ctx, arrived, "daemon")?;
        ctx.node.kill_network()?;
        arrived.more()?;
        ctx.node.start_network()?;
        ctx.node.kill_containerd()?;
        arrived.more()?;
        ctx.node.start_containerd()?;
        arrived.more()?;
        // Policies that are killed while they are applied, anywhere.
        let file = ctx.node.dir().join("killed.yaml");
        let more = "  allow:\n  - {from: default, to: nobody, ports: [any]}\n";
        std::fs::write(&file, format!("{}{more}", config::POLICY))?;
        for milliseconds in 0..25 {
            let mut command = Command::new(joey_tests::paths::joey());
            command.args(["policy", "apply", "-f"]).arg(&file).stdin(Stdio::null());
            command.env("JOEY_CONFIG", ctx.node.dir().join("joey.toml"));
            command.stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = ctx.node.spawn_inside(command)?;
            std::thread::sleep(Duration::from_millis(milliseconds * 2));
            let _ = child.kill();
            child.wait()?;
        }
        std::fs::remove_file(&file)?;
        policy.apply("")?;
        arrived.more()?;
        heard_nothing(&container)?;
        pod.remove()?;
        // Those without whom the pod ends.
        for victim in ["shim", "VMM"] {
            let (pod, container) = sending(ctx, arrived, victim)?;
            let told = told(ctx, &["ps"])?.to_string();
            let mark = if victim == "shim" { "containerd-shim-joey-v2" } else { "qemu" };
            let found = ctx.node.processes().into_iter().find(|(_, name)| {
                name.contains(mark) && (victim == "VMM" || name.contains(&pod.id))
            });
            let (pid, _) = found.with_context(|| format!("no {victim} of {}: {told}", pod.id))?;
            process::kill(pid)?;
            container.wait(pod::SOON)?;
            heard_nothing(&container)?;
            pod.remove()?;
        }
        Ok(())
    })?;
    flood.end()
}

/// Steps of a start before a container can send, and who is killed there.
const START: [(&str, &[Victim]); 6] = [
    ("start.wire", &[Shim]),
    ("start.admission", &[Shim]),
    ("start.attached", &[Shim]),
    ("vmm.spawned", &[Shim, Vmm]),
    ("start.identity", &[Shim, Vmm, Containerd]),
    ("start.identified", &[Shim, Vmm]),
];
/// Steps of a stop.
const STOP: [(&str, &[Victim]); 6] = [
    ("stop.kill", &[Shim, Vmm]),
    ("stop.killed", &[Shim]),
    ("teardown.processes", &[Shim, Containerd]),
    ("teardown.wire", &[Shim]),
    ("teardown.policy", &[Shim]),
    ("teardown.cgroups", &[Shim]),
];
/// Steps of a change of the policy, by `joey policy apply` or when it is loaded.
const CHANGE: [&str; 3] = ["policy-written", "policy-persisted", "policy-active"];

/// At each step at which a process can be held, while another tenant's pod sends to the pod, and the pod, once it
/// has a container, to everybody. What is sent to a pod without a container is looked for on its VM's wire.
pub fn at_each_step(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let policy = Policy::new(ctx);
    standby(ctx, 0, || {
        let before = ctx.node.traces();
        let flood = Flood::run(ctx, 40)?;
        let mut started = Vec::new();
        watched(ctx, |arrived| {
            for (point, victims) in START {
                for victim in victims {
                    let config = pod::config(ctx.node, "starting");
                    started.push(config.clone());
                    start(ctx, &flood, config, point, *victim)
                        .with_context(|| format!("{victim:?} killed at {point}"))?;
                }
            }
            for (point, victims) in STOP {
                for victim in victims {
                    stop(ctx, arrived, point, *victim)
                        .with_context(|| format!("{victim:?} killed at {point}"))?;
                }
            }
            let (pod, container) = sending(ctx, arrived, "steady")?;
            let file = ctx.node.dir().join("policy.yaml");
            let apply = ["policy", "apply", "-f", &file.to_string_lossy()];
            for point in CHANGE {
                change(ctx, point, &apply)?;
                arrived.more().with_context(|| format!("policy apply killed at {point}"))?;
            }
            policy.apply("")?;
            // Loaded anew beside a pod that has the maps of before.
            ctx.node.kill_network()?;
            forget_maps(ctx)?;
            for point in CHANGE {
                change(ctx, point, &["ebpf", "load"])?;
                arrived.more().with_context(|| format!("ebpf load killed at {point}"))?;
                std::thread::sleep(A_WHILE);
            }
            let after = sending(ctx, arrived, "after")?;
            ctx.node.start_network()?;
            for (pod, container) in [(pod, container), after] {
                heard_nothing(&container)?;
                pod.remove()?;
            }
            Ok(())
        })?;
        flood.end()?;
        faults::nothing_is_left(ctx)?;
        for config in started {
            cgroups::remove(&config.linux.unwrap_or_default().cgroup_parent);
            let _ = std::fs::remove_dir_all(&config.log_directory);
        }
        settled(ctx, &before)
    })
}

/// A pod that is being started.
fn start(
    ctx: &Context<'_>,
    flood: &Flood<'_>,
    config: PodSandboxConfig,
    point: &str,
    victim: Victim,
) -> Result<()> {
    let run = || Pod::run_with(ctx.node, ctx.handler, config).map(drop);
    let told = interrupt(ctx, point, run, |held| {
        let netns = starting(ctx)?;
        flood.aim(ctx, &netns)?;
        let passes = |device| Capture::of_port(ctx.node, &netns, device, super::PORT);
        let interface = passes("eth0")?;
        // There is none yet before the wire is plugged.
        let tap = if point == "start.wire" { None } else { Some(passes("joey0")?) };
        std::thread::sleep(A_WHILE);
        victim.kill(ctx, held)?;
        std::thread::sleep(A_WHILE);
        let [sent_to_it, sent_by_it] = interface.datagrams();
        ensure!(sent_to_it > 1, "nothing is sent to the pod");
        let [sent, received] = tap.map_or([0, 0], |tap| tap.datagrams());
        ensure!(
            [sent_by_it, sent, received] == [0, 0, 0],
            "{received} of {sent_to_it} datagrams reached the VM, {sent} and {sent_by_it} left it"
        );
        Ok(())
    });
    if victim == Containerd {
        ctx.node.start_containerd()?;
    }
    // The pod, if it lives, went with its value: what the client is told is another test's.
    told.map(drop)
}

/// The network namespace of the pod that is being started.
fn starting(ctx: &Context<'_>) -> Result<String> {
    let all = told(ctx, &["ps"])?;
    let netns = all.as_array().into_iter().flatten().find_map(|pod| {
        let record = &pod["record"];
        let named = record["pod"].as_str().is_some_and(|name| name.ends_with("/starting"));
        named.then(|| record["netns"].as_str()).flatten().map(str::to_owned)
    });
    netns.with_context(|| format!("no namespace: {all}"))
}

/// A pod that is being stopped while its container sends.
fn stop(ctx: &Context<'_>, arrived: &Arrived, point: &str, victim: Victim) -> Result<()> {
    let (pod, container) = sending(ctx, arrived, "stopping")?;
    // What the client is told is another test's.
    let _ = kill_at(ctx, point, victim, || {
        std::thread::sleep(A_WHILE);
        ctx.node.cri.stop_pod(&pod.id)
    })?;
    std::thread::sleep(A_WHILE);
    heard_nothing(&container)?;
    pod.remove()
}

/// A command that changes the policy.
fn change(ctx: &Context<'_>, point: &str, arguments: &[&str]) -> Result<()> {
    let told = kill_at(ctx, point, Shim, || ctx.node.joey(arguments));
    ensure!(told?.is_err(), "{arguments:?} was not killed at {point}");
    Ok(())
}

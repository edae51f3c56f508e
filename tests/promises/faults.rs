//! When a part is killed, the pod ends with a reason and everything of it goes.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use joey_tests::node::traces;
use joey_tests::pod::{self, Pod, SOON};
use joey_tests::process;

use crate::context::{Context, Test, same};

pub const TESTS: &[Test] = &[
    Test { name: "faults::shim_killed", run: shim_killed },
    Test { name: "faults::vmm_killed", run: vmm_killed },
    Test { name: "faults::vmm_hangs", run: vmm_hangs },
    Test { name: "faults::container_killed_inside", run: container_killed_inside },
    Test { name: "faults::shim_killed_at_every_phase", run: shim_killed_at_every_phase },
    Test { name: "faults::vmm_killed_at_every_phase", run: vmm_killed_at_every_phase },
    Test {
        name: "faults::containerd_killed_at_every_phase",
        run: containerd_killed_at_every_phase,
    },
];

fn find(ctx: &Context<'_>, what: &str, part: &str) -> Result<u32> {
    let found =
        ctx.node.processes().into_iter().find(|(_, c)| c.contains(what) && c.contains(part));
    match found {
        Some((pid, _)) => Ok(pid),
        None => bail!("no process {what} … {part}; there are {:?}", ctx.node.processes()),
    }
}

fn shim_killed(ctx: &Context<'_>) -> Result<()> {
    // runc's containers outlive their shim, and runc's delete leaves their cgroups.
    ctx.only_joey()?;
    let pod = ctx.pod("shimkill")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    process::kill(find(ctx, "containerd-shim-", &pod.id)?)?;
    same("exit code", container.wait(SOON)?.exit_code, 255)?;
    pod.remove()
}

fn vmm_killed(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = ctx.pod("vmmkill")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    process::kill(vmm(ctx, &pod)?)?;
    let status = container.wait(SOON)?;
    same("ended as killed", [137, 255].contains(&status.exit_code), true)?;
    pod.remove()
}

fn vmm_hangs(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = ctx.pod("vmmhang")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    process::stop(vmm(ctx, &pod)?)?;
    let begun = Instant::now();
    ctx.node.cri.stop(&container.id, Duration::ZERO).or_else(|_| container.wait(SOON).map(drop))?;
    let status = container.wait(SOON)?;
    same("ended as killed", [137, 255].contains(&status.exit_code), true)?;
    same("in time", begun.elapsed() < SOON, true)?;
    pod.remove()
}

/// The VMM is the shim's child.
pub fn vmm(ctx: &Context<'_>, pod: &Pod<'_>) -> Result<u32> {
    let shim = find(ctx, "containerd-shim-", &pod.id)?;
    let mut processes = ctx.node.processes().into_iter();
    let child = processes.find(|(pid, _)| traces::parent(*pid) == Some(shim));
    child.map(|(pid, _)| pid).context("the shim has no VMM")
}

fn container_killed_inside(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("inside")?;
    let container = pod.start(&pod::script("c", "sleep 1000 & wait; sleep 1000"))?;
    ctx.node.cri.stop(&container.id, Duration::ZERO)?;
    same("exit code", container.wait(SOON)?.exit_code, 137)?;
    same("pod lives on", pod.script("echo ok")?.text(), "ok")?;
    pod.remove()
}

fn shim_killed_at_every_phase(ctx: &Context<'_>) -> Result<()> {
    killed_at_every_phase(ctx, "containerd-shim-joey")
}

fn vmm_killed_at_every_phase(ctx: &Context<'_>) -> Result<()> {
    killed_at_every_phase(ctx, "qemu")
}

/// Kills `victim` a while after it appeared.
fn killed_at_every_phase(ctx: &Context<'_>, victim: &str) -> Result<()> {
    ctx.only_joey()?;
    for delay in [5, 20, 40, 80, 120, 200] {
        let config = pod::config(ctx.node, "phase");
        let outcome = std::thread::scope(|scope| {
            let starter = scope.spawn(|| {
                let pod = Pod::run_with(ctx.node, ctx.handler, config)?;
                live(&pod)?;
                pod.remove()
            });
            let end = Instant::now() + Duration::from_secs(10);
            let found = loop {
                let found = find(ctx, victim, "");
                if found.is_ok() || Instant::now() > end {
                    break found;
                }
            };
            std::thread::sleep(Duration::from_millis(delay));
            if let Ok(pid) = found {
                let _ = process::kill(pid);
            }
            starter.join()
        });
        // It may have won the race; what counts is that it neither hangs nor leaves anything.
        if outcome.is_err() {
            bail!("the starting thread panicked");
        }
        nothing_is_left(ctx)?;
    }
    ctx.pod("after")?.remove()
}

fn containerd_killed_at_every_phase(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    for delay in [5, 60, 150] {
        // A pod that containerd was still making is known to nobody; its network is lost with runc, too.
        let pod = ctx.pod("phase")?;
        std::thread::scope(|scope| -> Result<()> {
            scope.spawn(|| live(&pod));
            std::thread::sleep(Duration::from_millis(delay));
            ctx.node.kill_containerd()?;
            ctx.node.start_containerd()
        })?;
        same("pod lives on", pod.script("echo ok")?.text(), "ok")?;
        // It may have been removed already, by the rule that follows.
        drop(pod);
        nothing_is_left(ctx)?;
    }
    ctx.pod("after")?.remove()
}

/// A container's life; whoever killed something knows why it fails.
fn live(pod: &Pod<'_>) -> Result<()> {
    pod.start(&pod::script("c", "sleep 1000"))?.sh("true").map(drop)
}

/// Removes all pods as a kubelet does, again and again, and sees all of Joey's go.
pub fn nothing_is_left(ctx: &Context<'_>) -> Result<()> {
    let end = Instant::now() + SOON;
    for pod in ctx.node.cri.pods()? {
        // containerd may yet have to hear of an end.
        let remove = || ctx.node.cri.stop_pod(&pod).and_then(|()| ctx.node.cri.remove_pod(&pod));
        while let Err(error) = remove() {
            ensure!(Instant::now() < end, "pod {pod} cannot be removed: {error:#}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    while find(ctx, "qemu", "").is_ok() {
        ensure!(Instant::now() < end, "a VMM outlived its shim: {:?}", ctx.node.processes());
    }
    // Where containerd does not call `delete`, the sandbox is an orphan after a while.
    while ctx.node.joey(&["--json", "ps"])?.trim() != "[]" {
        ensure!(Instant::now() < end, "not removed: {}", ctx.node.joey(&["ps"])?);
        ctx.node.joey(&["clean"])?;
    }
    Ok(())
}

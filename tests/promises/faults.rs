//! When a part of a running pod is killed, the pod ends with a reason and everything of it goes. Kills while
//! something is under way: [`crate::kills`].

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

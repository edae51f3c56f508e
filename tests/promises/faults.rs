//! When a part of a running pod is killed, the pod ends with a reason and everything of it goes. Kills while
//! something is under way: [`crate::kills`].

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use joey_tests::node::traces;
use joey_tests::pod::{self, Pod, SOON};
use joey_tests::process;

use crate::context::{Context, Test, holds, same};
use crate::templates;

pub const TESTS: &[Test] = &[
    Test { name: "faults::shim_killed", run: shim_killed },
    Test { name: "faults::vmm_killed", run: vmm_killed },
    Test { name: "faults::vmm_hangs", run: vmm_hangs },
    Test { name: "faults::container_killed_inside", run: container_killed_inside },
    Test { name: "faults::no_room_for_a_template", run: no_room_for_a_template },
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

/// Runs a command in the node, where its mounts are, on the folder of the templates; its output.
fn at_templates(ctx: &Context<'_>, command: &[&str]) -> Result<String> {
    let mut run = Command::new("sh");
    run.args(["-c", &command.join(" "), "sh"]).arg(templates::folder(ctx));
    let output = ctx.node.run_inside(run)?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "{command:?}: {text}");
    Ok(text)
}

/// Without room for a template a pod boots cold, and the next ones are cloned once there is room.
fn no_room_for_a_template(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    ctx.node.joey(&["standby", "rm"])?;
    at_templates(ctx, &["mount -t tmpfs -o size=64m,mode=700 joey-full $1"])?;
    let outcome = without_room(ctx).and_then(|()| with_room_again(ctx));
    // Machines that wait are clones of what is there.
    ctx.node.joey(&["standby", "rm"])?;
    at_templates(ctx, &["umount -l $1"])?;
    outcome
}

fn without_room(ctx: &Context<'_>) -> Result<()> {
    let log = ctx.node.dir().join("jrun/template-build.log");
    let _ = fs::remove_file(&log);
    same("cloned without room", templates::cloned(ctx)?, false)?;
    let end = Instant::now() + SOON;
    let told = || fs::read_to_string(&log).unwrap_or_default();
    while !told().contains("No space left on device") {
        ensure!(Instant::now() < end, "the builder of a template says: {:?}", told());
        std::thread::sleep(Duration::from_millis(100));
    }
    holds("the builder's words", &told(), &templates::folder(ctx).display().to_string())?;
    let half = || at_templates(ctx, &["find $1 -mindepth 1 -not -name '*.lock'"]);
    while !half()?.is_empty() {
        ensure!(Instant::now() < end, "left by a build without room: {}", half()?);
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn with_room_again(ctx: &Context<'_>) -> Result<()> {
    at_templates(ctx, &["mount -o remount,size=1g $1"])?;
    same("cloned of nothing", templates::cloned(ctx)?, false)?;
    let end = Instant::now() + 3 * SOON;
    while templates::list(ctx)?.is_empty() {
        ensure!(Instant::now() < end, "no template was built when there was room");
        std::thread::sleep(Duration::from_millis(200));
    }
    same("cloned with room again", templates::cloned(ctx)?, true)
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

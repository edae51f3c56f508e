//! containerd may go and come back; pods do not notice.

use std::time::Duration;

use anyhow::Result;
use joey_tests::pod::{self, SOON};
use k8s_cri::v1::ContainerState;

use crate::context::{Context, Test, same};

pub const TESTS: &[Test] = &[
    Test { name: "restart::pods_survive", run: pods_survive },
    Test { name: "restart::exit_while_away_is_known", run: exit_while_away },
];

fn pods_survive(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("survives")?;
    let container =
        pod.start(&pod::script("c", "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done"))?;
    container.wait_output("up", SOON)?;
    let created = pod.create(&pod::script("later", "echo later"))?;
    ctx.node.kill_containerd()?;
    std::thread::sleep(Duration::from_millis(300));
    ctx.node.start_containerd()?;
    same("state", container.status()?.state(), ContainerState::ContainerRunning)?;
    same("exec", container.sh("echo ok")?.text(), "ok")?;
    same("new container", pod.script("echo new")?.text(), "new")?;
    ctx.node.cri.remove(&created.id)?;
    ctx.node.cri.stop(&container.id, Duration::from_secs(10))?;
    same("exit code", container.wait(SOON)?.exit_code, 9)?;
    pod.remove()
}

fn exit_while_away(ctx: &Context<'_>) -> Result<()> {
    // containerd forgets the status of a container whose shim names no process; runc's does not.
    ctx.only_joey()?;
    let pod = ctx.pod("away")?;
    let container = pod.start(&pod::script("c", "sleep 0.5; exit 6"))?;
    ctx.node.kill_containerd()?;
    std::thread::sleep(Duration::from_secs(1));
    ctx.node.start_containerd()?;
    same("exit code", container.wait(SOON)?.exit_code, 6)?;
    pod.remove()
}

//! What is there for the pods to come: machines in reserve and the builders of templates.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_tests::node::config::Version;
use joey_tests::pod::SOON;
use joey_tests::process;

use super::Victim::{self, Containerd, Shim, Vmm};
use super::pods::Answer::{Done, Error};
use super::pods::Step;
use super::{failed, interrupt, kill_at, pods, settled, standby};
use crate::context::{Context, skip};
use crate::{standby as machines, templates};

/// A machine that is killed before it waits is missed by nobody.
pub(super) fn machine_in_preparation(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    standby(ctx, 1, || {
        let before = ctx.node.traces();
        for point in ["keeper.cloned", "keeper.rehearsed"] {
            for victim in [Shim, Vmm] {
                ctx.node.joey(&["standby", "rm"])?;
                kill_at(ctx, point, victim, || ctx.pod("before")?.remove())??;
                pods::after(ctx).with_context(|| format!("{point}, {victim:?} killed"))?;
            }
        }
        dead_machines_go(ctx)?;
        settled(ctx, &before)
    })
}

/// What a killed keeper has left is an orphan's after a while.
fn dead_machines_go(ctx: &Context<'_>) -> Result<()> {
    let end = Instant::now() + SOON;
    loop {
        let dead: Vec<String> = machines::list(ctx)?
            .into_iter()
            .filter(|one| {
                let keeper = one["shim"]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
                keeper.is_none_or(|pid| ctx.node.outside(pid).is_none())
            })
            .map(|one| one["id"].to_string())
            .collect();
        if dead.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "left of dead machines: {dead:?}");
        std::thread::sleep(Duration::from_millis(500));
        ctx.node.joey(&["clean"])?;
    }
}

/// A machine that is killed on the way to its sandbox costs at most that sandbox's start.
pub(super) fn machine_being_claimed(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    standby(ctx, 1, || {
        let before = ctx.node.traces();
        pods::with_machine(
            ctx,
            &[
                // It has the sandbox's name, and has not said so: `start` makes a machine of its own.
                (Step::Run, "keeper.named", &[(Shim, Done), (Vmm, Error), (Containerd, Error)]),
                (Step::Run, "keeper.claimed", &[(Shim, Error), (Vmm, Error)]),
                // `start` itself, before it has handed the sandbox over.
                (Step::Run, "bootstrap.go", &[(Shim, Error)]),
                (Step::Run, "start.identity", &[(Shim, Error), (Vmm, Error)]),
                (Step::Start, "create.call", &[(Vmm, Error)]),
            ],
        )?;
        keeper_killed_before_go(ctx)?;
        pods::after(ctx)?;
        dead_machines_go(ctx)?;
        settled(ctx, &before)
    })
}

/// The keeper has said yes and dies before `start` says go: `start` makes a machine of its own.
fn keeper_killed_before_go(ctx: &Context<'_>) -> Result<()> {
    let machine = machines::ready(ctx)?;
    let keeper = machine["shim"]["pid"].as_u64().unwrap_or_default();
    let keeper = ctx.node.outside(u32::try_from(keeper)?).context("the keeper has no process")?;
    let kill = |_| {
        process::kill(keeper)?;
        while process::alive(keeper) {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    interrupt(ctx, "bootstrap.go", || ctx.pod("claims")?.remove(), kill)?.context("the pod")
}

/// The build of a template for the smallest machine.
#[derive(Clone, Copy)]
struct Build<'a>(&'a Context<'a>);

impl Build<'_> {
    fn run(self) -> Result<String> {
        self.0.node.joey(&["template", "build", "--vcpus", "1", "--memory", "128"])
    }

    /// Keys of what has been built.
    fn keys(self) -> Result<Vec<String>> {
        let text = self.0.node.joey(&["--json", "template", "ls"])?;
        let all: Vec<serde_json::Value> = serde_json::from_str(&text)?;
        let own = all.iter().filter(|one| one["vcpus"] == 1 && one["memory_mib"] == 128);
        Ok(own.filter_map(|one| one["key"].as_str().map(str::to_owned)).collect())
    }

    /// Cuts it short: it says so, if it still can, and publishes nothing.
    fn cut_short(self, point: &str, victim: Victim) -> Result<()> {
        let words = if victim == Shim { "signal: 9" } else { "the VMM ended: killed by SIGKILL" };
        let told = kill_at(self.0, point, victim, || self.run())?;
        failed(told, &[words]).with_context(|| format!("{point}, {victim:?} killed"))?;
        ensure!(self.keys()?.is_empty(), "{point}, {victim:?} killed: a template was published");
        // Not only the next build removes what is left: the look above did, too.
        for entry in fs::read_dir(templates::folder(self.0))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let builder =
                name.strip_suffix(".new").and_then(|name| name.rsplit('.').next()?.parse().ok());
            let left = builder.is_some_and(|pid| self.0.node.outside(pid).is_none());
            ensure!(!left, "{point}, {victim:?} killed: {name} is left");
        }
        Ok(())
    }
}

/// A build that is cut short publishes nothing, and the next one builds and removes what is left.
pub(super) fn template_build(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    if ctx.node.version != Version::V2_1 {
        return skip("containerd has no part in it, and it takes a minute");
    }
    let build = Build(ctx);
    // Some other test may have needed one of this size.
    for key in build.keys()? {
        ctx.node.joey(&["template", "rm", &key])?;
    }
    let before = ctx.node.traces();
    for (point, victim) in [
        ("template.booting", Vmm),
        ("template.booting", Shim),
        ("template.saving", Vmm),
        ("template.publishing", Shim),
    ] {
        build.cut_short(point, victim)?;
    }
    build.run()?;
    ensure!(build.keys()?.len() == 1, "no template was built");
    settled(ctx, &before)
}

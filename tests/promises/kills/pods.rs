//! A pod's life, cut short at each of its phases.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use joey_tests::node::{cgroups, traces};
use joey_tests::pod::{self, Container, Pod};
use k8s_cri::v1::PodSandboxConfig;

use super::Victim::{self, Containerd, Shim, Vmm};
use super::{Told, failed, kill_at, settled, standby};
use crate::context::{Context, holds, same};
use crate::volumes::mounted;
use crate::{faults, standby as machines};

/// What a client does when the kill comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Run,
    /// The shim creates a container only when it is to start, as CRI has it.
    Start,
    Exec,
    Stop,
    StopPod,
}

/// What it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// That it failed.
    Error,
    /// The same, and the pod lives on.
    LivesOn,
    /// That it is done: what was killed is not needed, or was to end.
    Done,
    /// Either.
    Any,
}
use Answer::{Any, Done, Error, LivesOn};

/// One pod on which it is done.
pub(super) struct Scene<'a> {
    ctx: &'a Context<'a>,
    config: PodSandboxConfig,
    pod: Option<Pod<'a>>,
    container: Option<Container<'a>>,
}

impl<'a> Scene<'a> {
    /// A pod and a container as far as they have come before `step`.
    pub(super) fn before(ctx: &'a Context<'a>, step: Step) -> Result<Self> {
        let config = pod::config(ctx.node, "kills");
        let mut scene = Self { ctx, config, pod: None, container: None };
        if step != Step::Run {
            scene.act(Step::Run)?;
        }
        if !matches!(step, Step::Run | Step::Start) {
            scene.act(Step::Start)?;
        }
        Ok(scene)
    }

    pub(super) fn act(&mut self, step: Step) -> Result<()> {
        let (ctx, cri) = (self.ctx, &self.ctx.node.cri);
        if step == Step::Run {
            self.pod = Some(Pod::run_with(ctx.node, ctx.handler, self.config.clone())?);
            return Ok(());
        }
        let pod = self.pod.as_ref().context("no pod")?;
        if step == Step::StopPod {
            return cri.stop_pod(&pod.id);
        }
        if step == Step::Start {
            // With files of the host, whose server is a process of its own.
            let (script, folder) = (pod::script("c", "sleep 1000"), ctx.node.dir().join("logs"));
            let container = pod.create(&mounted(script, "/host", &folder, true))?;
            return cri.start(&self.container.insert(container).id);
        }
        let container = self.container.as_ref().context("no container")?;
        match step {
            Step::Exec => container.sh("true").map(drop),
            _ => cri.stop(&container.id, Duration::ZERO),
        }
    }

    fn lives_on(&self) -> Result<()> {
        let pod = self.pod.as_ref().context("no pod")?;
        same("the pod's output", pod.script("echo ok")?.text(), "ok")
    }

    /// Removes the pod and sees all of it go.
    pub(super) fn clear(self, before: &traces::Traces) -> Result<()> {
        faults::nothing_is_left(self.ctx)?;
        drop(self.pod);
        cgroups::remove(&self.config.linux.unwrap_or_default().cgroup_parent);
        let _ = fs::remove_dir_all(&self.config.log_directory);
        settled(self.ctx, before)
    }
}

/// The words of an error, by who was killed: containerd's own, or the shim's, which name sandbox and reason.
fn words(victim: Victim) -> &'static [&'static str] {
    match victim {
        Shim => &["ttrpc: closed", "signal: killed", "connection reset", "shim is not running"],
        Vmm => &["the VMM ended: killed by SIGKILL"],
        Containerd => &["transport error", "Unavailable", "Canceled"],
    }
}

/// Checks an error: the shim's own name the sandbox, too.
fn check(scene: &Scene<'_>, victim: Victim, told: Told<()>) -> Result<()> {
    if let (Vmm, Err(error)) = (victim, &told) {
        let named = scene.pod.as_ref().map(|pod| format!("sandbox {} has ended", pod.id));
        holds("the error", &format!("{error:#}"), named.as_deref().unwrap_or("did not start"))?;
    }
    failed(told, words(victim))
}

/// One line of a table: step, point, and per victim the answer.
pub(super) type Case<'a> = (Step, &'a str, &'a [(Victim, Answer)]);

fn cases(ctx: &Context<'_>, all: &[Case<'_>], machine: bool) -> Result<()> {
    let mut wrong = Vec::new();
    for (step, point, victims) in all {
        for (victim, answer) in *victims {
            if machine {
                machines::ready(ctx)?;
            }
            let before = ctx.node.traces();
            let mut scene = Scene::before(ctx, *step)?;
            let told = kill_at(ctx, point, *victim, || scene.act(*step));
            let told = told.and_then(|told| match answer {
                Error => check(&scene, *victim, told),
                LivesOn => check(&scene, *victim, told).and_then(|()| scene.lives_on()),
                Done => told,
                Any if told.is_err() => check(&scene, *victim, told),
                Any => Ok(()),
            });
            let mut cleared = scene.clear(&before);
            if cleared.is_ok() && *step == Step::Run && !machine {
                cleared = ctx.pod("next").and_then(Pod::remove).context("the next pod");
            }
            for error in [told, cleared].into_iter().filter_map(Result::err) {
                wrong.push(format!("{step:?}, {point}, {victim:?} killed: {error:#}"));
            }
        }
    }
    if wrong.is_empty() { Ok(()) } else { bail!("{}", wrong.join("\n")) }
}

/// Without a machine in reserve, which only takes time: the shim's own way is the longer one.
fn without_reserve(ctx: &Context<'_>, all: &[Case<'_>]) -> Result<()> {
    ctx.only_joey()?;
    standby(ctx, 0, || {
        cases(ctx, all, false)?;
        after(ctx)
    })
}

/// Each time with a machine that waits for the pod.
pub(super) fn with_machine(ctx: &Context<'_>, all: &[Case<'_>]) -> Result<()> {
    cases(ctx, all, true)
}

/// A pod that comes after all that.
pub(super) fn after(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("after")?;
    same("output", pod.script("echo ok")?.text(), "ok")?;
    pod.remove()
}

pub(super) fn sandbox_start(ctx: &Context<'_>) -> Result<()> {
    without_reserve(
        ctx,
        &[
            (Step::Run, "bootstrap.named", &[(Shim, Error), (Containerd, Error)]),
            (Step::Run, "start.wire", &[(Shim, Error), (Containerd, Error)]),
            (Step::Run, "start.admission", &[(Shim, Error)]),
            (Step::Run, "start.attached", &[(Shim, Error)]),
            // It boots cold instead.
            (Step::Run, "vmm.spawned", &[(Shim, Error), (Vmm, Done), (Containerd, Error)]),
            (Step::Run, "start.identity", &[(Shim, Error), (Vmm, Error), (Containerd, Error)]),
            (Step::Run, "start.identified", &[(Shim, Error), (Vmm, Error)]),
            (Step::Run, "start.disk", &[(Shim, Any), (Vmm, Any)]),
        ],
    )
}

pub(super) fn container_create(ctx: &Context<'_>) -> Result<()> {
    without_reserve(
        ctx,
        &[
            (Step::Start, "create.attached", &[(Shim, Error), (Vmm, Error), (Containerd, LivesOn)]),
            (Step::Start, "create.call", &[(Shim, Error), (Vmm, Error)]),
            (Step::Start, "create.made", &[(Shim, Error), (Vmm, Error), (Containerd, LivesOn)]),
        ],
    )
}

pub(super) fn container_start(ctx: &Context<'_>) -> Result<()> {
    without_reserve(
        ctx,
        &[
            (Step::Start, "start.call", &[(Shim, Error), (Vmm, Error)]),
            (Step::Start, "start.done", &[(Shim, Error), (Vmm, Any), (Containerd, LivesOn)]),
        ],
    )
}

pub(super) fn exec(ctx: &Context<'_>) -> Result<()> {
    without_reserve(
        ctx,
        &[
            (Step::Exec, "exec.call", &[(Shim, Error), (Vmm, Error), (Containerd, LivesOn)]),
            (Step::Exec, "exec-start.call", &[(Shim, Error), (Vmm, Error)]),
            (Step::Exec, "exec-start.done", &[(Shim, Error), (Vmm, Any), (Containerd, LivesOn)]),
        ],
    )
}

pub(super) fn container_end(ctx: &Context<'_>) -> Result<()> {
    without_reserve(
        ctx,
        &[
            (Step::Stop, "kill.call", &[(Shim, Any), (Vmm, Done), (Containerd, LivesOn)]),
            (Step::Stop, "delete.call", &[(Shim, Any), (Vmm, Any), (Containerd, Any)]),
            (Step::Stop, "delete.released", &[(Shim, Any)]),
        ],
    )
}

pub(super) fn stop(ctx: &Context<'_>) -> Result<()> {
    without_reserve(
        ctx,
        &[
            (Step::StopPod, "stop.kill", &[(Shim, Any), (Vmm, Done), (Containerd, Error)]),
            (Step::StopPod, "stop.killed", &[(Shim, Any), (Containerd, Error)]),
            (Step::StopPod, "teardown.processes", &[(Shim, Any), (Containerd, Any)]),
            (Step::StopPod, "teardown.wire", &[(Shim, Any)]),
            (Step::StopPod, "teardown.policy", &[(Shim, Any)]),
            (Step::StopPod, "teardown.cgroups", &[(Shim, Any)]),
            (Step::StopPod, "teardown.directory", &[(Shim, Any), (Containerd, Any)]),
        ],
    )
}

//! Whatever is killed, at whichever phase: the client is told, and everything of the pod goes.
//!
//! The shim of a debug build stops at a named point ([`Point`]); there the victim is killed, and then the shim
//! goes on, if it can.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use joey_tests::node::{cgroups, traces};
use joey_tests::pod::{self, Container, Pod, SOON};
use joey_tests::process;
use k8s_cri::v1::PodSandboxConfig;

use crate::context::{Context, Test};
use crate::faults;

pub const TESTS: &[Test] = &[
    Test { name: "kills::sandbox_start", run: sandbox_start },
    Test { name: "kills::containers", run: containers },
    Test { name: "kills::stop", run: stop },
];

/// A point at which the next process that comes by is held.
struct Point<'a> {
    ctx: &'a Context<'a>,
    name: &'a str,
    folder: PathBuf,
}

impl<'a> Point<'a> {
    fn arm(ctx: &'a Context<'a>, name: &'a str) -> Result<Self> {
        let folder = ctx.node.dir().join("jrun/failpoints");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(name), "")?;
        Ok(Self { ctx, name, folder })
    }

    /// The process that is held, by the number that it has on the node.
    fn holding(&self) -> Option<u32> {
        let prefix = format!("{}.", self.name);
        fs::read_dir(&self.folder).ok()?.flatten().find_map(|entry| {
            let name = entry.file_name();
            name.to_str()?.strip_prefix(&prefix)?.parse().ok()
        })
    }

    /// Waits until a process is held.
    fn reached(&self) -> Result<u32> {
        let end = Instant::now() + SOON;
        loop {
            if let Some(pid) = self.holding() {
                return self.ctx.node.outside(pid).with_context(|| format!("no process {pid}"));
            }
            ensure!(Instant::now() < end, "nobody comes by {}", self.name);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn release(&self) {
        if let Some(pid) = self.holding() {
            let _ = fs::remove_file(self.folder.join(format!("{}.{pid}", self.name)));
        }
    }
}

impl Drop for Point<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.folder.join(self.name));
        self.release();
        let _ = fs::remove_dir(&self.folder);
    }
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    /// The process that is held: the shim, or what does its work.
    Shim,
    Vmm,
    Containerd,
}
use Victim::{Containerd, Shim, Vmm};

/// Lets `act` come to a point, kills there, and lets it end. What the client is told.
fn kill_at<T: Send>(
    ctx: &Context<'_>,
    name: &str,
    victim: Victim,
    act: impl FnOnce() -> Result<T> + Send,
) -> Result<Result<T>> {
    let point = Point::arm(ctx, name)?;
    std::thread::scope(|scope| {
        let acting = scope.spawn(act);
        let killed = point.reached().and_then(|shim| match victim {
            Shim => process::kill(shim),
            Vmm => process::kill(vmm_of(shim)?),
            Containerd => ctx.node.kill_containerd(),
        });
        point.release();
        let back = if victim == Containerd { ctx.node.start_containerd() } else { Ok(()) };
        let acted = acting.join().map_err(|_| anyhow!("the client's thread panicked"))?;
        if let Err(error) = killed.and(back) {
            let acted = acted.err();
            return Err(error.context(format!("the client was told {acted:?}")));
        }
        Ok(acted)
    })
}

fn vmm_of(shim: u32) -> Result<u32> {
    let all = fs::read_dir("/proc")?.flatten();
    let mut pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_vmm = |pid: &u32| {
        traces::parent(*pid) == Some(shim)
            && traces::command(*pid).is_some_and(|command| command.contains("qemu"))
    };
    pids.find(is_vmm).with_context(|| format!("process {shim} has no VMM"))
}

/// What a client does when the kill comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Run,
    Create,
    Start,
    Exec,
    Stop,
    Remove,
    StopPod,
}

/// One pod on which it is done.
struct Scene<'a> {
    ctx: &'a Context<'a>,
    config: PodSandboxConfig,
    pod: Option<Pod<'a>>,
    container: Option<Container<'a>>,
}

impl<'a> Scene<'a> {
    /// A pod and a container as far as they have come before `step`.
    fn before(ctx: &'a Context<'a>, step: Step) -> Result<Self> {
        let config = pod::config(ctx.node, "kills");
        let mut scene = Self { ctx, config, pod: None, container: None };
        for earlier in [Step::Run, Step::Create, Step::Start] {
            if earlier == step {
                break;
            }
            scene.act(earlier)?;
        }
        if step == Step::Remove {
            scene.act(Step::Stop)?;
        }
        Ok(scene)
    }

    fn id(&self) -> &str {
        self.pod.as_ref().map_or("", |pod| &pod.id)
    }

    fn act(&mut self, step: Step) -> Result<()> {
        let (ctx, config) = (self.ctx, self.config.clone());
        if step == Step::Run {
            self.pod = Some(Pod::run_with(ctx.node, ctx.handler, config)?);
            return Ok(());
        }
        let pod = self.pod.as_ref().context("no pod")?;
        if step == Step::Create {
            self.container = Some(pod.create(&pod::script("c", "sleep 1000"))?);
            return Ok(());
        }
        let cri = &ctx.node.cri;
        let container = self.container.as_ref().context("no container")?;
        match step {
            Step::Run | Step::Create => Ok(()),
            Step::Start => cri.start(&container.id),
            Step::Exec => container.sh("true").map(drop),
            Step::Stop => cri.stop(&container.id, Duration::ZERO),
            Step::Remove => cri.remove(&container.id),
            Step::StopPod => cri.stop_pod(&pod.id),
        }
    }

    /// Removes the pod and sees all of it go.
    fn clear(self, before: &traces::Traces) -> Result<()> {
        let (node, cgroup) = (self.ctx.node, self.config.linux.unwrap_or_default().cgroup_parent);
        faults::nothing_is_left(self.ctx)?;
        drop(self.pod);
        cgroups::remove(&cgroup);
        let _ = fs::remove_dir_all(&self.config.log_directory);
        let left = traces::settle(Duration::from_secs(5), before, || node.traces());
        ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
        Ok(())
    }
}

fn cases(ctx: &Context<'_>, all: &[(Step, &str, &[Victim])]) -> Result<()> {
    let mut wrong = Vec::new();
    for (step, point, victims) in all {
        for victim in *victims {
            let begun = Instant::now();
            let before = ctx.node.traces();
            let mut scene = Scene::before(ctx, *step)?;
            let told = kill_at(ctx, point, *victim, || scene.act(*step));
            let acted = begun.elapsed();
            let id = scene.id().to_owned();
            let cleared = scene.clear(&before);
            println!(
                "{step:?} {point} {victim:?} {id:.8}: {acted:.1?} {:.1?}\n  {told:?}\n  {cleared:?}",
                begun.elapsed()
            );
            if let Err(error) = told.map(drop).and(cleared) {
                wrong.push(format!("{step:?} {point} {victim:?}: {error:#}"));
            }
        }
    }
    if wrong.is_empty() { Ok(()) } else { bail!("{}", wrong.join("\n")) }
}

fn sandbox_start(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    standby(ctx, 0, || {
        cases(
            ctx,
            &[
                (Step::Run, "bootstrap.named", &[Shim]),
                (Step::Run, "start.wire", &[Shim, Containerd]),
                (Step::Run, "vmm.spawned", &[Shim, Vmm]),
                (Step::Run, "start.identity", &[Shim, Vmm, Containerd]),
                (Step::Run, "start.identified", &[Shim, Vmm]),
            ],
        )?;
        ctx.pod("after")?.remove()
    })
}

fn containers(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let all: &[Victim] = &[Shim, Vmm, Containerd];
    standby(ctx, 0, || {
        cases(
            ctx,
            &[
                (Step::Create, "start.disk", &[Shim, Vmm]),
                (Step::Create, "create.attached", all),
                (Step::Create, "create.call", &[Shim, Vmm]),
                (Step::Create, "create.made", all),
                (Step::Start, "start.call", &[Shim, Vmm]),
                (Step::Start, "start.done", all),
                (Step::Exec, "exec.call", all),
                (Step::Exec, "exec-start.call", &[Shim, Vmm]),
                (Step::Exec, "exec-start.done", all),
                (Step::Stop, "kill.call", all),
                (Step::Remove, "delete.call", all),
                (Step::Remove, "delete.released", &[Shim]),
            ],
        )?;
        ctx.pod("after")?.remove()
    })
}

fn stop(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    standby(ctx, 0, || {
        cases(
            ctx,
            &[
                (Step::StopPod, "stop.kill", &[Shim, Vmm, Containerd]),
                (Step::StopPod, "stop.killed", &[Shim, Containerd]),
                (Step::StopPod, "teardown.processes", &[Shim]),
                (Step::StopPod, "teardown.wire", &[Shim, Containerd]),
                (Step::StopPod, "teardown.cgroups", &[Shim]),
                (Step::StopPod, "teardown.directory", &[Shim, Containerd]),
            ],
        )?;
        ctx.pod("after")?.remove()
    })
}

/// Has so many machines wait while `act` runs.
fn standby<T>(ctx: &Context<'_>, number: u32, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let path = ctx.node.dir().join("joey.toml");
    let normal = fs::read_to_string(&path)?;
    fs::write(&path, format!("standby = {number}\n{normal}"))?;
    ctx.node.joey(&["standby", "rm"])?;
    let acted = act();
    fs::write(&path, normal)?;
    acted
}

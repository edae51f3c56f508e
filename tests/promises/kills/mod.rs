//! Whatever is killed, at whichever phase: the client is told, everything of the pod goes, and the next pod works.
//!
//! The shim of a debug build stops at a named point ([`Point`]); there the victim is killed, and then the shim
//! goes on, if it can.

mod guest;
mod images;
mod pods;
mod reserve;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use joey_tests::node::traces;
use joey_tests::pod::SOON;
use joey_tests::process;

use crate::context::{Context, Test};

pub const TESTS: &[Test] = &[
    Test { name: "kills::sandbox_start", run: pods::sandbox_start },
    Test { name: "kills::container_create", run: pods::container_create },
    Test { name: "kills::container_start", run: pods::container_start },
    Test { name: "kills::exec", run: pods::exec },
    Test { name: "kills::container_end", run: pods::container_end },
    Test { name: "kills::stop", run: pods::stop },
    Test { name: "kills::process_in_the_guest", run: guest::process_in_the_guest },
    Test { name: "kills::image_conversion", run: images::image_conversion },
    Test { name: "kills::machine_in_preparation", run: reserve::machine_in_preparation },
    Test { name: "kills::machine_being_claimed", run: reserve::machine_being_claimed },
    Test { name: "kills::template_build", run: reserve::template_build },
];

/// After this time what nobody else removes is removed as an orphan's.
const ORPHANED: Duration = Duration::from_secs(15);
/// A call whose shim or machine was killed has failed by then; one that goes on without has booted cold.
const PROMPT: Duration = Duration::from_secs(30);

/// A point at which the next process that comes by is held.
pub(crate) struct Point<'a> {
    ctx: &'a Context<'a>,
    name: &'a str,
    folder: PathBuf,
}

impl<'a> Point<'a> {
    pub(crate) fn arm(ctx: &'a Context<'a>, name: &'a str) -> Result<Self> {
        let folder = ctx.node.dir().join("jrun/failpoints");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(name), "")?;
        Ok(Self { ctx, name, folder })
    }

    /// The process that is held, by its number in the node.
    fn holding(&self) -> Option<u32> {
        let prefix = format!("{}.", self.name);
        fs::read_dir(&self.folder).ok()?.flatten().find_map(|entry| {
            let name = entry.file_name();
            name.to_str()?.strip_prefix(&prefix)?.parse().ok()
        })
    }

    /// Waits until a process is held; `over` tells that nobody will be any more.
    pub(crate) fn reached(&self, over: impl Fn() -> bool) -> Result<u32> {
        let end = Instant::now() + SOON;
        loop {
            let was_over = over();
            if let Some(pid) = self.holding() {
                return self.ctx.node.outside(pid).with_context(|| format!("no process {pid}"));
            }
            ensure!(!was_over && Instant::now() < end, "nobody came by {}", self.name);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets the process that is held go on.
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
pub enum Victim {
    /// The process that is held: the shim, or what does its work.
    Shim,
    /// Its VMM.
    Vmm,
    /// containerd; it is started again.
    Containerd,
}

impl Victim {
    pub fn kill(self, ctx: &Context<'_>, held: u32) -> Result<()> {
        match self {
            Self::Shim => process::kill(held),
            Self::Vmm => process::kill(vmm_of(held)?),
            Self::Containerd => ctx.node.kill_containerd(),
        }
    }
}

/// A call of the client's, and what it was told.
pub type Told<T> = Result<T>;

/// Lets `act` come to a point, does `deed` to the process that is held there, and lets both go on. What the
/// client was told.
pub fn interrupt<T: Send>(
    ctx: &Context<'_>,
    name: &str,
    act: impl FnOnce() -> Result<T> + Send,
    deed: impl FnOnce(u32) -> Result<()>,
) -> Result<Told<T>> {
    let point = Point::arm(ctx, name)?;
    std::thread::scope(|scope| {
        let acting = scope.spawn(act);
        // A keeper or a builder may come by after the call has returned.
        let returned = std::cell::OnceCell::new();
        let over = || {
            acting.is_finished()
                && returned.get_or_init(Instant::now).elapsed() > Duration::from_secs(10)
        };
        let done = point.reached(over).and_then(deed);
        point.release();
        let going_on = Instant::now();
        let told = acting.join().map_err(|_| anyhow!("the client's thread panicked"))?;
        if let Err(error) = done {
            let told = told.map(drop);
            return Err(error.context(format!("at {name}; the client was told {told:?}")));
        }
        let late = going_on.elapsed();
        ensure!(late < PROMPT, "at {name}: the client had to wait for {late:.1?}");
        Ok(told)
    })
}

/// The same, where the deed is a killing.
pub fn kill_at<T: Send>(
    ctx: &Context<'_>,
    name: &str,
    victim: Victim,
    act: impl FnOnce() -> Result<T> + Send,
) -> Result<Told<T>> {
    let told = interrupt(ctx, name, act, |held| victim.kill(ctx, held));
    if victim == Victim::Containerd {
        ctx.node.start_containerd()?;
    }
    told
}

fn vmm_of(shim: u32) -> Result<u32> {
    let is_vmm = |pid: &u32| {
        traces::parent(*pid) == Some(shim)
            && traces::command(*pid).is_some_and(|command| command.contains("qemu"))
    };
    let all = fs::read_dir("/proc")?.flatten();
    let mut pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(is_vmm).with_context(|| format!("process {shim} has no VMM"))
}

/// Waits until nothing is there that was not before.
pub fn settled(ctx: &Context<'_>, before: &traces::Traces) -> Result<()> {
    let end = Instant::now() + ORPHANED;
    loop {
        let left = traces::settle(Duration::from_secs(2), before, || ctx.node.traces());
        if left.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "left behind:\n  {}", left.join("\n  "));
        if left.iter().all(|name| name.starts_with("bundle ")) {
            // containerd's own: it keeps the bundle of a container whose shim died after its creation and
            // before its start, and removes it when it starts anew.
            ctx.node.kill_containerd()?;
            ctx.node.start_containerd()?;
        }
        // Where containerd does not call `delete`, it is an orphan's after a while.
        ctx.node.joey(&["clean"])?;
    }
}

/// Has so many machines wait while `act` runs.
pub fn standby<T>(ctx: &Context<'_>, number: u32, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let path = ctx.node.dir().join("joey.toml");
    let normal = fs::read_to_string(&path)?;
    fs::write(&path, format!("standby = {number}\n{normal}"))?;
    let acted = ctx.node.joey(&["standby", "rm"]).and_then(|_| act());
    fs::write(&path, normal)?;
    acted
}

/// Checks that a call failed with one of these words.
fn failed<T>(told: Told<T>, words: &[&str]) -> Result<()> {
    let Err(error) = told else { bail!("the client was told that all is well") };
    let text = format!("{error:#}");
    let known = words.iter().any(|word| text.contains(word));
    if known { Ok(()) } else { bail!("the client was told: {text}; expected one of {words:?}") }
}

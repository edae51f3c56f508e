//! What CRI does not reach: single containers through containerd's own client, `ctr`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use joey_tests::image::BUSYBOX;
use joey_tests::pod::SOON;

use crate::context::{Context, Test, refused, same, skip};

pub const TESTS: &[Test] = &[
    Test { name: "tasks::output_to_a_file", run: output_to_a_file },
    Test { name: "tasks::output_to_a_program", run: output_to_a_program },
    Test { name: "tasks::paused_and_resumed", run: paused_and_resumed },
    Test { name: "tasks::checkpoint_is_refused", run: checkpoint_is_refused },
    Test { name: "tasks::id_with_slashes_is_refused", run: id_with_slashes_is_refused },
];

/// A running container that `ctr` made; gone when dropped.
struct Task<'a> {
    ctx: &'a Context<'a>,
    name: &'static str,
}

impl<'a> Task<'a> {
    fn run(ctx: &'a Context<'a>, name: &'static str, output: &str, script: &str) -> Result<Self> {
        let runtime = format!("io.containerd.{}.v2", ctx.handler);
        let task = Self { ctx, name };
        // Below the node's, where leftovers are looked for.
        let cgroup = format!("{}/{}", ctx.node.cgroup(), name.rsplit('/').next().unwrap_or(name));
        let what = ["run", "-d", "--runtime", &runtime, "--cgroup", &cgroup, "--log-uri", output];
        ctx.node.ctr(&[&what[..], &[BUSYBOX, name, "sh", "-c", script]].concat())?;
        Ok(task)
    }

    fn tell(&self, what: &str) -> Result<String> {
        self.ctx.node.ctr(&["tasks", what, self.name])
    }

    fn remove(self) -> Result<()> {
        self.ctx.node.ctr(&["tasks", "rm", "--force", self.name])?;
        self.ctx.node.ctr(&["containers", "rm", self.name])?;
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        // The test has failed and says why.
        let _ = self.ctx.node.ctr(&["tasks", "rm", "--force", self.name]);
        let _ = self.ctx.node.ctr(&["containers", "rm", self.name]);
    }
}

/// `ctr` runs these with the handler's own runtime, so not with a sandboxer of containerd's.
fn only_a_runtime(ctx: &Context<'_>) -> Result<()> {
    match ctx.handler {
        "joey" | "runc" => Ok(()),
        _ => skip("ctr names runtimes, not CRI's handlers"),
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn wait_for(path: &Path, text: &str) -> Result<()> {
    let end = Instant::now() + SOON;
    while read(path) != text {
        ensure!(Instant::now() < end, "{}: {:?}", path.display(), read(path));
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn output(ctx: &Context<'_>, name: &str) -> PathBuf {
    ctx.node.dir().join(name)
}

fn output_to_a_file(ctx: &Context<'_>) -> Result<()> {
    only_a_runtime(ctx)?;
    let path = output(ctx, "task.log");
    let uri = format!("file://{}", path.display());
    let task = Task::run(ctx, "to-file", &uri, "echo out; echo err >&2; sleep 1000")?;
    wait_for(&path, "out\nerr\n")?;
    task.remove()?;
    Ok(fs::remove_file(path)?)
}

fn output_to_a_program(ctx: &Context<'_>) -> Result<()> {
    only_a_runtime(ctx)?;
    let (program, path) = (output(ctx, "logger"), output(ctx, "logged"));
    // containerd's protocol: output on 3 and 4, ready when 5 is closed.
    let script = "#!/bin/sh\nexec 5>&-\n(echo \"$CONTAINER_ID\"; cat <&3; cat <&4) >\"$2\"\n";
    fs::write(&program, script)?;
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let uri = format!("binary://{}?to={}", program.display(), path.display());
    let task = Task::run(ctx, "to-program", &uri, "echo out; echo err >&2")?;
    wait_for(&path, "to-program\nout\nerr\n")?;
    task.remove()?;
    fs::remove_file(program)?;
    Ok(fs::remove_file(path)?)
}

fn paused_and_resumed(ctx: &Context<'_>) -> Result<()> {
    only_a_runtime(ctx)?;
    let path = output(ctx, "ticks");
    let uri = format!("file://{}", path.display());
    let task = Task::run(ctx, "paused", &uri, "while usleep 20000; do echo tick; done")?;
    let grows = |within: Duration| {
        let (before, end) = (read(&path).len(), Instant::now() + within);
        while read(&path).len() == before && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        read(&path).len() > before
    };
    same("ticks", grows(SOON), true)?;
    task.tell("pause")?;
    // What was under way arrives.
    std::thread::sleep(Duration::from_millis(300));
    same("ticks while paused", grows(Duration::from_secs(1)), false)?;
    task.tell("resume")?;
    same("ticks after", grows(SOON), true)?;
    task.remove()?;
    Ok(fs::remove_file(path)?)
}

fn checkpoint_is_refused(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    only_a_runtime(ctx)?;
    let task = Task::run(ctx, "checkpoint", "file:///dev/null", "sleep 1000")?;
    refused("checkpoint", task.tell("checkpoint"), "checkpoint")?;
    task.remove()
}

fn id_with_slashes_is_refused(ctx: &Context<'_>) -> Result<()> {
    only_a_runtime(ctx)?;
    let run = Task::run(ctx, "../a/b", "file:///dev/null", "true");
    refused("an id with slashes", run, "../a/b")
}

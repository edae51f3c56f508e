//! What CRI does not reach: single containers through containerd's own client, `ctr`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use joey_tests::image::BUSYBOX;
use joey_tests::pod::SOON;
use joey_tests::process;

use crate::context::{Context, Test, refused, same, skip};
use crate::share;

pub const TESTS: &[Test] = &[
    Test { name: "tasks::output_to_a_file", run: output_to_a_file },
    Test { name: "tasks::output_to_a_program", run: output_to_a_program },
    Test { name: "tasks::paused_and_resumed", run: paused_and_resumed },
    Test { name: "tasks::pause_that_fails_is_taken_back", run: pause_that_fails_is_taken_back },
    Test { name: "tasks::clock_follows_the_host", run: clock_follows_the_host },
    Test { name: "tasks::kill_all", run: kill_all },
    Test { name: "tasks::processes", run: processes },
    Test { name: "tasks::exec_whose_input_ends", run: exec_whose_input_ends },
    Test { name: "tasks::mount_outside_root", run: mount_outside_root },
    Test { name: "tasks::checkpoint_is_refused", run: checkpoint_is_refused },
    Test { name: "tasks::id_with_slashes_is_refused", run: id_with_slashes_is_refused },
];

/// A running container that `ctr` made; gone when dropped.
pub struct Task<'a> {
    ctx: &'a Context<'a>,
    name: &'static str,
}

impl<'a> Task<'a> {
    fn run(ctx: &'a Context<'a>, name: &'static str, output: &str, script: &str) -> Result<Self> {
        Self::run_with(ctx, name, &["--log-uri", output], script)
    }

    /// Runs it with flags of `ctr run`.
    pub fn run_with(
        ctx: &'a Context<'a>,
        name: &'static str,
        flags: &[&str],
        script: &str,
    ) -> Result<Self> {
        let runtime = format!("io.containerd.{}.v2", ctx.handler);
        let task = Self { ctx, name };
        // Below the node's, where leftovers are looked for.
        let cgroup = format!("{}/{}", ctx.node.cgroup(), name.rsplit('/').next().unwrap_or(name));
        let what = [&["run", "-d", "--runtime", &runtime, "--cgroup", &cgroup][..], flags];
        ctx.node.ctr(&[&what.concat()[..], &[BUSYBOX, name, "sh", "-c", script]].concat())?;
        Ok(task)
    }

    /// Has `ctr tasks` do something with it.
    pub fn tell(&self, what: &str) -> Result<String> {
        self.ctx.node.ctr(&["tasks", what, self.name])
    }

    /// Runs a command in it, as the exec `id`.
    pub fn exec(&self, id: &str, command: &[&str]) -> Result<String> {
        self.ctx.node.ctr(&[&["tasks", "exec", "--exec-id", id, self.name], command].concat())
    }

    /// Ends and removes it.
    pub fn remove(self) -> Result<()> {
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
pub fn only_a_runtime(ctx: &Context<'_>) -> Result<()> {
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

/// A process that waits for a file of the host, whose server hangs, cannot be frozen.
fn pause_that_fails_is_taken_back(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    only_a_runtime(ctx)?;
    let (path, folder) = (output(ctx, "ticks"), output(ctx, "hangs"));
    fs::create_dir_all(&folder)?;
    let uri = format!("file://{}", path.display());
    let share = format!("type=bind,src={},dst=/host,options=rbind:rw", folder.display());
    // A name that was not asked for before is asked of the server.
    let script = "(i=0; while usleep 20000; do i=$((i+1)); [ -e /host/$i ]; done) & \
                  while usleep 20000; do echo tick; done";
    let task = Task::run_with(ctx, "hangs", &["--log-uri", &uri, "--mount", &share], script)?;
    let grows = |within: Duration| {
        let (before, end) = (read(&path).len(), Instant::now() + within);
        while read(&path).len() == before && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        read(&path).len() > before
    };
    same("ticks", grows(SOON), true)?;
    let found = share::servers(&folder.display().to_string());
    let [server] = found[..] else { anyhow::bail!("servers of {}: {found:?}", folder.display()) };
    process::stop(server)?;
    // Until it waits for an answer.
    std::thread::sleep(Duration::from_millis(500));
    let begun = Instant::now();
    let paused = refused("pause", task.tell("pause"), "within 15s: it goes on");
    let (took, goes_on) = (begun.elapsed(), grows(SOON));
    process::go_on(server)?;
    paused?;
    ensure!(took > Duration::from_secs(14), "given up after {took:.1?}");
    same("ticks afterwards", goes_on, true)?;
    task.tell("pause")?;
    task.tell("resume")?;
    same("ticks after a pause", grows(SOON), true)?;
    task.remove()?;
    fs::remove_file(path)?;
    Ok(fs::remove_dir(folder)?)
}

/// What the guest loses or gains it has back when its container goes on, or else within a minute.
fn clock_follows_the_host(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    only_a_runtime(ctx)?;
    let cap = ["--cap-add", "CAP_SYS_TIME"];
    let task = Task::run_with(ctx, "clock", &cap, "sleep 1000")?;
    let seconds =
        |id: &str| -> Result<i64> { Ok(task.exec(id, &["date", "+%s"])?.trim().parse()?) };
    let node = || -> Result<i64> {
        Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?)
    };
    for by in [-3600, 40] {
        let set = format!("date -s @$(($(date +%s) + {by})) >/dev/null");
        task.exec(&format!("set{by}"), &["sh", "-c", &set])?;
        let off = seconds(&format!("off{by}"))? - node()?;
        ensure!((off - by).abs() < 20, "the clock was moved by {by} s and is off by {off} s");
        task.tell("pause")?;
        task.tell("resume")?;
        let end = Instant::now() + SOON;
        for look in 0.. {
            let off = seconds(&format!("now{by}-{look}"))? - node()?;
            if off.abs() <= 1 {
                break;
            }
            ensure!(Instant::now() < end, "the clock is off by {off} s still");
        }
    }
    task.remove()
}

fn kill_all(ctx: &Context<'_>) -> Result<()> {
    only_a_runtime(ctx)?;
    let path = output(ctx, "signals");
    let uri = format!("file://{}", path.display());
    let script = "exec 2>/dev/null; (trap 'echo child' TERM; echo up; while :; do usleep 20000; done) & \
        trap 'echo first' TERM; while :; do usleep 20000; done";
    let task = Task::run(ctx, "kill-all", &uri, script)?;
    wait_for(&path, "up\n")?;
    ctx.node.ctr(&["tasks", "kill", "-s", "SIGTERM", "kill-all"])?;
    wait_for(&path, "up\nfirst\n")?;
    std::thread::sleep(Duration::from_millis(300));
    same("the first process alone", read(&path), "up\nfirst\n")?;
    ctx.node.ctr(&["tasks", "kill", "--all", "-s", "SIGTERM", "kill-all"])?;
    let end = Instant::now() + SOON;
    let mut lines = Vec::new();
    while lines != ["child", "first", "first", "up"] {
        ensure!(Instant::now() < end, "after a signal to all: {lines:?}");
        std::thread::sleep(Duration::from_millis(50));
        lines = read(&path).lines().map(str::to_owned).collect();
        lines.sort();
    }
    ctx.node.ctr(&["tasks", "kill", "--all", "-s", "SIGKILL", "kill-all"])?;
    let end = Instant::now() + SOON;
    while !ctx.node.ctr(&["tasks", "ls"])?.lines().any(|line| is_stopped(line, "kill-all")) {
        ensure!(Instant::now() < end, "{}", ctx.node.ctr(&["tasks", "ls"])?);
    }
    task.remove()?;
    Ok(fs::remove_file(path)?)
}

/// Whether this line of `ctr tasks ls` is a stopped container's.
fn is_stopped(line: &str, name: &str) -> bool {
    let words: Vec<_> = line.split_whitespace().collect();
    words.first() == Some(&name) && words.last() == Some(&"STOPPED")
}

fn processes(ctx: &Context<'_>) -> Result<()> {
    only_a_runtime(ctx)?;
    let task = Task::run(ctx, "processes", "file:///dev/null", "sleep 1000 & sleep 1000 & wait")?;
    let list = || -> Result<Vec<String>> {
        let table = task.tell("ps")?;
        let pids = table.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        Ok(pids.map(str::to_owned).collect())
    };
    let end = Instant::now() + SOON;
    while list()?.len() != 3 {
        ensure!(Instant::now() < end, "processes: {:?}", list()?);
    }
    let tasks = ctx.node.ctr(&["tasks", "ls"])?;
    let first = tasks.lines().find(|line| line.starts_with("processes "));
    let first = first.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default();
    ensure!(list()?.iter().any(|pid| pid == first), "{first} is not of {:?}", list()?);
    let killed = ["sh", "-c", "kill $(pidof sleep | cut -d' ' -f1)"];
    task.exec("kill", &killed)?;
    let end = Instant::now() + SOON;
    while list()?.len() != 2 {
        ensure!(Instant::now() < end, "processes after one ended: {:?}", list()?);
    }
    task.remove()
}

/// `ctr` has containerd close the exec's standard input where its own ends.
fn exec_whose_input_ends(ctx: &Context<'_>) -> Result<()> {
    only_a_runtime(ctx)?;
    let task = Task::run(ctx, "input-ends", "file:///dev/null", "sleep 1000")?;
    // Not at once: `ctr` misses an end that comes before the exec.
    let feed = "sleep 1; echo one; sleep 1; echo two";
    let exec = ["tasks", "exec", "--exec-id", "cat", "input-ends", "sh", "-c", "cat; echo ended"];
    same("output", ctx.node.ctr_fed(feed, &exec)?, "one\ntwo\nended\n")?;
    task.remove()
}

fn mount_outside_root(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    only_a_runtime(ctx)?;
    let source = output(ctx, "joey.toml");
    let mount = format!("type=bind,src={},dst=../..,options=rbind:ro", source.display());
    let run = Task::run_with(ctx, "outside", &["--mount", &mount], "true");
    refused("a mount onto ../..", run, "leads out of the container's root")
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

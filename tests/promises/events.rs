//! containerd hears of everything in a container's life, in the order of the life.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_tests::pod::SOON;
use serde_json::Value;

use crate::context::{Context, Test, same};
use crate::tasks::{Task, only_a_runtime};

pub const TESTS: &[Test] = &[Test { name: "events::of_a_life_in_order", run: of_a_life_in_order }];

const NAME: &str = "life";
/// Waits to be told, then fills more memory than it may have.
const LIFE: &str = "while [ ! -e /go ]; do usleep 50000; done; \
    dd if=/dev/zero bs=1M count=200 2>/dev/null | tail; exit 7";

/// What `ctr events` prints, for as long as this lives.
struct Listener {
    child: std::process::Child,
    file: std::path::PathBuf,
}

impl Listener {
    fn start(ctx: &Context<'_>) -> Result<Self> {
        let file = ctx.node.dir().join("events");
        let child = ctx.node.ctr_to(&["events"], &file)?;
        Ok(Self { child, file })
    }

    /// Topic, exec (empty for the container's first process) and details of each event of the container.
    fn heard(&self) -> Result<Vec<(String, String, Value)>> {
        let text = std::fs::read_to_string(&self.file)?;
        let mut heard = Vec::new();
        // The last line may not be whole yet.
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            let Some((head, json)) = line.split_once('{') else { continue };
            let topic = head.split_whitespace().last().unwrap_or_default();
            let Some(topic) = topic.strip_prefix("/tasks/") else { continue };
            let details: Value = serde_json::from_str(&format!("{{{json}"))?;
            if details["container_id"] != NAME {
                continue;
            }
            let exec = details["exec_id"].as_str().or_else(|| details["id"].as_str());
            let exec = exec.filter(|id| *id != NAME).unwrap_or_default();
            heard.push((topic.to_owned(), exec.to_owned(), details));
        }
        Ok(heard)
    }

    /// Topics of a process, once the last of them is there.
    fn topics(&self, exec: &str, last: &str) -> Result<Vec<String>> {
        let end = Instant::now() + SOON;
        loop {
            let heard = self.heard()?;
            let of = heard.into_iter().filter(|(_, of, _)| of == exec);
            let mut topics: Vec<String> = of.map(|(topic, ..)| topic).collect();
            // runc's shim tells of one memory kill twice where the node has version 1 of cgroups.
            topics.dedup();
            if topics.iter().any(|topic| topic == last) {
                return Ok(topics);
            }
            ensure!(Instant::now() < end, "of {exec:?} only {topics:?} was heard, no {last}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.file);
    }
}

fn of_a_life_in_order(ctx: &Context<'_>) -> Result<()> {
    only_a_runtime(ctx)?;
    let listener = Listener::start(ctx)?;
    let limit = (32 << 20).to_string();
    let task = Task::run_with(ctx, NAME, &["--memory-limit", &limit], LIFE)?;
    task.exec("one", &["true"])?;
    task.tell("pause")?;
    task.tell("resume")?;
    task.exec("two", &["touch", "/go"])?;
    listener.topics("", "exit")?;
    task.remove()?;
    let life = ["create", "start", "paused", "resumed", "oom", "exit", "delete"];
    same("topics of the container", listener.topics("", "delete")?, life)?;
    for exec in ["one", "two"] {
        let topics = listener.topics(exec, "exit")?;
        same(&format!("topics of exec {exec}"), topics, ["exec-added", "exec-started", "exit"])?;
    }
    let heard = listener.heard()?;
    let place = |topic: &str, exec: &str| {
        let at = heard.iter().position(|(it, of, _)| it == topic && of == exec);
        at.with_context(|| format!("no {topic} of {exec:?}"))
    };
    let order = [
        place("start", "")?,
        place("exec-added", "one")?,
        place("exec-started", "one")?,
        place("exit", "one")?,
        place("paused", "")?,
        place("resumed", "")?,
        place("exec-added", "two")?,
        place("exec-started", "two")?,
        place("oom", "")?,
        place("exit", "")?,
        place("delete", "")?,
    ];
    ensure!(order.is_sorted(), "not in order: {order:?} of {heard:?}");
    for (topic, status) in [("exit", 7), ("delete", 7)] {
        let (.., details) = &heard[place(topic, "")?];
        same(&format!("exit status in {topic}"), &details["exit_status"], status)?;
    }
    Ok(())
}

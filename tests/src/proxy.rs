//! A mesh's proxy in a pod's network namespace (`bin/joey-proxy.rs`), and what it was told.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::paths;

/// A running proxy; it ends with its value.
#[derive(Debug)]
pub struct Proxy {
    child: Child,
    log: PathBuf,
}

/// A connection that a proxy took, or a query, or why it could not carry one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Seen {
    /// `outbound`, `inbound`, `tunnel` or `resolver`.
    pub listener: String,
    /// Who opened it.
    pub peer: Option<SocketAddr>,
    /// To whom.
    pub destination: Option<SocketAddr>,
    /// How it knows: `SO_ORIGINAL_DST`, `getsockname`; of queries `udp`, `tcp`.
    pub by: String,
    /// What went wrong.
    pub error: Option<String>,
}

impl Proxy {
    /// The command of a proxy in this namespace, to be started by [`Proxy::of`].
    #[must_use]
    pub fn command(netns: &Path, log: &Path) -> Command {
        let mut command = Command::new(paths::proxy());
        command.arg("--netns").arg(netns).arg("--log").arg(log);
        command
    }

    /// Starts a proxy and waits until it listens; `start` is given its command.
    pub fn of(
        mut command: Command,
        log: &Path,
        start: impl FnOnce(Command) -> Result<Child>,
    ) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = start(command).context("start joey-proxy")?;
        let output = child.stdout.take();
        let mut line = String::new();
        let proxy = Self { child, log: log.to_owned() };
        BufReader::new(output.context("its output is not piped")?).read_line(&mut line)?;
        ensure!(line.trim() == "ready", "the proxy does not listen: {line:?}");
        Ok(proxy)
    }

    /// Starts one in this process's own namespaces.
    pub fn start(netns: &Path, log: &Path, more: &[&str]) -> Result<Self> {
        let mut command = Self::command(netns, log);
        command.args(more);
        Self::of(command, log, |mut command| Ok(command.spawn()?))
    }

    /// All that it saw so far, and those before it that wrote to the same file.
    pub fn seen(&self) -> Result<Vec<Seen>> {
        seen(&self.log)
    }

    /// What it saw, once there is something that fits.
    pub fn wait(&self, what: &str, fits: impl Fn(&Seen) -> bool) -> Result<Seen> {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let all = self.seen()?;
            if let Some(found) = all.iter().find(|seen| fits(seen)) {
                return Ok(found.clone());
            }
            ensure!(Instant::now() < end, "the proxy saw no {what}: {all:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn seen(log: &Path) -> Result<Vec<Seen>> {
    let text = fs::read_to_string(log)?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

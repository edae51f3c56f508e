//! A mesh's proxy in a pod's network namespace (`bin/joey-proxy.rs`), and what it was told.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::paths;

/// A running proxy; it ends with its value.
#[derive(Debug)]
pub struct Proxy {
    child: Child,
    log: Option<PathBuf>,
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
    pub fn command(netns: &Path, log: Option<&Path>) -> Command {
        let mut command = Command::new(paths::proxy());
        command.arg("--netns").arg(netns);
        if let Some(log) = log {
            command.arg("--log").arg(log);
        }
        command
    }

    /// Starts a proxy and waits until it listens; `start` is given its command.
    pub fn of(
        mut command: Command,
        log: Option<&Path>,
        start: impl FnOnce(Command) -> Result<Child>,
    ) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = start(command).context("start joey-proxy")?;
        let output = child.stdout.take();
        let mut line = String::new();
        let proxy = Self { child, log: log.map(Path::to_owned) };
        BufReader::new(output.context("its output is not piped")?).read_line(&mut line)?;
        ensure!(line.trim() == "ready", "the proxy does not listen: {line:?}");
        Ok(proxy)
    }

    /// Starts one in this process's own namespaces.
    pub fn start(netns: &Path, log: Option<&Path>, more: &[&str]) -> Result<Self> {
        let mut command = Self::command(netns, log);
        command.args(more);
        Self::of(command, log, |mut command| Ok(command.spawn()?))
    }

    /// All that it saw so far, and those before it that wrote to the same file.
    pub fn seen(&self) -> Result<Vec<Seen>> {
        seen(self.log.as_ref().context("the proxy has no log")?)
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

/// The answer to a DNS query (RFC 1035, 4.1): one address for a question of type A, none for others.
pub fn answer(query: &[u8], address: Ipv4Addr) -> Result<Vec<u8>> {
    // Behind the header there is a name, length by length, then type and class.
    let mut end = 12;
    loop {
        match query.get(end) {
            None => bail!("ends in its name"),
            Some(0) => break,
            Some(length) => end += usize::from(*length) + 1,
        }
    }
    let question = query.get(12..end + 5).context("ends in its question")?;
    let known = question.get(question.len() - 4..question.len() - 2) == Some(&[0, 1]);
    let mut answer = vec![query[0], query[1], 0x84, 0, 0, 1, 0, u8::from(known), 0, 0, 0, 0];
    answer.extend_from_slice(question);
    if known {
        // The question's name, type A, class IN, a minute, four bytes.
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend_from_slice(&address.octets());
    }
    Ok(answer)
}

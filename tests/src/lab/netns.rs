//! A network namespace with a name, which goes with its value.
//!
//! Only threads of this module enter it, and they end there. What they open stays in it.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};

/// The namespace.
#[derive(Debug)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Makes it, with its loopback up.
    pub fn add(name: String) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let netns = Self { name };
        netns.ip(&["link set lo up"])?;
        Ok(netns)
    }

    /// Its name for `ip netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Runs commands of `ip` in it, all by one process.
    pub fn ip(&self, commands: &[impl AsRef<str>]) -> Result<()> {
        self.batch("ip", commands)
    }

    /// Runs commands of `tc` in it, all by one process.
    pub fn tc(&self, commands: &[impl AsRef<str>]) -> Result<()> {
        self.batch("tc", commands)
    }

    fn batch(&self, tool: &str, commands: &[impl AsRef<str>]) -> Result<()> {
        let lines: Vec<&str> = commands.iter().map(AsRef::as_ref).collect();
        let mut child = Command::new(tool)
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {tool}"))?;
        let mut input = child.stdin.take().context("its input is not piped")?;
        input.write_all((lines.join("\n") + "\n").as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{tool} -n {} {lines:?}: {}", self.name, words.trim());
        Ok(())
    }

    /// What `tc` shows, of one device.
    pub fn show(&self, what: &str, device: &str) -> Result<String> {
        run(Command::new("tc").args(["-n", &self.name, what, "show", "dev", device]))
    }

    /// Sets a value below `/proc/sys/net`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{key}");
        self.inside(|| std::fs::write(&path, value).with_context(|| path.clone()))
    }

    /// Runs `work` in it.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = File::open(self.path())?;
        thread::scope(|scope| {
            let entered = scope.spawn(|| {
                setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?;
                work()
            });
            entered.join().unwrap_or_else(|_| Err(anyhow!("a thread in {} panicked", self.name)))
        })
    }

    /// Starts a thread that runs `work` in it.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let file = File::open(self.path())?;
        Ok(thread::spawn(move || {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?;
            drop(file);
            work()
        }))
    }

    /// Packets and bytes that a device has received.
    pub fn received(&self, device: &str) -> Result<Frames> {
        let text = self.inside(|| Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?))?;
        let line =
            text.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'));
        let numbers: Vec<u64> = line
            .with_context(|| format!("{}: no device {device}", self.name))?
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        ensure!(numbers.len() > 1, "{}: {device}: {line:?}", self.name);
        Ok(Frames { packets: numbers[1], bytes: numbers[0] })
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        let _ = run(Command::new("ip").args(["netns", "del", &self.name]));
    }
}

/// Ethernet frames, without preamble and checksum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Frames {
    /// How many.
    pub packets: u64,
    /// Of how many bytes in all.
    pub bytes: u64,
}

pub(super) fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}", words.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

//! The process that keeps a test node's namespaces: PID 1 of the node's pid namespace.
//!
//! ```text
//! runner ── fork into a new pid namespace ──► holder: own mount and network namespaces, private /run,
//!                                             /proc and /sys/fs/bpf, `lo` up; prints "ready"; reaps
//! ```
//! Invariant: everything the node ever starts lives in this pid namespace, so that the end of the holder
//! ends all of it, whatever went wrong. A tied holder ends when its stdin closes, that is with the runner.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::sys;

/// Starts the holder as a child of this process and waits until its namespaces are ready.
pub fn spawn(tool: &Path, tied: bool) -> Result<Child> {
    let mut command = Command::new(tool);
    command.arg("hold").stdout(Stdio::piped());
    if tied {
        command.arg("--tied").stdin(Stdio::piped());
    } else {
        // Whoever reads this command's output must not wait for the node's end.
        command.stdin(Stdio::null()).stderr(Stdio::null()).process_group(0);
    }
    let start = move || -> Result<Child> {
        unshare(CloneFlags::CLONE_NEWPID).context("new pid namespace for the node (needs root)")?;
        command.spawn().context("start the node's holder")
    };
    // unshare(CLONE_NEWPID) changes where a thread's children go: keep that to a thread of its own.
    let mut child = on_thread(start)?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    if line.trim() != "ready" {
        bail!("the node's holder did not come up: {:?}", child.wait());
    }
    Ok(child)
}

/// Body of the holder process; returns only when it may end.
pub fn run(tied: bool) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.thread_block()?;
    let signals = SignalFd::new(&signals)?;

    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), None::<&str>)?;
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .context("mount a BPF file system: does the kernel have BPF?")?;
    fs::create_dir_all("/run/netns")?;
    for (key, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")] {
        fs::write(format!("/proc/sys/net/{key}"), value)
            .with_context(|| format!("sysctl {key}"))?;
    }
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("run ip")?;
    if !up.success() {
        bail!("ip link set lo up: {up}");
    }
    println_ready()?;
    reap_forever(&signals, tied)
}

fn println_ready() -> Result<()> {
    let mut out = std::io::stdout();
    out.write_all(b"ready\n")?;
    out.flush()?;
    Ok(())
}

fn reap_forever(signals: &SignalFd, tied: bool) -> Result<()> {
    let stdin = std::io::stdin();
    loop {
        let mut polled = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if tied {
            polled.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        poll(&mut polled, PollTimeout::NONE)?;
        if tied && polled[1].any() == Some(true) {
            return Ok(());
        }
        signals.read_signal()?;
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if matches!(status, WaitStatus::StillAlive) {
                break;
            }
        }
    }
}

/// Starts `command` inside the namespaces of the holder with this pid.
pub fn spawn_inside(holder: u32, mut command: Command) -> Result<Child> {
    let open = |kind: &str| {
        let path = format!("/proc/{holder}/ns/{kind}");
        File::open(&path).with_context(|| format!("open {path}: is the node up?"))
    };
    let pid = open("pid")?;
    let others =
        vec![(open("net")?, CloneFlags::CLONE_NEWNET), (open("mnt")?, CloneFlags::CLONE_NEWNS)];
    sys::join_before_exec(&mut command, others);
    on_thread(move || {
        setns(&pid, CloneFlags::CLONE_NEWPID).context("join the node's pid namespace")?;
        let program = command.get_program().to_owned();
        command.spawn().with_context(|| format!("start {program:?} in the node"))
    })
}

/// Runs `work` on a thread that is in the node's network namespace.
pub fn in_network<T: Send>(holder: u32, work: impl FnOnce() -> T + Send) -> Result<T> {
    let path = format!("/proc/{holder}/ns/net");
    let network = File::open(&path).with_context(|| format!("open {path}: is the node up?"))?;
    on_thread(move || {
        setns(&network, CloneFlags::CLONE_NEWNET).context("join the node's network")?;
        Ok(work())
    })
}

fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(_) => bail!("a helper thread panicked"),
    })
}

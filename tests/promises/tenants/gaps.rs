//! There is no moment at which what is not allowed passes: not before a pod's policy is there, not after, and not
//! because somebody was killed. Pods send all the time; a listener counts what arrives.

use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_tests::pod::{self, Pod};
use joey_tests::process;
use k8s_cri::v1::{ContainerConfig, ContainerState};

use super::{Context, Peer, Policy, only_joey};
use crate::context::{refused, same};
use crate::volumes::probed;

/// Addresses of the node: at the first nothing is allowed, at the second everything.
const FORBIDDEN: &str = "10.77.0.1";
const ALLOWED: &str = "10.88.0.1";
const PORT: u16 = 9999;

/// Sends to these addresses, from its first instruction until its end, and tells what it gets.
fn sender(addresses: &[String]) -> ContainerConfig {
    let port = PORT.to_string();
    let targets = addresses.iter().map(|address| format!("{address}:{PORT}"));
    let words = ["/probe", "exchange", &port].map(str::to_owned).into_iter().chain(targets);
    let words: Vec<String> = words.collect();
    probed(pod::container("sender", &words.iter().map(String::as_str).collect::<Vec<_>>()))
}

/// To both addresses of the node.
fn to_the_node() -> ContainerConfig {
    sender(&[FORBIDDEN, ALLOWED].map(str::to_owned))
}

/// What has arrived at the node.
#[derive(Default)]
struct Arrived {
    forbidden: AtomicU64,
    allowed: AtomicU64,
    over: AtomicBool,
}

impl Arrived {
    fn allowed(&self) -> u64 {
        self.allowed.load(Ordering::Relaxed)
    }

    /// Waits until more of what is allowed has arrived: the pods do send.
    fn more(&self) -> Result<()> {
        let (before, end) = (self.allowed(), Instant::now() + pod::SOON);
        while self.allowed() == before {
            ensure!(Instant::now() < end, "nothing arrives at all");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Listens at both addresses while `work` runs; fails if anything reached the first.
fn watched(ctx: &Context<'_>, work: impl FnOnce(&Arrived) -> Result<()>) -> Result<()> {
    let ip =
        |what: &str| ctx.inside("ip", &["addr", what, &format!("{FORBIDDEN}/32"), "dev", "lo"]);
    ensure!(ip("add")?.status.success(), "no address {FORBIDDEN}");
    let bind = |address: &str| -> Result<UdpSocket> {
        let socket = ctx.node.in_network(|| UdpSocket::bind((address, PORT)))?;
        let socket = socket.with_context(|| format!("listen at {address}"))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok(socket)
    };
    let (forbidden, allowed) = (bind(FORBIDDEN)?, bind(ALLOWED)?);
    let arrived = Arrived::default();
    let result = std::thread::scope(|scope| {
        for (socket, count) in [(&forbidden, &arrived.forbidden), (&allowed, &arrived.allowed)] {
            scope.spawn(|| {
                while !arrived.over.load(Ordering::Relaxed) {
                    if socket.recv(&mut [0; 64]).is_ok() {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let result = work(&arrived);
        arrived.over.store(true, Ordering::Relaxed);
        result
    });
    ip("del")?;
    result?;
    let (forbidden, allowed) = (arrived.forbidden.into_inner(), arrived.allowed.into_inner());
    ensure!(forbidden == 0, "{forbidden} datagrams passed that may not ({allowed} that may)");
    Ok(())
}

/// From a pod's first instruction, one that found a machine waiting and one that did not; and to it.
pub fn at_the_start(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    // A pod without a VM: nobody judges what it sends.
    let blue = Pod::run(ctx.node, "runc", "blue")?;
    // The addresses that the next pods get.
    let own: u8 = blue.addresses()?[0].rsplit('.').next().context("an address")?.parse()?;
    let next: Vec<String> = (own + 1..own + 9).map(|last| format!("10.88.0.{last}")).collect();
    let flood = blue.start(&sender(&next))?;
    watched(ctx, |arrived| {
        let mut pods = Vec::new();
        for number in 0..4 {
            let pod = ctx.pod(&format!("sender{number}"))?;
            let container = pod.start(&to_the_node())?;
            pods.push((pod, container));
        }
        arrived.more()?;
        arrived.more()?;
        for (pod, container) in pods {
            let (heard, errors) = container.logs()?;
            let (heard, errors) =
                (String::from_utf8_lossy(&heard), String::from_utf8_lossy(&errors));
            ensure!(heard.is_empty(), "heard from another tenant: {heard:?} {errors:?}");
            pod.remove()?;
        }
        Ok(())
    })?;
    same("what floods goes on", flood.status()?.state(), ContainerState::ContainerRunning)?;
    blue.remove()
}

/// What a boot leaves: the maps are gone, what was applied is on the disk. No pod starts before it is in force
/// again, whoever is killed on the way, and one that cannot be keeps pods from starting until it is mended.
pub fn after_a_boot(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let policy = Policy::new(ctx);
    let allow = "  allow:\n  - {from: red, to: blue, ports: [80/tcp]}\n";
    policy.apply(allow)?;
    ctx.node.kill_network()?;
    let forget = || ctx.inside("sh", &["-c", "rm -r /sys/fs/bpf/joey/policy-*"]);
    ensure!(forget()?.status.success(), "the maps are still pinned");
    let identities = ctx.node.dir().join("joey/network/identities.json");
    let before = std::fs::read(&identities).ok();
    std::fs::write(&identities, "{")?;
    refused("a pod without a policy", ctx.pod("early"), "cannot be put in force")?;
    policy.apply(allow)?;
    if let Some(before) = before {
        std::fs::write(&identities, before)?;
    }
    let works = || -> Result<()> {
        let (red, blue) = (Peer::run(ctx, "red", "red")?, Peer::run(ctx, "blue", "blue")?);
        red.expect(&blue, 80, true)?;
        red.expect(&blue, 81, false)?;
        blue.expect(&red, 80, false)?;
        red.remove()?;
        blue.remove()
    };
    works()?;
    ensure!(forget()?.status.success(), "the maps are still pinned");
    for milliseconds in 0..20 {
        let mut command = Command::new(joey_tests::paths::joey());
        command.args(["ebpf", "load"]).env("JOEY_CONFIG", ctx.node.dir().join("joey.toml"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = ctx.node.spawn_inside(command)?;
        std::thread::sleep(Duration::from_millis(milliseconds * 12));
        let _ = child.kill();
        child.wait()?;
    }
    works()?;
    ctx.node.start_network()
}

/// Shim, VMM, containerd, the network daemon, a policy that is being applied: killed while a pod sends.
pub fn by_kills(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let policy = Policy::new(ctx);
    watched(ctx, |arrived| {
        let start = |name: &str| -> Result<_> {
            let pod = ctx.pod(name)?;
            let container = pod.start(&to_the_node())?;
            arrived.more()?;
            Ok((pod, container))
        };
        // The daemon: the pod goes on.
        let (pod, _container) = start("daemon")?;
        ctx.node.kill_network()?;
        arrived.more()?;
        ctx.node.start_network()?;
        ctx.node.kill_containerd()?;
        arrived.more()?;
        ctx.node.start_containerd()?;
        arrived.more()?;
        // Policies that are killed while they are applied, anywhere.
        let file = ctx.node.dir().join("killed.yaml");
        let more = "  allow:\n  - {from: default, to: nobody, ports: [any]}\n";
        std::fs::write(&file, format!("{}{more}", joey_tests::node::config::POLICY))?;
        for milliseconds in 0..25 {
            let mut command = Command::new(joey_tests::paths::joey());
            command.args(["policy", "apply", "-f"]).arg(&file).stdin(Stdio::null());
            command.env("JOEY_CONFIG", ctx.node.dir().join("joey.toml"));
            command.stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = ctx.node.spawn_inside(command)?;
            std::thread::sleep(Duration::from_millis(milliseconds * 2));
            let _ = child.kill();
            child.wait()?;
        }
        std::fs::remove_file(&file)?;
        policy.apply("")?;
        arrived.more()?;
        pod.remove()?;
        // Those without whom the pod ends.
        for victim in ["shim", "VMM"] {
            let (pod, container) = start(victim)?;
            let told = super::told(ctx, &["ps"])?.to_string();
            let mark = if victim == "shim" { "containerd-shim-joey-v2" } else { "qemu" };
            let found = ctx.node.processes().into_iter().find(|(_, name)| {
                name.contains(mark) && (victim == "VMM" || name.contains(&pod.id))
            });
            let (pid, _) = found.with_context(|| format!("no {victim} of {}: {told}", pod.id))?;
            process::kill(pid)?;
            container.wait(pod::SOON)?;
            pod.remove()?;
        }
        Ok(())
    })
}

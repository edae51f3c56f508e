//! What is counted is what passed, to the packet; flows have both ends' names; limits are set where they act.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use joey_tests::capture::{Capture, Seen};
use serde_json::Value;

use super::{Context, Peer, only_joey, told};
use crate::context::{holds, same};

/// One pod's line of `joey top`.
pub(crate) fn counted(ctx: &Context<'_>, pod: &str) -> Result<Value> {
    let all = told(ctx, &["top", "--once"])?;
    let pods = all["pods"].as_array().with_context(|| format!("no pods: {all}"))?;
    let found = pods.iter().find(|line| line["pod"] == pod);
    Ok(found.with_context(|| format!("no {pod}: {all}"))?.clone())
}

/// The numbers of packets and bytes in both directions, beside those of a packet capture on the VM's own wire.
pub fn counted_as_captured(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let (red, friend) = (Peer::run(ctx, "red", "red")?, Peer::run(ctx, "friend", "red")?);
    let capture = Capture::start(ctx.node, &netns(ctx, &red)?, "joey0")?;
    let (seen_before, before) = settled(ctx, &capture)?;
    for _ in 0..3 {
        red.expect(&friend, 80, true)?;
        friend.expect(&red, 80, true)?;
    }
    red.shell.sh("for i in 1 2 3 4 5; do ping -c 2 -s 3000 10.88.0.1; done")?;
    let (seen, now) = settled(ctx, &capture)?;
    ensure!(capture.lost() == 0, "the capture lost {} frames", capture.lost());
    let both =
        [("egress", seen_before.sent, seen.sent), ("ingress", seen_before.received, seen.received)];
    for (direction, before_that, after) in both {
        for (what, captured) in
            [("packets", after.0 - before_that.0), ("bytes", after.1 - before_that.1)]
        {
            let key = format!("{direction}_{what}");
            let number =
                |value: &Value| value[&key].as_u64().with_context(|| format!("no {key}: {value}"));
            same(&key, number(&now)? - number(&before)?, captured)?;
            ensure!(captured > 0, "nothing was captured");
        }
    }
    friend.remove()?;
    red.remove()
}

/// What was captured and what was counted, once nothing is on its way.
fn settled(ctx: &Context<'_>, capture: &Capture) -> Result<(Seen, Value)> {
    let end = Instant::now() + Duration::from_secs(20);
    let mut last = (capture.seen(), counted(ctx, "red/red")?);
    loop {
        std::thread::sleep(Duration::from_millis(300));
        let now = (capture.seen(), counted(ctx, "red/red")?);
        if now == last {
            return Ok(now);
        }
        ensure!(Instant::now() < end, "the pods do not fall silent");
        last = now;
    }
}

/// A pod's network namespace, in the node.
pub(crate) fn netns(ctx: &Context<'_>, peer: &Peer<'_>) -> Result<String> {
    let told = told(ctx, &["inspect", &peer.pod.id])?;
    let netns = told["record"]["netns"].as_str();
    Ok(netns.with_context(|| format!("no network namespace: {told}"))?.to_owned())
}

/// A flow that was allowed and one that was not, with who was at both ends.
pub fn flows(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let (red, friend) = (Peer::run(ctx, "red", "red")?, Peer::run(ctx, "friend", "red")?);
    let blue = Peer::run(ctx, "blue", "blue")?;
    red.expect(&friend, 80, true)?;
    blue.expect(&red, 80, false)?;
    let flows = |arguments: &[&str]| ctx.node.joey(&[&["flows", "--json"], arguments].concat());
    let allowed = flows(&["--pod", "red/red", "--verdict", "allow"])?;
    holds("an allowed flow", &allowed, "red/friend")?;
    let denied = flows(&["--tenant", "blue", "--verdict", "drop"])?;
    holds("a denied flow", &denied, "red/red")?;
    // What is followed comes as it happens.
    let mut command = Command::new(joey_tests::paths::joey());
    command.args(["flows", "--follow", "--json", "--pod", "red/friend"]);
    command.env("JOEY_CONFIG", ctx.node.dir().join("joey.toml"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut follower = ctx.node.spawn_inside(command)?;
    let lines = BufReader::new(follower.stdout.take().context("no output")?).lines();
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    friend.expect(&red, 81, true)?;
    let end = Instant::now() + joey_tests::pod::SOON;
    let is_that = |line: &String| line.contains("\"port\":81") && !line.contains("\"open\"");
    let followed = loop {
        let left = end.saturating_duration_since(Instant::now());
        match receive.recv_timeout(left) {
            Ok(line) if is_that(&line) => break Ok(()),
            Ok(_) => {}
            Err(_) => break Err(anyhow!("the end of a flow was not told to who follows")),
        }
    };
    let _ = follower.kill();
    follower.wait()?;
    followed?;
    // The same for machines, by pod and by tenant.
    let mut metrics = UnixStream::connect(ctx.node.metrics())?;
    metrics.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    metrics.read_to_string(&mut text)?;
    let told = |name: &str, words: &[&str]| {
        let mut lines = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
        ensure!(
            lines.any(|line| words.iter().all(|word| line.contains(word)) && !line.ends_with(" 0")),
            "no {name} with {words:?}: {text}"
        );
        Ok(())
    };
    told("joey_pod_packets_total", &["namespace=\"red\"", "pod=\"friend\"", "egress"])?;
    told("joey_tenant_drops_total", &["tenant=\"blue\"", "Tenant"])?;
    // The record of a pod outlives it.
    blue.remove()?;
    holds("a flow of the past", &flows(&["--tenant", "blue"])?, "blue/blue")?;
    let line = allowed.lines().next().context("no flow at all")?;
    let flow: Value = serde_json::from_str(line)?;
    ensure!(flow.is_object(), "{line}");
    friend.remove()?;
    red.remove()
}

/// Bits are limited by what waits at the devices, packets by the programs; while the pod runs.
pub fn limits(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let annotations =
        [("kubernetes.io/egress-bandwidth", "8M"), ("io.joey.network.ingress-packets", "50")];
    let red = Peer::annotated(ctx, "red", "red", &annotations)?;
    let netns = netns(ctx, &red)?;
    let qdiscs = || -> Result<String> {
        let shown = ctx.inside("nsenter", &[&format!("--net={netns}"), "tc", "qdisc", "show"])?;
        Ok(String::from_utf8_lossy(&shown.stdout).into_owned())
    };
    let limited = |qdiscs: &str, device: &str, rate: &str| {
        let device = format!("qdisc tbf 6a79: dev {device} root");
        qdiscs.lines().any(|line| line.starts_with(&device) && line.contains(rate))
    };
    let first = qdiscs()?;
    ensure!(limited(&first, "eth0", "rate 8Mbit"), "{first}");
    let target = (red.addresses[0].parse::<IpAddr>()?, 9);
    ctx.node.in_network(|| -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..400 {
            socket.send_to(b"datagram", target)?;
        }
        Ok(())
    })??;
    let line = counted(ctx, "red/red")?.to_string();
    ensure!(line.contains("Rate") || line.contains("limit"), "{line}");
    ctx.node.joey(&["limit", &red.pod.id, "--egress-bits", "0", "--ingress-bits", "20M"])?;
    let changed = qdiscs()?;
    ensure!(!changed.contains("8Mbit") && limited(&changed, "joey0", "rate 20Mbit"), "{changed}");
    match ctx.node.joey(&["limit", &red.pod.id, "--egress-bits", "5"]) {
        Ok(_) => bail!("5 bits a second were accepted"),
        Err(error) => holds("refused", &format!("{error:#}"), "egress-bits")?,
    }
    red.remove()
}

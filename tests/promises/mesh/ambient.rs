//! Ambient mode with real pods: the same, through the kubelet's and the operator's interfaces.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_tests::pod::{self, Pod, SOON};
use joey_tests::process;
use joey_tests::proxy::{Proxy, answer};

use crate::context::{Context, holds, refused, same};
use crate::tenants::seeing::{counted, netns};
use crate::tenants::{Peer, Policy, only_joey, probe};

const AMBIENT: (&str, &str) = ("io.joey.mesh", "ambient");

/// A proxy in a pod's network namespace.
fn proxy(ctx: &Context<'_>, peer: &Peer<'_>, more: &[&str]) -> Result<Proxy> {
    let log = ctx.node.dir().join("proxy.log");
    let mut command = Proxy::command(netns(ctx, peer)?.as_ref(), Some(&log));
    command.args(more);
    Proxy::of(command, Some(&log), |command| ctx.node.spawn_inside(command))
}

fn forget(ctx: &Context<'_>) {
    let _ = std::fs::remove_file(ctx.node.dir().join("proxy.log"));
}

/// What `ip` and others show in a pod's namespace.
fn shown(ctx: &Context<'_>, netns: &str, words: &[&str]) -> Result<String> {
    let net = format!("--net={netns}");
    let output = ctx.inside("nsenter", &[&[net.as_str()], words].concat())?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// TCP both ways goes through the proxy, and datagrams, pings and probes do not, IPv4 and IPv6.
pub fn through_the_proxy(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let app = Peer::annotated(ctx, "app", "shop", &[AMBIENT, ("io.joey.mesh.dns", "true")])?;
    let other = Peer::run(ctx, "other", "shop")?;
    // Past the proxy, which is not there.
    for address in &app.addresses {
        probe(ctx, address)?;
        ensure!(other.pings(address)?, "{address} does not answer a ping");
    }
    for address in &other.addresses {
        ensure!(app.pings(address)?, "{address} does not answer the pod's ping");
    }
    // The rest by it.
    let proxy = proxy(ctx, &app, &["--resolve", "192.0.2.53"])?;
    app.expect(&other, 80, true)?;
    other.expect(&app, 80, true)?;
    for (own, peer) in app.addresses.iter().zip(&other.addresses) {
        let (own, peer): (IpAddr, IpAddr) = (own.parse()?, peer.parse()?);
        for (listener, from, to) in [("outbound", own, peer), ("inbound", peer, own)] {
            proxy.wait(&format!("{listener} connection from {from} to {to}"), |seen| {
                seen.listener == listener
                    && seen.peer.is_some_and(|it| it.ip() == from)
                    && seen.destination == Some(SocketAddr::new(to, 80))
                    && seen.by == "getsockname"
            })?;
        }
    }
    sources(&app, &other)?;
    let answer = app.shell.sh("nslookup a.b 10.96.0.10")?;
    holds("the resolver's answer", &answer.text(), "192.0.2.53")?;
    for address in &app.addresses {
        probe(ctx, address)?;
    }
    let seen = proxy.seen()?;
    let node: [IpAddr; 2] = ["10.88.0.1".parse()?, "fd88::1".parse()?];
    let probes = seen.iter().filter(|it| it.peer.is_some_and(|peer| node.contains(&peer.ip())));
    same("probes at the proxy", probes.count(), 0)?;
    let mut forward = app.pod.forward(80)?;
    forward.send(b"GET / HTTP/1.0\r\n\r\n")?;
    holds("port-forward", &String::from_utf8_lossy(&forward.receive()?), "HTTP/1")?;
    no_rules(ctx, &netns(ctx, &app)?)?;
    let flows = ctx.node.joey(&["flows", "--json", "--pod", "shop/app", "--verdict", "allow"])?;
    holds("the proxy's flows are the pod's", &flows, "shop/other")?;
    drop(proxy);
    forget(ctx);
    app.remove()?;
    other.remove()
}

/// The pod's server sees who asked it, not the proxy.
fn sources(app: &Peer<'_>, other: &Peer<'_>) -> Result<()> {
    let text = "httpd -f -vv -p '[::]:8080' -h /www";
    let server = app.pod.start(&pod::script("logs", &format!("echo up; {text} 2>&1")))?;
    server.wait_output("up", SOON)?;
    for (own, peer) in app.addresses.iter().zip(&other.addresses) {
        let end = Instant::now() + Duration::from_secs(10);
        while !other.reaches(own, 8080)? {
            ensure!(Instant::now() < end, "{own} port 8080 is not reached");
        }
        server.wait_output(peer, SOON).context("the client's address at the server")?;
    }
    Ok(())
}

/// A resolver on the node answers the pod's queries.
fn datagrams(ctx: &Context<'_>, app: &Peer<'_>) -> Result<()> {
    for node in ["10.88.0.1", "fd88::1"] {
        let at: IpAddr = node.parse()?;
        let socket = ctx.node.in_network(|| UdpSocket::bind((at, 53)))??;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        let resolver = std::thread::spawn(move || -> Result<()> {
            let mut query = [0; 512];
            // For IPv4 and IPv6 addresses.
            for _ in 0..2 {
                let (length, from) = socket.recv_from(&mut query)?;
                socket.send_to(&answer(&query[..length], [192, 0, 2, 7].into())?, from)?;
            }
            Ok(())
        });
        let told = app.shell.sh(&format!("nslookup a.b {node}"))?;
        holds(&format!("what the resolver at {node} says"), &told.text(), "192.0.2.7")?;
        resolver.join().map_err(|_| anyhow::anyhow!("the resolver panicked"))??;
    }
    Ok(())
}

/// Neither filter rules nor tracked connections in a namespace.
fn no_rules(ctx: &Context<'_>, netns: &str) -> Result<()> {
    for words in [&["nft", "list", "ruleset"][..], &["iptables-save"], &["ip6tables-save"]] {
        let rules = shown(ctx, netns, words).unwrap_or_default();
        ensure!(!rules.contains("-A ") && !rules.contains("chain"), "{words:?}: {rules}");
    }
    Ok(())
}

/// What the node's policy says of a namespace holds for its pods, and what a pod says goes before it.
pub fn of_namespaces(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let policy = Policy::new(ctx);
    policy.apply("  mesh:\n  - {namespaces: [shop], mode: ambient}\n")?;
    let app = Peer::run(ctx, "app", "shop")?;
    let none = Peer::annotated(ctx, "none", "shop", &[("io.joey.mesh", "none")])?;
    let plain = Peer::run(ctx, "plain", "plain")?;
    let rules = |peer: &Peer<'_>| shown(ctx, &netns(ctx, peer)?, &["ip", "rule"]);
    holds("rules of a meshed pod", &rules(&app)?, "lookup 27257")?;
    for peer in [&none, &plain] {
        ensure!(!rules(peer)?.contains("27257"), "a pod is meshed that should not be");
    }
    none.expect(&app, 80, false)?;
    let proxy = proxy(ctx, &app, &[])?;
    none.expect(&app, 80, true)?;
    app.expect(&none, 80, true)?;
    drop(proxy);
    forget(ctx);
    refused(
        "a bad mode",
        policy.apply("  mesh:\n  - {namespaces: [a], mode: on}\n"),
        "mesh[0].mode",
    )?;
    app.remove()?;
    none.remove()?;
    plain.remove()
}

/// Without its proxy a pod has no connections, and it is told why; with the next one all is well.
pub fn fails_closed(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let app = Peer::annotated(ctx, "app", "shop", &[AMBIENT])?;
    let other = Peer::run(ctx, "other", "shop")?;
    let stranger = Peer::run(ctx, "stranger", "elsewhere")?;
    datagrams(ctx, &app)?;
    for _ in 0..2 {
        app.expect(&other, 80, false)?;
        other.expect(&app, 80, false)?;
        let proxy = proxy(ctx, &app, &[])?;
        app.expect(&other, 80, true)?;
        other.expect(&app, 80, true)?;
        // Across tenants neither way, by whomever.
        app.expect(&stranger, 80, false)?;
        stranger.expect(&app, 80, false)?;
        drop(proxy);
    }
    forget(ctx);
    let top = counted(ctx, "shop/app")?.to_string();
    holds("joey top", &top, "\"Proxy\":")?;
    let flows = ctx.node.joey(&["flows", "--json", "--pod", "shop/app", "--verdict", "drop"])?;
    holds("joey flows", &flows, "\"reason\":\"Proxy\"")?;
    app.remove()?;
    other.remove()?;
    stranger.remove()
}

/// A killed shim's namespace is as CNI made it, once containerd has cleaned up.
pub fn killed_shim(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let app = Peer::annotated(ctx, "app", "shop", &[AMBIENT])?;
    let netns = netns(ctx, &app)?;
    holds("rules", &shown(ctx, &netns, &["ip", "rule"])?, "lookup 27257")?;
    let found =
        ctx.node.processes().into_iter().find(|(_, name)| {
            name.contains("containerd-shim-joey-v2") && name.contains(&app.pod.id)
        });
    process::kill(found.context("no shim")?.0)?;
    let end = Instant::now() + SOON;
    loop {
        let state = [["-4", "rule"], ["-6", "rule"], ["link", "show"], ["-d", "address"]]
            .iter()
            .map(|words| shown(ctx, &netns, &[&["ip"], &words[..]].concat()))
            .collect::<Result<Vec<_>>>()?;
        let text = state.join("\n");
        let firsts = state.iter().take(2).all(|it| it.starts_with("0:\tfrom all lookup local"));
        if firsts && !text.contains("2725") && !text.contains("2727") && !text.contains("joey0") {
            break;
        }
        ensure!(Instant::now() < end, "what is left of a killed shim: {text}");
        std::thread::sleep(Duration::from_millis(50));
    }
    let routes = shown(ctx, &netns, &["ip", "route", "show", "table", "all"])?;
    ensure!(!routes.contains("27257"), "routes are left: {routes}");
    app.shell.wait(SOON)?;
    app.remove()
}

/// What cannot be followed is refused by its name.
pub fn bad_annotations(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    for (name, value, why) in [
        ("io.joey.mesh", "ambiant", "must be ambient"),
        ("io.joey.mesh", "", "must be ambient"),
        ("io.joey.mesh.dns", "true", "needs io.joey.mesh"),
        ("io.joey.mesh.dns", "maybe", "true or false"),
        ("io.joey.mesh.ports", "80", "unknown"),
    ] {
        let mut config = pod::config(ctx.node, "bad");
        config.annotations.insert(name.into(), value.into());
        let result = Pod::run_with(ctx.node, ctx.handler, config);
        let error = result.err().with_context(|| format!("{name} = {value:?} was accepted"))?;
        for part in [name, why] {
            holds(&format!("{name} = {value:?}"), &format!("{error:#}"), part)?;
        }
    }
    Ok(())
}

//! Real pods' connections to the node.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result};
use k8s_cri::v1::{ContainerConfig, Int64Value, Mount};

use super::super::stats::Samples;
use super::super::{rest, timeline};
use super::{CONNECTIONS, EACH, THREADS, greet, sink};
use crate::node::Node;
use crate::paths;
use crate::pod::{self, Container, Pod};
use crate::proxy::Proxy;

/// The node, as pods reach it.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
/// How long a stream lasts.
const SECONDS: u32 = 3;

pub(super) fn measure(
    node: &Node,
    runs: usize,
    samples: &mut Samples,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let plain = start(node, "plain", &[])?;
    let meshed = start(node, "meshed", &[("io.joey.mesh", "ambient")])?;
    // The first pod has made the bridge with this address.
    let listen = || node.in_network(|| TcpListener::bind((GATEWAY, 0)))?.context("listen");
    let (greeter, taker) = (listen()?, listen()?);
    let (greeted, taken) = (greeter.local_addr()?.to_string(), taker.local_addr()?.port());
    greet(greeter);
    let received = sink(taker);
    let inspected = node.joey(&["inspect", "--json", &meshed.0.id])?;
    let inspected: serde_json::Value = serde_json::from_str(&inspected)?;
    let netns = inspected["record"]["netns"].as_str().context("the pod has no namespace")?;
    let command = Proxy::command(netns.as_ref(), None);
    let _proxy = Proxy::of(command, None, |command| node.spawn_inside(command))?;
    let (sidecar, exempt, app) = sidecar(node)?;
    let mut subjects = [
        ("joey", &plain.1),
        ("joey+ambient", &meshed.1),
        ("joey+sidecar", &app),
        ("joey+sidecar exempt", &exempt),
    ];
    rest(node);
    for run in 1..=runs {
        subjects.rotate_left(1);
        for (subject, shell) in subjects {
            let mut add = |metric, unit, value| samples.add(subject, metric, unit, value);
            let times = shell.sh(&format!("/probe connects {greeted} {CONNECTIONS}"))?;
            for line in times.text().lines() {
                let (connected, byte) = line.split_once(' ').context("no two times")?;
                add("connect", "µs", connected.parse()?);
                add("first_byte", "µs", byte.parse()?);
            }
            let rate = shell.sh(&format!("/probe connect-rate {greeted} {EACH} {THREADS}"))?;
            add("connect_rate", "1/s", rate.text().trim().parse().context("no rate")?);
            let before = received.load(Ordering::Relaxed);
            shell.sh(&format!("timeout {SECONDS} nc {GATEWAY} {taken} < /dev/zero || true"))?;
            let bytes = (received.load(Ordering::Relaxed) - before) as f64;
            add("tcp_out", "Mb/s", bytes * 8.0 / f64::from(SECONDS) / 1e6);
        }
        // By loopback both, as far as the connection that is timed goes: the difference is the programs'.
        for (metric, shell, to) in [
            ("connect_proxy", &app, greeted.as_str()),
            ("connect_local", &exempt, "127.0.0.1:9000"),
        ] {
            let times = shell.sh(&format!("/probe connects {to} {CONNECTIONS}"))?;
            for line in times.text().lines() {
                let (connected, _) = line.split_once(' ').context("no two times")?;
                samples.add("joey+sidecar", metric, "µs", connected.parse()?);
            }
        }
        progress(&format!("pods: {run} of {runs} runs"));
    }
    for (subject, (pod, _)) in [("joey", &plain), ("joey+ambient", &meshed)] {
        let steps = timeline(node, pod)["steps"].take();
        let took = steps.as_array().into_iter().flatten().find(|step| step["name"] == "wire");
        if let Some(took) = took.and_then(|step| step["took_ms"].as_f64()) {
            samples.add(subject, "wire", "ms", took);
        }
    }
    sidecar.remove()?;
    plain.0.remove()?;
    meshed.0.remove()
}

/// A pod in sidecar mode, its proxy's container, whose own connections are left alone, and the application's.
fn sidecar(node: &Node) -> Result<(Pod<'_>, Container<'_>, Container<'_>)> {
    /// The user that the proxy runs as.
    const PROXY: i64 = 1337;
    let mut config = pod::config(node, "sidecar");
    config.annotations.insert("io.joey.mesh".into(), "sidecar".into());
    let pod = Pod::run_with(node, "joey", config)?;
    let text = "/probe sidecar carries 15001 15006 & /probe greet 127.0.0.1:9000 & wait";
    let mut proxy = probed(pod::script("proxy", text));
    pod::security(&mut proxy).run_as_user = Some(Int64Value { value: PROXY });
    let proxy = pod.start(&proxy)?;
    proxy.wait_output("sidecar is up", pod::SOON)?;
    proxy.wait_output("greets", pod::SOON)?;
    let app = pod.start(&probed(pod::container("main", &["sleep", "100000"])))?;
    Ok((pod, proxy, app))
}

/// A pod with these annotations and the probe.
pub(crate) fn start<'n>(
    node: &'n Node,
    name: &str,
    annotations: &[(&str, &str)],
) -> Result<(Pod<'n>, Container<'n>)> {
    let mut config = pod::config(node, name);
    let annotations = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    config.annotations.extend(annotations);
    let pod = Pod::run_with(node, "joey", config)?;
    let shell = pod.start(&probed(pod::container("main", &["sleep", "100000"])))?;
    Ok((pod, shell))
}

fn probed(mut container: ContainerConfig) -> ContainerConfig {
    container.mounts.push(Mount {
        container_path: "/probe".into(),
        host_path: paths::probe().display().to_string(),
        readonly: true,
        ..Mount::default()
    });
    container
}

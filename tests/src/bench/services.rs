//! `bench services`: what it costs that a guest translates connections to services.
//!
//! A tenant has 5,000 services with 50,000 endpoints. `fill` is until a fresh guest has all of them, from the log on
//! the host to the maps (of each pod's start, beside the rest of it). `change_visible` is from the daemon's being told
//! of one endpoint until a process in the guest, which connects once a millisecond, has said on its output that it is
//! there; `answer` is what of that a process takes to answer a line. `connect` is until a connection is made from the
//! guest to a server on the node: `joey` by the server's address, `joey+services` by that of a service, by turns in
//! the same guest.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::mesh::{GATEWAY, greet, start};
use super::stats::{Report, Samples};
use super::{machine, milliseconds, rest, timeline};
use crate::node::Node;

const SERVICES: u32 = 5_000;
const ENDPOINTS: u32 = 10;
/// Connections of a run by each way.
const CONNECTIONS: usize = 200;
/// Changes of a run.
const CHANGES: usize = 5;
/// The service by which connections are timed, and the one that changes.
const TIMED: &str = "10.95.0.1";
const CHANGING: &str = "10.95.0.2";

const SUBJECT: &str = "joey+services";

/// Measures and returns the report; `progress` is told what happens.
pub fn services(node: &Node, runs: usize, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let mut samples = Samples::default();
    // The first pod makes the bridge, and what else is made once a node.
    progress("warming up");
    super::one(node, "joey", &mut Samples::default())?;
    let listener = node.in_network(|| TcpListener::bind((GATEWAY, 0)))?.context("listen")?;
    let port = listener.local_addr()?.port();
    greet(listener);
    let mut daemon = Daemon::connect(node)?;
    let others = (0..SERVICES - 2).map(|n| {
        let endpoints = (0..ENDPOINTS).map(|m| (Ipv4Addr::from(0x0a40_0000 + n * 16 + m), 8080));
        service(&format!("s{n}"), Ipv4Addr::from(0x0a60_0000 + n), &endpoints.collect::<Vec<_>>())
    });
    let own = [(TIMED, &[(GATEWAY, port)][..]), (CHANGING, &[])];
    let own = own.iter().map(|(address, to)| Ok(service(address, address.parse()?, to)));
    let all: Vec<_> = own.chain(others.map(Ok)).collect::<Result<_>>()?;
    daemon.tell(&json!({ "replace": all }))?;
    for run in 1..=runs {
        let name = format!("services{run}");
        rest(node);
        let (pod, shell) = start(node, &name, &[("io.joey.services", "guest")])?;
        let steps = timeline(node, &pod)["steps"].take();
        let step = steps.as_array().into_iter().flatten().find(|step| step["name"] == "services");
        let took = step.and_then(|step| step["took_ms"].as_f64()).context("no step services")?;
        samples.add(SUBJECT, "fill", "ms", took);
        rest(node);
        let ways = [("joey", GATEWAY.to_string()), (SUBJECT, TIMED.to_owned())];
        for (subject, address) in
            if run % 2 == 0 { ways.clone() } else { [ways[1].clone(), ways[0].clone()] }
        {
            let at = if subject == SUBJECT { 80 } else { port };
            let times = shell.sh(&format!("/probe connects {address}:{at} {CONNECTIONS}"))?.text();
            let times: Vec<_> = times.lines().collect();
            ensure!(times.len() == CONNECTIONS, "{address}: {times:?}");
            for line in times {
                let (connected, _) = line.split_once(' ').context("no two times")?;
                samples.add(subject, "connect", "µs", connected.parse()?);
            }
        }
        let changing = format!("{CHANGING}:80");
        let until = |end| shell.exec_live(&["/probe", "services", "until", &changing, end], false);
        let (mut there, mut gone) = (until("Connected")?, until("ConnectionRefused")?);
        there.wait_for("ready")?;
        gone.wait_for("ready")?;
        for number in 1..=CHANGES {
            let begun = Instant::now();
            gone.send(b"?\n")?;
            gone.wait_for(&format!("{number}: "))?;
            samples.add(SUBJECT, "answer", "ms", milliseconds(begun.elapsed()));
            there.send(b"?\n")?;
            std::thread::sleep(std::time::Duration::from_millis(100));
            let begun = Instant::now();
            daemon
                .say(&json!({"put": [service(CHANGING, CHANGING.parse()?, &[(GATEWAY, port)])]}))?;
            there.wait_for(&format!("{number}: "))?;
            samples.add(SUBJECT, "change_visible", "ms", milliseconds(begun.elapsed()));
            daemon.answer()?;
            samples.add(SUBJECT, "change_told", "ms", milliseconds(begun.elapsed()));
            daemon.tell(&json!({"put": [service(CHANGING, CHANGING.parse()?, &[])]}))?;
        }
        drop((there, gone));
        pod.remove()?;
        progress(&format!("{run} of {runs} runs"));
    }
    daemon.tell(&json!({ "replace": [] }))?;
    Ok(samples.report("services", &machine(), &[(SUBJECT, "joey")]))
}

fn service(name: &str, address: Ipv4Addr, endpoints: &[(Ipv4Addr, u16)]) -> Value {
    let endpoint = |(address, port): &(Ipv4Addr, u16)| json!({"address": address, "port": port});
    let endpoints: Vec<_> = endpoints.iter().map(endpoint).collect();
    json!({
        "namespace": "default", "name": name, "addresses": [address],
        "ports": [{"port": 80, "endpoints": endpoints}],
    })
}

/// A connection to the node's daemon.
struct Daemon {
    socket: BufReader<UnixStream>,
}

impl Daemon {
    fn connect(node: &Node) -> Result<Self> {
        let socket = UnixStream::connect(node.dir().join("jrun/network.sock"))?;
        Ok(Self { socket: BufReader::new(socket) })
    }

    fn say(&mut self, request: &Value) -> Result<()> {
        let line = json!({ "services": request }).to_string() + "\n";
        Ok(self.socket.get_mut().write_all(line.as_bytes())?)
    }

    fn answer(&mut self) -> Result<()> {
        let mut answer = String::new();
        self.socket.read_line(&mut answer)?;
        ensure!(answer.contains("generation"), "the daemon said {answer}");
        Ok(())
    }

    fn tell(&mut self, request: &Value) -> Result<()> {
        self.say(request)?;
        self.answer()
    }
}

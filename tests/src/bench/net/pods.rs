//! Two real pods of a handler that speak with each other: with Joey, two VMs.
//!
//! Under emulation this measures the guests' stacks, not the wire. And what the policy takes of each start when many
//! pods start at once, by their timelines.

use std::thread::{self, sleep};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};

use super::super::stats::Samples;
use super::super::{rest, timeline};
use crate::node::Node;
use crate::pod::{self, Pod};

const SECONDS: u32 = 3;
const PORT: u16 = 7000;
/// Pods that are started at once.
const TOGETHER: usize = 50;
/// Echo requests of a run.
const TRIPS: u32 = 200;

pub(super) fn measure(
    node: &Node,
    runs: usize,
    samples: &mut Samples,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    for handler in ["joey", "runc"] {
        let (server, client) =
            (Pod::run(node, handler, "server")?, Pod::run(node, handler, "client")?);
        let idle = pod::container("main", &["sleep", "100000"]);
        let (serving, calling) = (server.start(&idle)?, client.start(&idle)?);
        let address = server.addresses()?.into_iter().next().context("the pod has no address")?;
        rest(node);
        // A server that has nothing more to say would end the connection.
        let listen = format!("sleep {} | nc -l -p {PORT} | wc -c", SECONDS + 3);
        for run in 1..=runs {
            let received = thread::scope(|scope| -> Result<u64> {
                let server = scope.spawn(|| serving.sh(&listen));
                sleep(Duration::from_secs(1));
                calling
                    .sh(&format!("timeout {SECONDS} nc {address} {PORT} < /dev/zero || true"))?;
                let counted = server.join().map_err(|_| anyhow!("the server panicked"))??;
                Ok(counted.text().trim().parse()?)
            })?;
            let rate = received as f64 * 8.0 / f64::from(SECONDS) / 1e6;
            samples.add(handler, "pods_tcp", "Mb/s", rate);
            let words = calling.sh(&format!(
                "ping -q -c 3 {address} > /dev/null; ping -i 0.01 -c {TRIPS} {address}"
            ))?;
            for time in words
                .text()
                .lines()
                .filter_map(|line| line.split_once("time=")?.1.strip_suffix(" ms"))
            {
                samples.add(handler, "pods_round_trip", "ms", time.parse()?);
            }
            progress(&format!("{handler}: {run} of {runs} runs"));
        }
        server.remove()?;
        client.remove()?;
    }
    progress(&format!("{TOGETHER} pods at once"));
    together(node, samples)
}

fn together(node: &Node, samples: &mut Samples) -> Result<()> {
    let pods: Vec<Result<Pod<'_>>> = thread::scope(|scope| {
        let one = |number| scope.spawn(move || Pod::run(node, "joey", &format!("many{number}")));
        let threads: Vec<_> = (0..TOGETHER).map(one).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|r| r.unwrap_or_else(|_| Err(anyhow!("panicked")))).collect()
    });
    for pod in pods {
        let pod = pod?;
        let timeline = timeline(node, &pod);
        let steps = timeline["steps"].as_array().context("the pod has no timeline")?;
        for name in ["wire", "policy"] {
            let took = steps.iter().find(|step| step["name"] == name);
            let took = took.and_then(|step| step["took_ms"].as_f64());
            let took = took.with_context(|| format!("no step {name} in the pod's timeline"))?;
            samples.add("joey+50_at_once", &format!("pods_{name}"), "ms", took);
        }
        pod.remove()?;
    }
    Ok(())
}

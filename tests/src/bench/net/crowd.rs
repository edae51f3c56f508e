//! A real pod's round trips with the node while another real pod floods a third of its tenant, and while both of
//! these only compute: what the flood costs beyond that is the network's.

use std::net::UdpSocket;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use k8s_cri::v1::Mount;

use super::super::stats::Samples;
use super::super::{milliseconds, rest};
use crate::lab::traffic::ping;
use crate::node::Node;
use crate::paths;
use crate::pod::{self, Container, Pod};

/// Seconds of a load, and of the echo; round trips are measured in the middle.
const LOAD: u64 = 12;
/// How long the echo may take until it is there.
const WARM_UP: Duration = Duration::from_secs(5);
const WINDOW: Duration = Duration::from_secs(4);
const PAUSE: Duration = Duration::from_millis(5);
const PROBE: &str = "/probe";
const ECHO: u16 = 7;
const DISCARD: u16 = 9;

pub(super) fn measure(
    node: &Node,
    runs: usize,
    samples: &mut Samples,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let pods: Vec<Pod<'_>> = ["victim", "flooder", "flooded"]
        .into_iter()
        .map(|name| Pod::run(node, "joey", name))
        .collect::<Result<_>>()?;
    let mut idle = pod::container("main", &["sleep", "100000"]);
    idle.mounts.push(Mount {
        container_path: PROBE.into(),
        host_path: paths::probe().display().to_string(),
        readonly: true,
        ..Mount::default()
    });
    let started: Vec<Container<'_>> =
        pods.iter().map(|pod| pod.start(&idle)).collect::<Result<_>>()?;
    let [victim, flooder, flooded] = started.as_slice() else { return Err(anyhow!("no pods")) };
    let address = |pod: &Pod<'_>| -> Result<String> {
        pod.addresses()?.into_iter().next().context("the pod has no address")
    };
    let (own, target) = (address(&pods[0])?, address(&pods[2])?);
    let (port, seconds) = (DISCARD.to_string(), LOAD.to_string());
    let target = format!("{target}:{DISCARD}");
    let busy = [PROBE, "spin", &seconds];
    let (sink, flood) = ([PROBE, "sink", &port, &seconds], [PROBE, "flood", &target, &seconds]);
    let echo = [PROBE, "echo", &ECHO.to_string(), &seconds];
    let loads: [(&str, &[&[&str]]); 3] =
        [("joey", &[]), ("joey+busy+busy", &[&busy, &busy]), ("joey+flood_pod", &[&sink, &flood])];
    rest(node);
    for run in 1..=runs {
        for (subject, loads) in loads {
            thread::scope(|scope| -> Result<()> {
                let loads = loads.iter().zip([flooded, flooder]);
                let loads: Vec<_> = loads
                    .map(|(load, on): (_, &Container<'_>)| scope.spawn(move || on.exec(load)))
                    .collect();
                let times = round_trips(node, (victim, &echo), flooded, &own);
                for load in loads {
                    let output = load.join().map_err(|_| anyhow!("a load panicked"))??;
                    ensure!(output.code == 0, "{subject}: {}", output.text());
                }
                let (times, arrived) = times?;
                for time in times {
                    samples.add(subject, "pods_round_trip_beside", "ms", milliseconds(time));
                }
                samples.add(subject, "pods_flood_arrived", "k/s", arrived / 1e3);
                Ok(())
            })?;
        }
        progress(&format!("beside others: {run} of {runs} runs"));
    }
    pods.into_iter().try_for_each(Pod::remove)
}

/// Round trips with the victim, and how many packets reach the flooded pod meanwhile in a second.
fn round_trips(
    node: &Node,
    (victim, echo): (&Container<'_>, &[&str]),
    flooded: &Container<'_>,
    address: &str,
) -> Result<(Vec<Duration>, f64)> {
    thread::scope(|scope| {
        let echo = scope.spawn(|| victim.exec(echo));
        let own = node.in_network(|| UdpSocket::bind("0.0.0.0:0"))??;
        own.connect((address, ECHO))?;
        own.set_read_timeout(Some(Duration::from_millis(500)))?;
        let begun = Instant::now();
        while own.send(&[0]).and_then(|_| own.recv(&mut [0; 8])).is_err() {
            ensure!(begun.elapsed() < WARM_UP, "nobody sends back what {address} port {ECHO} gets");
            sleep(Duration::from_millis(50));
        }
        let count = || -> Result<u64> {
            let words = flooded.sh("cat /sys/class/net/eth0/statistics/rx_packets")?;
            Ok(words.text().trim().parse()?)
        };
        let (before, begun) = (count()?, Instant::now());
        let trips = ping(&own, WINDOW, PAUSE);
        let arrived = (count()? - before) as f64 / begun.elapsed().as_secs_f64();
        echo.join().map_err(|_| anyhow!("the echo panicked"))??;
        Ok((trips?.times, arrived))
    })
}

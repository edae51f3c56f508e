//! What passes under a limit, in percent of it.
//!
//! Bits are those of Ethernet frames without preamble and checksum, as the kernel counts them: out of the pod
//! at the device of the host beyond the router, which gets single frames; into it at the VM's device, where a
//! packet that stands for several segments counts as these. The window begins when the load has run for
//! [`WARM_UP`], so a stream's beginning is not in it.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use joey_shim::net_limits::NetLimits;

use super::super::stats::Samples;
use crate::lab::netns::Frames;
use crate::lab::traffic::Load;
use crate::lab::{Join, Lab, PEER, Pod};

const BITS: [(u64, &str); 4] = [
    (1_000_000, "1_mbit"),
    (10_000_000, "10_mbit"),
    (100_000_000, "100_mbit"),
    (1_000_000_000, "1_gbit"),
];
const PACKETS: [(u64, &str); 3] =
    [(1000, "1k_packets"), (10_000, "10k_packets"), (50_000, "50k_packets")];
const WARM_UP: Duration = Duration::from_secs(2);
const WINDOW: Duration = Duration::from_secs(4);
/// A datagram that makes a full frame, but for the headers' options, and a small one.
const LARGE: usize = 1400;
const SMALL: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Out,
    In,
}

#[derive(Clone, Copy)]
enum Kind {
    Tcp(usize),
    Udp,
}

pub(super) fn measure(
    runs: usize,
    samples: &mut Samples,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let lab = Lab::new()?;
    let mut pod = lab.pod(1)?;
    lab.plug(&mut pod, Join::Policy)?;
    lab.allow(&[&pod])?;
    // Each takes six seconds.
    let runs = runs.div_ceil(5);
    let mut add = |metric: &str, percent| {
        progress(&format!("{metric}: {percent:.1} %"));
        samples.add("joey", metric, "%", percent);
    };
    for _ in 0..runs {
        for (way, direction) in [(Way::Out, "out"), (Way::In, "in")] {
            for (limit, name) in BITS {
                pod.limit(&match way {
                    Way::Out => NetLimits { egress_bits: limit, ..NetLimits::default() },
                    Way::In => NetLimits { ingress_bits: limit, ..NetLimits::default() },
                })?;
                let kinds = [(Kind::Tcp(1), "tcp"), (Kind::Tcp(16), "tcp_16"), (Kind::Udp, "udp")];
                for (kind, load) in kinds {
                    // Half as much again as may pass.
                    let rate = limit / 8 / LARGE as u64 * 3 / 2;
                    let load_of = || start(&lab, &pod, way, kind, LARGE, rate);
                    let (frames, time) = passed(&lab, &pod, way, load_of)?;
                    let percent = frames.bytes as f64 * 800.0 / time.as_secs_f64() / limit as f64;
                    add(&format!("{direction}_{name}_{load}"), percent);
                }
            }
            for (limit, name) in PACKETS {
                pod.limit(&match way {
                    Way::Out => NetLimits { egress_packets: limit, ..NetLimits::default() },
                    Way::In => NetLimits { ingress_packets: limit, ..NetLimits::default() },
                })?;
                let load_of = || start(&lab, &pod, way, Kind::Udp, SMALL, limit * 3 / 2);
                let (frames, time) = passed(&lab, &pod, way, load_of)?;
                let percent = frames.packets as f64 * 100.0 / time.as_secs_f64() / limit as f64;
                add(&format!("{direction}_{name}"), percent);
            }
            pod.limit(&NetLimits::default())?;
        }
    }
    Ok(())
}

fn start(lab: &Lab, pod: &Pod, way: Way, kind: Kind, size: usize, rate: u64) -> Result<Load> {
    let (from, to, address) = match way {
        Way::Out => (&pod.guest, &lab.peer, PEER.into()),
        Way::In => (&lab.peer, &pod.guest, pod.address()),
    };
    match kind {
        Kind::Tcp(flows) => Load::tcp(from, to, address, flows),
        Kind::Udp => Load::udp(from, to, address, 1, size, rate),
    }
}

/// What arrives of a load.
fn passed(
    lab: &Lab,
    pod: &Pod,
    way: Way,
    load: impl FnOnce() -> Result<Load>,
) -> Result<(Frames, Duration)> {
    let count = || match way {
        Way::Out => lab.peer.received("eth0"),
        Way::In => Ok(pod.vm()?.received()),
    };
    let load = load()?;
    sleep(WARM_UP);
    let (before, begun) = (count()?, Instant::now());
    sleep(WINDOW);
    let (after, time) = (count()?, begun.elapsed());
    drop(load);
    let frames =
        Frames { packets: after.packets - before.packets, bytes: after.bytes - before.bytes };
    Ok((frames, time))
}

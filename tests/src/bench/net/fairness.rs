//! A pod's round trips while another pod floods: with small datagrams as fast as its VM can send them, or
//! flooded by the host beyond the router. And while the other pod only computes: what a flood costs beyond that is
//! the network's.
//!
//! Each VM's threads, its sender among them, are in a group of their own ([`crate::lab::group`]), as a pod's are on a
//! node.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use joey_shim::net_limits::NetLimits;

use super::super::stats::Samples;
use crate::lab::group::Door;
use crate::lab::netns::Frames;
use crate::lab::traffic::{Load, round_trips};
use crate::lab::{Join, Lab, PEER, Pod};

const WINDOW: Duration = Duration::from_secs(3);
/// Between two round trips: the victim has something to say now and then.
const PAUSE: Duration = Duration::from_millis(1);
/// Before round trips count.
const WARM_UP: Duration = Duration::from_millis(200);
const SMALL: usize = 18;
/// What the limited pod may send and get.
const LIMIT: u64 = 20_000;

pub(super) fn measure(
    runs: usize,
    samples: &mut Samples,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let lab = Lab::new()?;
    let (mut victim, mut flooder) = (lab.pod(1)?, lab.pod(2)?);
    for pod in [&mut victim, &mut flooder] {
        lab.plug(pod, Join::Policy)?;
    }
    lab.allow(&[&victim, &flooder])?;
    let limit = NetLimits { egress_packets: LIMIT, ingress_packets: LIMIT, ..NetLimits::default() };
    for run in 1..=runs {
        let mut trips = |subject: &str, load: Option<Load>| -> Result<()> {
            sleep(WARM_UP);
            let count =
                || -> Result<_> { Ok((lab.peer.received("eth0")?, flooder.vm()?.received())) };
            let (before, begun) = (count()?, Instant::now());
            let (address, door) = (victim.address(), victim.group.door());
            let trips = round_trips(&lab.peer, &victim.guest, address, &door, WINDOW, PAUSE)?;
            let (after, time) = (count()?, begun.elapsed().as_secs_f64());
            let mut add = |metric, unit, value| samples.add(subject, metric, unit, value);
            if load.is_some() && subject != "joey+busy" {
                let arrived = |before: Frames, after: Frames| after.packets - before.packets;
                let packets = arrived(before.0, after.0).max(arrived(before.1, after.1));
                add("flood_arrived", "k/s", packets as f64 / time / 1e3);
            }
            for time in trips.times {
                add("round_trip_beside", "µs", time.as_secs_f64() * 1e6);
            }
            add("lost_beside", "", trips.lost as f64);
            Ok(())
        };
        trips("joey", None)?;
        trips("joey+busy", Some(Load::busy(flooder.group.door())))?;
        trips("joey+flood", Some(flood(&lab, &flooder)?))?;
        trips("joey+flooded", Some(flooded(&lab, &flooder)?))?;
        flooder.limit(&limit)?;
        trips("joey+flood_limited", Some(flood(&lab, &flooder)?))?;
        trips("joey+flooded_limited", Some(flooded(&lab, &flooder)?))?;
        flooder.limit(&NetLimits::default())?;
        progress(&format!("{run} of {runs} runs"));
    }
    Ok(())
}

fn flood(lab: &Lab, pod: &Pod) -> Result<Load> {
    Load::flood(&pod.guest, &lab.peer, PEER.into(), SMALL, pod.group.door())
}

fn flooded(lab: &Lab, pod: &Pod) -> Result<Load> {
    Load::flood(&lab.peer, &pod.guest, pod.address(), SMALL, Door::default())
}

//! A pod's round trips while another pod floods the host beyond the router, or another pod of its tenant, or is flooded
//! by that host: with small datagrams, as many as the sender can send. And beside the same processors' use without
//! the network's: a pod that only computes; the host's sender, sending as many to nobody. What a flood costs beyond
//! that is the network's.
//!
//! Each VM's threads, its sender among them, are in a group of their own ([`crate::lab::group`]), as a pod's are on a
//! node.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use joey_shim::net_limits::NetLimits;

use super::super::stats::Samples;
use crate::lab::group::Door;
use crate::lab::traffic::{Load, round_trips};
use crate::lab::{Join, Lab, NOBODY, PEER, Pod};

/// Short, so that what the machine does else is the same for all.
const WINDOW: Duration = Duration::from_secs(1);
/// Between two round trips: the victim has something to say now and then.
const PAUSE: Duration = Duration::from_millis(1);
/// Before round trips count.
const WARM_UP: Duration = Duration::from_millis(200);
const SMALL: usize = 18;
/// How often in a run each load has its turn.
const TURNS: usize = 3;
/// What the limited pod may send and get.
const LIMIT: u64 = 20_000;
/// The port of nobody: discard.
const DISCARD: u16 = 9;

pub(super) fn measure(
    runs: usize,
    samples: &mut Samples,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let lab = Lab::new()?;
    let (mut victim, mut flooder) = (lab.pod(1)?, lab.pod(2)?);
    let mut sibling = lab.sibling(&flooder, 3)?;
    for pod in [&mut victim, &mut flooder, &mut sibling] {
        lab.plug(pod, Join::Policy)?;
    }
    lab.allow(&[&victim, &flooder])?;
    let mut street = Street { lab: &lab, victim: &victim, samples };
    let (lab, flooder, sibling) = (&lab, &flooder, &sibling);
    let busy = |pod: &Pod| Load::busy(pod.group.door());
    let flood = || Load::flood(&flooder.guest, &lab.peer, PEER.into(), SMALL, flooder.group.door());
    let flooded =
        || Load::flood(&lab.peer, &flooder.guest, flooder.address(), SMALL, Door::default());
    let nobody =
        |rate| Load::paced(&lab.peer, (NOBODY, DISCARD).into(), SMALL, rate, Door::default());
    let limit = NetLimits { egress_packets: LIMIT, ingress_packets: LIMIT, ..NetLimits::default() };
    for run in 1..=runs * TURNS {
        street.beside("joey", flooder, &[])?;
        street.beside("joey+busy", flooder, &[busy(flooder)])?;
        street.beside("joey+flood", flooder, &[flood()?])?;
        let rate = street.beside("joey+flooded", flooder, &[flooded()?])?;
        // The sender alone, and with a VM that is as busy as the flooded one.
        street.beside("joey+sending", flooder, &[nobody(rate)?])?;
        street.beside("joey+sending+busy", flooder, &[nobody(rate)?, busy(flooder)])?;
        street.beside("joey+busy+busy", flooder, &[busy(flooder), busy(sibling)])?;
        let (from, to) = (&flooder.guest, &sibling.guest);
        let door = flooder.group.door();
        let load = Load::flood(from, to, sibling.address(), SMALL, door)?;
        street.beside("joey+flood_pod", sibling, &[load])?;
        flooder.limit(&limit)?;
        street.beside("joey+flood_limited", flooder, &[flood()?])?;
        street.beside("joey+flooded_limited", flooder, &[flooded()?])?;
        flooder.limit(&NetLimits::default())?;
        if run % TURNS == 0 {
            progress(&format!("{} of {runs} runs", run / TURNS));
        }
    }
    Ok(())
}

/// The victim and what is measured of it.
struct Street<'a> {
    lab: &'a Lab,
    victim: &'a Pod,
    samples: &'a mut Samples,
}

impl Street<'_> {
    /// Measures the victim's round trips beside loads, of which the first may be a flood, perhaps into `sink`.
    /// Returns how many datagrams it sends a second.
    fn beside(&mut self, subject: &str, sink: &Pod, loads: &[Load]) -> Result<u64> {
        sleep(WARM_UP);
        let sent = || loads.first().map_or(0, Load::sent);
        let count = || -> Result<_> {
            let (beyond, pod) = (self.lab.peer.received("eth0")?, sink.vm()?.received());
            Ok((sent(), beyond.packets, pod.packets))
        };
        let (before, begun) = (count()?, Instant::now());
        let Self { lab, victim, samples } = self;
        let (address, door) = (victim.address(), victim.group.door());
        let trips = round_trips(&lab.peer, &victim.guest, address, &door, WINDOW, PAUSE)?;
        let (after, time) = (count()?, begun.elapsed().as_secs_f64());
        let a_second = |count: u64| count as f64 / time;
        let sent = a_second(after.0 - before.0);
        if sent > 0.0 {
            let arrived = a_second((after.1 - before.1).max(after.2 - before.2));
            samples.add(subject, "flood_sent", "k/s", sent / 1e3);
            samples.add(subject, "flood_arrived", "k/s", arrived / 1e3);
        }
        for time in trips.times {
            samples.add(subject, "round_trip_beside", "µs", time.as_secs_f64() * 1e6);
        }
        samples.add(subject, "lost_beside", "", trips.lost as f64);
        Ok(sent as u64)
    }
}

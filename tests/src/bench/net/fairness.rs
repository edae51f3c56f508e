//! A pod's round trips while another pod floods: with small datagrams as fast as its VM can send them, or
//! flooded by the host beyond the router.

use std::time::Duration;

use anyhow::Result;
use joey_shim::net_limits::NetLimits;

use super::super::stats::Samples;
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
            std::thread::sleep(WARM_UP);
            let trips = round_trips(&lab.peer, &victim.guest, victim.address(), WINDOW, PAUSE)?;
            let arrived = load.map(|load| load.received());
            for time in trips.times {
                samples.add(subject, "round_trip_beside", "µs", time.as_secs_f64() * 1e6);
            }
            samples.add(subject, "lost_beside", "", trips.lost as f64);
            if let Some(bytes) = arrived {
                let rate = bytes as f64 / SMALL as f64 / WINDOW.as_secs_f64() / 1e3;
                samples.add(subject, "flood_arrived", "k/s", rate);
            }
            Ok(())
        };
        trips("joey", None)?;
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
    Load::udp(&pod.guest, &lab.peer, PEER.into(), 1, SMALL, 0)
}

fn flooded(lab: &Lab, pod: &Pod) -> Result<Load> {
    Load::udp(&lab.peer, &pod.guest, pod.address(), 1, SMALL, 0)
}

//! One pod's wire: streams out of it and into it, and round trips. The other end is a host beyond the node's
//! router.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::time::{ClockId, clock_gettime};

use super::super::milliseconds;
use super::super::stats::Samples;
use crate::lab::traffic::{Load, round_trips};
use crate::lab::{Join, Lab, PEER, Pod};

/// The subjects.
const SUBJECTS: [(&str, Join); 4] = [
    ("joey", Join::Policy),
    ("joey+direct", Join::Direct),
    ("joey+wire", Join::Wire),
    ("kata-tcfilter", Join::Mirred),
];
/// Before anything counts: a stream finds its speed.
const WARM_UP: Duration = Duration::from_millis(300);
/// In which the receiver's bytes are counted: short, so that subjects meet the same machine.
const WINDOW: Duration = Duration::from_millis(700);
/// Of round trips, one right after the other.
const TRIPS: Duration = Duration::from_millis(300);
/// How often in a run each subject has its turn at each metric.
const TURNS: usize = 3;

pub(super) fn measure(
    runs: usize,
    samples: &mut Samples,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let lab = Lab::new()?;
    let mut pods: Vec<(&str, Pod)> = Vec::new();
    for (number, (subject, join)) in (1..).zip(SUBJECTS) {
        let mut pod = lab.pod(number)?;
        lab.plug(&mut pod, join)?;
        pods.push((subject, pod));
    }
    let judged: Vec<&Pod> = pods.iter().take(2).map(|(_, pod)| pod).collect();
    lab.allow(&judged)?;
    for run in 1..=runs {
        for _ in 0..TURNS {
            // Whoever is first may find the machine otherwise than the others.
            pods.rotate_left(1);
            for (subject, pod) in &pods {
                let out = Load::tcp(&pod.guest, &lab.peer, PEER.into(), 1)?;
                stream(out, |what, unit, value| {
                    samples.add(subject, &format!("tcp_out{what}"), unit, value);
                })?;
            }
            for (subject, pod) in &pods {
                let into = Load::tcp(&lab.peer, &pod.guest, pod.address(), 1)?;
                stream(into, |what, unit, value| {
                    samples.add(subject, &format!("tcp_in{what}"), unit, value);
                })?;
            }
            for (subject, pod) in &pods {
                let (address, door) = (pod.address(), pod.group.door());
                let trips =
                    round_trips(&lab.peer, &pod.guest, address, &door, TRIPS, Duration::ZERO)?;
                for time in trips.times {
                    samples.add(subject, "round_trip", "µs", time.as_secs_f64() * 1e6);
                }
            }
        }
        progress(&format!("{run} of {runs} runs"));
    }
    Ok(())
}

/// What a stream's receiver gets, without headers, and the processor time that this takes sender, receiver, fake VM and
/// all between them, which what else the machine does hardly changes.
fn stream(load: Load, mut add: impl FnMut(&str, &str, f64)) -> Result<()> {
    sleep(WARM_UP);
    // Packets are worked on by the threads that send them.
    let used = || clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from);
    let (before, used_before, begun) = (load.received(), used()?, Instant::now());
    sleep(WINDOW);
    let gigabits = (load.received() - before) as f64 * 8.0 / 1e9;
    add("", "Gb/s", gigabits / begun.elapsed().as_secs_f64());
    add("_cpu", "ms/Gb", milliseconds(used()? - used_before) / gigabits);
    Ok(())
}

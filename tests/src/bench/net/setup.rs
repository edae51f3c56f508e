//! What joining a pod to its VM costs, and of that its place in the policy and the programs' attachment.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::super::milliseconds;
use super::super::stats::Samples;
use crate::lab::{Join, Lab, Pod};

/// Pods that are joined at once.
const TOGETHER: u8 = 50;

pub(super) fn measure(
    runs: usize,
    samples: &mut Samples,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let lab = Lab::new()?;
    let mut pods: Vec<Pod> = (1..=TOGETHER).map(|number| lab.pod(number)).collect::<Result<_>>()?;
    // The first one has the programs be loaded.
    plug(&lab, &mut pods[0])?;
    for run in 1..=runs {
        for pod in pods.iter_mut().take(10) {
            add("joey", plug(&lab, pod)?, samples);
        }
        let outcomes: Vec<Result<Times>> = std::thread::scope(|scope| {
            let one = |pod| scope.spawn(|| plug(&lab, pod));
            let threads: Vec<_> = pods.iter_mut().map(one).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.map(|r| r.unwrap_or_else(|_| Err(anyhow!("panicked")))).collect()
        });
        for times in outcomes {
            add("joey+50_at_once", times?, samples);
        }
        progress(&format!("{run} of {runs} runs"));
    }
    Ok(())
}

struct Times {
    whole: Duration,
    policy: Duration,
    unplug: Duration,
}

fn add(subject: &str, times: Times, samples: &mut Samples) {
    samples.add(subject, "plug_policy", "ms", milliseconds(times.policy));
    samples.add(subject, "plug", "ms", milliseconds(times.whole));
    samples.add(subject, "unplug", "ms", milliseconds(times.unplug));
}

/// The shim's part of a pod's start and of its end.
fn plug(lab: &Lab, pod: &mut Pod) -> Result<Times> {
    let config = lab.config(Join::Policy);
    let begun = Instant::now();
    let wire = lab.wire(pod, &config)?;
    let whole = begun.elapsed();
    let policy = wire.judged().map(|(_, took)| took).unwrap_or_default();
    drop(wire);
    let begun = Instant::now();
    pod.unplug()?;
    Ok(Times { whole, policy, unplug: begun.elapsed() })
}

//! What joining a pod to its VM costs, and of that its place in the policy and the programs' attachment.
//!
//! Subjects differ in when pods are joined: `joey` one after another, beside [`MANY`] that have been;
//! `joey+1000_a_minute` at random moments, each taken off again when as many came after it; `joey+busy` the
//! same, while threads compute on every processor; `joey+50_at_once` all at the same moment. The node's daemon
//! keeps the node's own addresses, but for `joey+no_daemon`: one after another, each start lists them.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use joey_shim::host::net::{Judged, Wire};

use super::super::milliseconds;
use super::super::stats::Samples;
use crate::lab::group::Door;
use crate::lab::traffic::Load;
use crate::lab::{Join, Lab, Pod};

/// Pods that are there, or are joined at once.
const MANY: u8 = 50;
/// Pods that are joined one after another.
const SINGLE: usize = 50;
/// Between two pods' starts on average: 1,000 a minute.
const PACE: Duration = Duration::from_millis(60);

/// More than the joins of all pods have open at once.
const FILES: usize = 800;

pub(super) fn measure(
    runs: usize,
    samples: &mut Samples,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let lab = Lab::new()?;
    let numbers = 1..=MANY + SINGLE as u8;
    let mut pods: Vec<Pod> = numbers.map(|number| lab.pod(number)).collect::<Result<_>>()?;
    // The first one has the programs be loaded.
    drop(plug(&lab, &mut pods[0])?);
    pods[0].unplug()?;
    // A process's table of files grows by waiting for all its threads; on a node each shim has its own.
    let files: Vec<File> = (0..FILES).map(|_| File::open("/dev/null")).collect::<Result<_, _>>()?;
    drop(files);
    for run in 1..=runs {
        one_by_one("joey+no_daemon", &lab, &mut pods, samples)?;
        let _keeper = lab.keep_addresses()?;
        one_by_one("joey", &lab, &mut pods, samples)?;
        paced("joey+1000_a_minute", &lab, &mut pods, samples)?;
        let busy: Vec<Load> = (0..thread::available_parallelism()?.get())
            .map(|_| Load::busy(Door::default()))
            .collect();
        paced("joey+busy", &lab, &mut pods, samples)?;
        drop(busy);
        at_once(&lab, &mut pods[..MANY.into()], samples)?;
        progress(&format!("{run} of {runs} runs"));
    }
    Ok(())
}

/// A joined pod, and what it took.
struct Plugged {
    wire: Wire,
    whole: Duration,
}

/// The shim's part of a pod's start.
fn plug(lab: &Lab, pod: &mut Pod) -> Result<Plugged> {
    let config = lab.config(Join::Policy);
    let begun = Instant::now();
    let wire = lab.wire(pod, &config)?;
    Ok(Plugged { wire, whole: begun.elapsed() })
}

/// Its part of the pod's end, and what the pod has cost.
fn unplug(subject: &str, pod: &mut Pod, plugged: Plugged, samples: &mut Samples) -> Result<()> {
    let Plugged { wire, whole } = plugged;
    let mut add = |metric, took| samples.add(subject, metric, "ms", milliseconds(took));
    if let Some(Judged { took, processor, .. }) = wire.judged() {
        add("plug_policy", took);
        add("plug_policy_processor", processor);
    }
    add("plug", whole);
    drop(wire);
    let begun = Instant::now();
    pod.unplug()?;
    add("unplug", begun.elapsed());
    Ok(())
}

fn one_by_one(subject: &str, lab: &Lab, pods: &mut [Pod], samples: &mut Samples) -> Result<()> {
    let (single, there) = pods.split_at_mut(SINGLE);
    let wires: Vec<Plugged> = there.iter_mut().map(|pod| plug(lab, pod)).collect::<Result<_>>()?;
    for pod in single {
        let plugged = plug(lab, pod)?;
        unplug(subject, pod, plugged, samples)?;
    }
    drop(wires);
    there.iter_mut().try_for_each(Pod::unplug)
}

/// Each start is a thread of its own, so that one that takes long does not keep the next one.
fn paced(subject: &str, lab: &Lab, pods: &mut [Pod], samples: &mut Samples) -> Result<()> {
    let mut moment = Instant::now();
    let mut chance = 1_u64;
    thread::scope(|scope| {
        let mut there = VecDeque::new();
        let mut end = |there: &mut VecDeque<thread::ScopedJoinHandle<'_, _>>| {
            let Some(started) = there.pop_front() else { return Ok(()) };
            let (pod, plugged) = started.join().map_err(|_| anyhow!("panicked"))?;
            unplug(subject, pod, plugged?, samples)
        };
        for pod in pods {
            moment += PACE.mul_f64(exponential(&mut chance));
            thread::sleep(moment.saturating_duration_since(Instant::now()));
            there.push_back(scope.spawn(move || {
                let plugged = plug(lab, pod);
                (pod, plugged)
            }));
            if there.len() > usize::from(MANY) {
                end(&mut there)?;
            }
        }
        while !there.is_empty() {
            end(&mut there)?;
        }
        Ok(())
    })
}

/// The next of a series that is the same in every run: how long one waits for what comes by chance, once in a
/// unit of time.
fn exponential(state: &mut u64) -> f64 {
    // Numerical Recipes' generator; its upper bits are the better ones.
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let uniform = ((*state >> 33) as f64 + 0.5) / (1_u64 << 31) as f64;
    -uniform.ln()
}

fn at_once(lab: &Lab, pods: &mut [Pod], samples: &mut Samples) -> Result<()> {
    let start = Barrier::new(pods.len());
    let outcomes: Vec<Result<Plugged>> = thread::scope(|scope| {
        let one = |pod| {
            scope.spawn(|| {
                start.wait();
                plug(lab, pod)
            })
        };
        let threads: Vec<_> = pods.iter_mut().map(one).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|r| r.unwrap_or_else(|_| Err(anyhow!("panicked")))).collect()
    });
    for (pod, plugged) in pods.iter_mut().zip(outcomes) {
        unplug("joey+50_at_once", pod, plugged?, samples)?;
    }
    Ok(())
}

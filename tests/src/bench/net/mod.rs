//! `bench net`: the pod's wire in a lab of network namespaces ([`crate::lab`]), and between real pods.
//!
//! Subjects: `joey` (policy, flows and counters), `joey+direct` (`direct = true`: the same past the pod's
//! interface), `joey+wire` (`isolation = false`: every packet is redirected unseen) and `kata-tcfilter` (the filters
//! that Kata's default network model makes), by turns in one run.

mod crowd;
mod fairness;
mod limits;
mod packet;
mod pods;
mod setup;
mod wire;

use anyhow::Result;
use clap::ValueEnum;

use super::machine;
use super::stats::{Report, Samples};
use crate::node::Node;

/// What can be measured for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Throughput and round trip of one pod's wire.
    Wire,
    /// Joining pods, one at a time and many at once.
    Setup,
    /// A packet's time in the programs.
    Packet,
    /// What passes under limits of bits and of packets.
    Limits,
    /// A pod's round trip while another one floods.
    Fairness,
    /// Real pods, beside runc's.
    Pods,
    /// A real pod's round trip while other pods flood each other.
    Crowd,
}

impl Part {
    /// Whether it needs a node with containerd.
    #[must_use]
    pub fn needs_node(self) -> bool {
        matches!(self, Self::Pods | Self::Crowd)
    }
}

/// Measures and returns the report; `progress` is told what happens.
pub fn net(
    node: Option<&Node>,
    parts: &[Part],
    runs: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let mut samples = Samples::default();
    for part in parts {
        let name = part.to_possible_value();
        progress(&format!("measuring {}", name.as_ref().map_or("", |name| name.get_name())));
        match part {
            Part::Wire => wire::measure(runs, &mut samples, progress)?,
            Part::Setup => setup::measure(runs, &mut samples, progress)?,
            Part::Packet => packet::measure(runs, &mut samples)?,
            Part::Limits => limits::measure(runs, &mut samples, progress)?,
            Part::Fairness => fairness::measure(runs, &mut samples, progress)?,
            Part::Pods => {
                if let Some(node) = node {
                    pods::measure(node, runs, &mut samples, progress)?;
                }
            }
            Part::Crowd => {
                if let Some(node) = node {
                    crowd::measure(node, runs, &mut samples, progress)?;
                }
            }
        }
    }
    let pairs = [
        ("joey", "joey+wire"),
        ("joey", "kata-tcfilter"),
        ("joey+direct", "joey"),
        ("joey+direct", "joey+wire"),
        ("joey+direct", "kata-tcfilter"),
        ("joey+wire", "kata-tcfilter"),
        ("joey", "runc"),
        ("joey+busy", "joey"),
        ("joey+flood", "joey"),
        ("joey+flood_limited", "joey"),
        ("joey+flood", "joey+busy"),
        ("joey+flooded", "joey"),
        ("joey+flooded", "joey+sending"),
        ("joey+flooded", "joey+sending+busy"),
        ("joey+busy+busy", "joey"),
        ("joey+flood_pod", "joey"),
        ("joey+flood_pod", "joey+busy+busy"),
        ("joey+flooded_limited", "joey"),
        ("joey+no_daemon", "joey"),
        ("joey+1000_a_minute", "joey"),
        ("joey+50_at_once", "joey"),
    ];
    Ok(samples.report("net", &machine(), &pairs))
}

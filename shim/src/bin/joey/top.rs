//! `joey top`: traffic of pods and tenants, read from the maps; no daemon is needed.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use joey_ebpf::policy::Reason;
use joey_ebpf::policy::abi::{Counters, Side};
use joey_ebpf::policy::maps::Maps;
use joey_shim::config::Config;
use joey_shim::flows::metrics::Sample;
use joey_shim::flows::names::{Names, Places};
use serde_json::{Value, json};

#[derive(Args)]
pub(crate) struct Top {
    /// Print totals once
    #[arg(long)]
    once: bool,
    /// Seconds between two looks
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
}

pub(crate) fn run(config: &Config, top: &Top, json: bool) -> Result<()> {
    let maps = Arc::new(Maps::open(&config.bpf_dir).with_context(|| {
        format!("the policy below {}; `joey ebpf load` loads it", config.bpf_dir.display())
    })?);
    let mut names = Names::new(Places {
        run_dir: config.run_dir.clone(),
        state_dir: config.state_dir.clone(),
        bpf_dir: config.bpf_dir.clone(),
        maps: Arc::clone(&maps),
    });
    let mut last: Option<(Instant, HashMap<String, [u64; 2]>)> = None;
    loop {
        let sample = Sample::read(&maps, |pods| names.pods(pods))?;
        let now = Instant::now();
        let elapsed = last.as_ref().map(|(then, _)| now - *then);
        let before = last.as_ref().map(|(_, bytes)| bytes);
        let shown = if json { lines(&sample) } else { table(&sample, elapsed.zip(before)) };
        match show(&shown, !top.once && !json) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            other => other?,
        }
        if top.once {
            return Ok(());
        }
        let bytes = sample.pods.iter().map(|(who, counted)| (who.name.clone(), counted.bytes));
        last = Some((now, bytes.collect()));
        std::thread::sleep(Duration::from_secs(top.interval));
    }
}

fn show(text: &str, redraw: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if redraw {
        out.write_all(b"\x1b[H\x1b[2J")?;
    }
    writeln!(out, "{text}")?;
    out.flush()
}

/// Drops of both directions, and the reason that most had.
fn drops(counters: &Counters) -> (u64, Option<Reason>) {
    let of = |reason| counters.dropped(Side::Vm, reason) + counters.dropped(Side::Peer, reason);
    let all = Reason::ALL.iter().map(|reason| of(*reason)).sum();
    let main = Reason::ALL.iter().copied().max_by_key(|reason| of(*reason));
    (all, main.filter(|reason| of(*reason) > 0))
}

fn numbers(counters: &Counters) -> Value {
    let by_reason: serde_json::Map<String, Value> = Reason::ALL
        .iter()
        .map(|reason| (reason, [Side::Vm, Side::Peer].map(|side| counters.dropped(side, *reason))))
        .filter(|(_, [egress, ingress])| egress + ingress > 0)
        .map(|(reason, [egress, ingress])| {
            (format!("{reason:?}"), json!({ "egress": egress, "ingress": ingress }))
        })
        .collect();
    json!({
        "egress_packets": counters.packets[0],
        "egress_bytes": counters.bytes[0],
        "ingress_packets": counters.packets[1],
        "ingress_bytes": counters.bytes[1],
        "drops": by_reason,
        "events_unsaid": counters.unsaid,
    })
}

fn lines(sample: &Sample) -> String {
    let with = |mut value: Value, more: [(&str, &str); 2]| {
        for (key, text) in more.into_iter().filter(|(key, _)| !key.is_empty()) {
            value[key] = text.into();
        }
        value
    };
    let pods: Vec<Value> = sample
        .pods
        .iter()
        .map(|(who, counted)| with(numbers(counted), [("pod", &who.name), ("tenant", &who.tenant)]))
        .collect();
    let tenants: Vec<Value> = sample
        .tenants
        .iter()
        .map(|(name, counted)| with(numbers(counted), [("tenant", name), ("", "")]))
        .collect();
    json!({ "pods": pods, "tenants": tenants }).to_string()
}

fn table(sample: &Sample, before: Option<(Duration, &HashMap<String, [u64; 2]>)>) -> String {
    let head = format!(
        "{:<40} {:<16} {:>12} {:>12} {:>14} {:>14} {:>10} {:>10} {:>9} MAIN REASON",
        "POD",
        "TENANT",
        "OUT bit/s",
        "IN bit/s",
        "OUT bytes",
        "IN bytes",
        "OUT pkts",
        "IN pkts",
        "DROPS"
    );
    let mut rows = vec![head];
    let mut row = |name: &str, tenant: &str, counted: &Counters, rates: [String; 2]| {
        let (dropped, main) = drops(counted);
        let [out, into] = rates;
        rows.push(format!(
            "{name:<40} {tenant:<16} {out:>12} {into:>12} {:>14} {:>14} {:>10} {:>10} {dropped:>9} {}",
            counted.bytes[0],
            counted.bytes[1],
            counted.packets[0],
            counted.packets[1],
            main.map_or_else(String::new, |reason| format!("{reason:?}")),
        ));
    };
    for (who, counted) in &sample.pods {
        let rate = |side: usize| {
            let (elapsed, bytes) = before?;
            let more = counted.bytes[side].saturating_sub(bytes.get(&who.name)?[side]);
            Some(format!("{:.0}", more as f64 * 8.0 / elapsed.as_secs_f64()))
        };
        let rates = [0, 1].map(|side| rate(side).unwrap_or_else(|| "-".to_owned()));
        let name = if who.name.is_empty() { "(no pod's)" } else { &who.name };
        row(name, &who.tenant, counted, rates);
    }
    for (tenant, counted) in &sample.tenants {
        row("(all, with those gone)", tenant, counted, ["-", "-"].map(str::to_owned));
    }
    rows.join("\n")
}

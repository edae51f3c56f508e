//! `joey top`: traffic of pods and tenants, read from the maps; no daemon is needed.

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
    let mut last: Option<(Instant, Sample)> = None;
    loop {
        let sample = Sample::read(&maps, |pods| names.pods(pods))?;
        let now = Instant::now();
        let before = last.as_ref().map(|(then, before)| (now - *then, before));
        let shown = if json { lines(&sample) } else { table(&sample, before) };
        match show(&shown, !top.once && !json) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            other => other?,
        }
        if top.once {
            return Ok(());
        }
        last = Some((now, sample));
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

/// Characters that a name has room for, and a tenant's.
const NAME: usize = 32;
const TENANT: usize = 14;

/// The end of a text that is too long, which tells pods apart.
fn short(text: &str, room: usize) -> String {
    let length = text.chars().count();
    if length <= room {
        return text.to_owned();
    }
    std::iter::once('…').chain(text.chars().skip(length + 1 - room)).collect()
}

/// A number in at most five characters, with its unit's letter.
fn brief(number: f64) -> String {
    let mut number = number;
    for unit in ["", "k", "M", "G", "T", "P"] {
        let places = match number {
            _ if unit.is_empty() || number >= 99.95 => 0,
            _ if number >= 9.995 => 1,
            _ => 2,
        };
        if number < 999.5 {
            return format!("{number:.places$}{unit}");
        }
        number /= 1000.0;
    }
    "much".to_owned()
}

/// Rates since the look before, or all that was counted where there was none.
fn table(sample: &Sample, before: Option<(Duration, &Sample)>) -> String {
    let (bytes, packets, drops) = match before {
        Some(_) => ("bit/s", "pkt/s", "DROP/s"),
        None => ("bytes", "pkts", ""),
    };
    let mut rows = Vec::new();
    let mut row = |name: &str, tenant: &str, numbers: [String; 7]| {
        let [out, into, sent, received, lost, all, main] = numbers;
        rows.push(format!(
            "{:<NAME$} {:<TENANT$} {out:>9} {into:>9} {sent:>9} {received:>9} {lost:>7} {all:>6} {main}",
            short(name, NAME),
            short(tenant, TENANT),
        ));
    };
    let heads = [bytes, packets].map(|unit| [format!("OUT {unit}"), format!("IN {unit}")]);
    let [[out, into], [sent, received]] = heads;
    let [lost, all, main] = [drops, "DROPS", "MAIN REASON"].map(str::to_owned);
    row("POD", "TENANT", [out, into, sent, received, lost, all, main]);
    let elapsed = before.map(|(elapsed, _)| elapsed.as_secs_f64());
    let mut line = |name: &str, tenant: &str, now: &Counters, then: Option<&Counters>| {
        let (dropped, main) = self::drops(now);
        let main = main.map_or_else(String::new, |reason| format!("{reason:?}"));
        // What was counted for somebody else may have been more.
        let rate = |of: &dyn Fn(&Counters) -> u64| match (then, elapsed) {
            (Some(then), Some(elapsed)) => brief(of(now).saturating_sub(of(then)) as f64 / elapsed),
            (None, Some(_)) => "-".to_owned(),
            _ => brief(of(now) as f64),
        };
        let bits = if elapsed.is_some() { 8 } else { 1 };
        let lost = if elapsed.is_some() { rate(&|it| self::drops(it).0) } else { String::new() };
        let numbers = [
            rate(&|it| it.bytes[0] * bits),
            rate(&|it| it.bytes[1] * bits),
            rate(&|it| it.packets[0]),
            rate(&|it| it.packets[1]),
            lost,
            brief(dropped as f64),
            main,
        ];
        row(name, tenant, numbers);
    };
    let then = before.map(|(_, sample)| sample);
    for (who, counted) in &sample.pods {
        let name = if who.name.is_empty() { "(no pod's)" } else { &who.name };
        let then = then.and_then(|then| then.pods.iter().find(|(other, _)| other == who));
        line(name, &who.tenant, counted, then.map(|(_, counted)| counted));
    }
    for (tenant, counted) in &sample.tenants {
        let then = then.and_then(|then| then.tenants.get(tenant));
        line("(all, with those gone)", tenant, counted, then);
    }
    rows.join("\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use joey_shim::flows::names::Who;

    use super::*;

    #[test]
    fn numbers_are_brief() {
        for (number, text) in [
            (0.0, "0"),
            (7.4, "7"),
            (999.4, "999"),
            (999.6, "1.00k"),
            (1234.0, "1.23k"),
            (9999.0, "10.0k"),
            (99_960.0, "100k"),
            (12_345_678.0, "12.3M"),
            (999_600_000.0, "1.00G"),
            (1e30, "much"),
        ] {
            assert_eq!(brief(number), text, "{number}");
        }
        assert_eq!(short("abcdef", 6), "abcdef");
        assert_eq!(short("abcdefg", 6), "…cdefg");
    }

    #[test]
    fn rates_are_told_of_bits_packets_and_drops() {
        let of = |times: u64, drops: u64| {
            let mut counters = Counters { bytes: [125 * times, times], ..Counters::default() };
            counters.packets = [2000 * times, 0];
            counters.drops[0][Reason::Tenant as usize] = drops;
            counters
        };
        let who = |name: &str| Who { tenant: "red".to_owned(), name: name.to_owned() };
        let sample = |pods: &[(&str, Counters)]| Sample {
            pods: pods.iter().map(|(name, counted)| (who(name), counted.clone())).collect(),
            tenants: BTreeMap::from([("red".to_owned(), pods[0].1.clone())]),
            ..Sample::default()
        };
        let then = sample(&[("red/a", of(1000, 10))]);
        let now = sample(&[("red/a", of(3000, 40)), ("red/new", of(1, 0))]);
        let words = |text: &str| -> Vec<Vec<String>> {
            text.lines().map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
        };
        let rates = words(&table(&now, Some((Duration::from_secs(2), &then))));
        assert_eq!(
            rates[1],
            ["red/a", "red", "1.00M", "8.00k", "2.00M", "0", "15", "40", "Tenant"]
        );
        assert_eq!(rates[2], ["red/new", "red", "-", "-", "-", "-", "-", "0"]);
        assert_eq!(
            rates[3][5..],
            ["1.00M", "8.00k", "2.00M", "0", "15", "40", "Tenant"].map(str::to_owned)[..]
        );
        let totals = words(&table(&now, None));
        assert_eq!(totals[1], ["red/a", "red", "375k", "3.00k", "6.00M", "0", "40", "Tenant"]);
    }

    #[test]
    fn a_line_has_room() {
        let mut counters = Counters { bytes: [u64::MAX / 9; 2], ..Counters::default() };
        counters.packets = counters.bytes;
        for reason in Reason::ALL {
            counters.drops[0][*reason as usize] = 1 << 50;
            let who = Who { tenant: "t".repeat(63), name: "n".repeat(127) };
            let tenants = BTreeMap::from([("t".repeat(63), counters.clone())]);
            let pods = vec![(who, counters.clone())];
            let sample = Sample { pods, tenants, ..Sample::default() };
            let before = Sample {
                tenants: BTreeMap::from([("t".repeat(63), Counters::default())]),
                ..Sample::default()
            };
            for before in [None, Some((Duration::from_secs(1), &before))] {
                for line in table(&sample, before).lines() {
                    assert!(line.chars().count() <= 120, "{line}");
                }
            }
        }
    }
}

//! Counters for Prometheus (text format 0.0.4), read from the maps whenever somebody asks.
//!
//! A tenant's counters are those of its pods and of its pods that are gone; as a pod goes there is a moment when
//! it is in neither, so what was told is kept and never falls.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use joey_ebpf::policy::Reason;
use joey_ebpf::policy::abi::{Active, Counters, PodId, Side};
use joey_ebpf::policy::maps::{MapError, Maps};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::names::Who;

/// Longest request.
const MAX_REQUEST: usize = 8 << 10;
/// Longest that a request may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What is told.
#[derive(Debug, Default)]
pub struct Sample {
    /// Pods of this node.
    pub pods: Vec<(Who, Counters)>,
    /// Tenants, by name.
    pub tenants: BTreeMap<String, Counters>,
    /// The names that tenants have.
    pub named: HashSet<String>,
    /// What is in force.
    pub active: Active,
    /// Single numbers: name, kind, help, value.
    pub others: Vec<(&'static str, &'static str, &'static str, u64)>,
}

/// A sum of counters.
pub fn add(sum: &mut Counters, other: &Counters) {
    sum.add(&other.clone().encode());
}

impl Sample {
    /// Reads the maps. Totals come first: what goes meanwhile is missing for a moment, never there twice. `who` gives
    /// the names of pods by number and since when they have it, all at once: it may have to wait for them.
    pub fn read(
        maps: &Maps,
        who: impl FnOnce(&[(PodId, u64)]) -> Vec<Option<Arc<Who>>>,
    ) -> Result<Self, MapError> {
        let mut sample = Self { active: maps.active()?, ..Self::default() };
        let numbers = maps.names()?;
        let name = |number| numbers.get(&number).cloned().unwrap_or_default();
        for (tenant, total) in maps.totals()? {
            // Nobody's, or a tenant's that is just being forgotten.
            if tenant == 0 || numbers.contains_key(&tenant) {
                add(sample.tenants.entry(name(tenant)).or_default(), &total);
            }
        }
        let mut pods: Vec<_> = maps.pods()?.into_iter().collect();
        pods.sort_by_key(|(id, _)| *id);
        let known = who(&pods.iter().map(|(id, pod)| (*id, pod.since)).collect::<Vec<_>>());
        for ((id, pod), known) in pods.into_iter().zip(known) {
            let Some(counters) = maps.counters(id)? else { continue };
            let tenant = name(pod.tenant);
            add(sample.tenants.entry(tenant.clone()).or_default(), &counters);
            let name = known.map_or_else(|| format!("#{id}"), |who| who.name.clone());
            sample.pods.push((Who { tenant, name }, counters));
        }
        if let Some(strays) = maps.counters(0)? {
            sample.pods.push((Who::default(), strays));
        }
        sample.named = numbers.into_values().collect();
        Ok(sample)
    }
}

/// What tenants' counters were.
#[derive(Debug, Default)]
pub struct Told(Mutex<HashMap<String, Counters>>);

impl Told {
    /// Raises what is lower than it was. What of tenants is forgotten that nobody uses is forgotten here, too.
    pub fn keep(&self, sample: &mut Sample) {
        let Sample { tenants, named, .. } = sample;
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, last) in told.iter().filter(|(name, _)| name.is_empty() || named.contains(*name))
        {
            raise(tenants.entry(name.clone()).or_default(), last);
        }
        *told = tenants.iter().map(|(name, counters)| (name.clone(), counters.clone())).collect();
    }
}

fn raise(now: &mut Counters, last: &Counters) {
    let pairs = |now: &mut [u64], last: &[u64]| {
        for (now, last) in now.iter_mut().zip(last) {
            *now = (*now).max(*last);
        }
    };
    pairs(&mut now.packets, &last.packets);
    pairs(&mut now.bytes, &last.bytes);
    for (now, last) in now.drops.iter_mut().zip(&last.drops) {
        pairs(now, last);
    }
    now.unsaid = now.unsaid.max(last.unsaid);
}

/// A label's value, escaped.
fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n")
}

const SIDES: [(Side, &str); 2] = [(Side::Vm, "egress"), (Side::Peer, "ingress")];

/// Families of one kind of owner: `(labels, counters)` each.
fn owners(text: &mut String, kind: &str, all: &[(String, &Counters)]) {
    let mut family = |name: &str, help: &str, lines: &dyn Fn(&Counters) -> Vec<(String, u64)>| {
        // Writing into a string does not fail.
        let _ = writeln!(text, "# HELP joey_{kind}_{name} {help}");
        let _ = writeln!(text, "# TYPE joey_{kind}_{name} counter");
        for (labels, counters) in all {
            for (more, value) in lines(counters) {
                let comma = if labels.is_empty() || more.is_empty() { "" } else { "," };
                let _ = writeln!(text, "joey_{kind}_{name}{{{labels}{comma}{more}}} {value}");
            }
        }
    };
    let by_side = |values: [u64; 2]| {
        SIDES
            .iter()
            .map(|(side, name)| (format!("direction=\"{name}\""), values[*side as usize]))
            .collect()
    };
    family("bytes_total", "Bytes let through, from the Ethernet header on.", &|counters| {
        by_side(counters.bytes)
    });
    family("packets_total", "Packets let through.", &|counters| by_side(counters.packets));
    family("drops_total", "Packets dropped, by reason.", &|counters| {
        let mut lines = Vec::new();
        for (side, name) in SIDES {
            for reason in Reason::ALL {
                let value = counters.dropped(side, *reason);
                if value > 0 {
                    let labels = format!("direction=\"{name}\",reason=\"{reason:?}\"");
                    lines.push((labels, value));
                }
            }
        }
        lines
    });
    family("events_unsaid_total", "Events that were too many to be told.", &|counters| {
        vec![(String::new(), counters.unsaid)]
    });
}

/// The text.
#[must_use]
pub fn text(sample: &Sample) -> String {
    let mut text = String::new();
    let pods: Vec<_> = sample
        .pods
        .iter()
        .map(|(who, counters)| {
            let (namespace, pod) = who.name.split_once('/').unwrap_or(("", &who.name));
            let [tenant, namespace, pod] = [&who.tenant, namespace, pod].map(escaped);
            let labels = format!("tenant=\"{tenant}\",namespace=\"{namespace}\",pod=\"{pod}\"");
            (labels, counters)
        })
        .collect();
    owners(&mut text, "pod", &pods);
    let tenants: Vec<_> = sample
        .tenants
        .iter()
        .map(|(name, counters)| (format!("tenant=\"{}\"", escaped(name)), counters))
        .collect();
    owners(&mut text, "tenant", &tenants);
    let active = [
        ("policy_epoch", "gauge", "The policy in force.", u64::from(sample.active.epoch)),
        (
            "policy_generation",
            "gauge",
            "Changes that verdicts depend on.",
            u64::from(sample.active.generation),
        ),
    ];
    for (name, kind, help, value) in active.into_iter().chain(sample.others.iter().copied()) {
        let _ = writeln!(text, "# HELP joey_{name} {help}\n# TYPE joey_{name} {kind}");
        let _ = writeln!(text, "joey_{name} {value}");
    }
    text
}

/// Answers one HTTP request, whatever it asks.
pub async fn answer<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    body: impl AsyncFnOnce() -> std::io::Result<String>,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() > MAX_REQUEST || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let (status, body) = match body().await {
        Ok(body) => ("200 OK", body),
        Err(error) => ("503 Service Unavailable", format!("{error}\n")),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.0 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

//! A flow as it is told: both ends by name, when, how much, and what became of it. `docs/flows.md` has the
//! same as a table.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// How far a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It goes on, or a refused attempt is still repeated.
    Open,
    /// TCP: both sides finished it.
    Closed,
    /// TCP: one side reset it.
    Reset,
    /// Nothing was sent for so long that it is forgotten.
    TimedOut,
    /// Other flows of its table, or of the denials, pushed it out; or its end was not told.
    Evicted,
    /// Its pod is gone.
    Gone,
}

/// Whether it was let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Yes.
    Allow,
    /// No.
    Drop,
}

/// Who opened it, seen from the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The pod.
    Egress,
    /// The peer.
    Ingress,
}

/// One end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Its address.
    pub address: IpAddr,
    /// Its port; of ICMP echo, 0. Of a refused attempt, who opens has 0: attempts from several ports are one.
    pub port: u16,
    /// Its tenant's name; empty if it has none or is not known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tenant: String,
    /// `namespace/name` of the pod or Service, `node` for the node itself; empty if not known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its number since the daemon's start; the same one is told when it opens and when it ends.
    pub id: u64,
    /// When it began, in milliseconds since 1970.
    pub begun_ms: u64,
    /// When it was seen last, which is its end once it has ended.
    pub seen_ms: u64,
    /// How far it is.
    pub state: Phase,
    /// Whether it was let through.
    pub verdict: Verdict,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// `tcp`, `udp`, `icmp`, `icmp6`, or the number.
    pub proto: String,
    /// Who opened it.
    pub direction: Direction,
    /// The pod on this node.
    pub pod: End,
    /// Whom it spoke with.
    pub peer: End,
    /// Packets that the pod sent; of a refused attempt, those dropped.
    pub egress_packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub egress_bytes: u64,
    /// Packets that the pod was sent.
    pub ingress_packets: u64,
    /// Their bytes.
    pub ingress_bytes: u64,
}

/// Which records are wanted: all that fit everything that is said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// A tenant of either end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// `namespace/name` of either end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Whether it was let through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// Go on with what happens from now on.
    #[serde(default)]
    pub follow: bool,
    /// Only the last so many of the past.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

impl Filter {
    /// Whether a record is wanted.
    #[must_use]
    pub fn fits(&self, record: &Record) -> bool {
        let ends = [&record.pod, &record.peer];
        let tenant = |name: &String| ends.iter().any(|end| end.tenant == *name);
        let pod = |name: &String| ends.iter().any(|end| end.name == *name);
        self.tenant.as_ref().is_none_or(tenant)
            && self.pod.as_ref().is_none_or(pod)
            && self.verdict.is_none_or(|verdict| verdict == record.verdict)
    }
}

/// A protocol's name.
#[must_use]
pub fn protocol(number: u8) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmp6".to_owned(),
        other => other.to_string(),
    }
}

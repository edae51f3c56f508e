//! Keys and values of the policy's maps, as `bpf/policy.h` has them: pods and addresses here, what the policy
//! says in `rule.rs`, flows and what is told of them in `flow.rs`.
//!
//! Here they are plain Rust values, with addresses as such and ports in the host's order; `encode` gives
//! the bytes that the kernel compares, in which nothing is left undefined.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sha2::{Digest as _, Sha256};

mod flow;
mod rule;

pub use flow::{Counters, Denied, Event, EventKind, Flow, FlowKey, FragmentKey, REASONS, State};
pub use rule::{
    Active, ISOLATED_EGRESS, ISOLATED_INGRESS, Identity, NODE, Ports, Prefix, Rule, Scope,
    identity_tenant, rule_tenants, space_key, space_of,
};

/// Number of a pod on this node: the classid of its filters, so 16 bits. 0 is no pod.
pub type PodId = u16;
/// Number of a tenant, given by [`super::maps::Maps::number_of`]. 0 is none.
pub type Tenant = u32;
/// Tables in `flows`.
pub const TABLES: u32 = 64;

/// A side of a flow; of a packet, the side that sends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Side {
    /// The pod.
    Vm = 0,
    /// Whoever it speaks with.
    Peer = 1,
}

impl Side {
    /// The other side.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Vm => Self::Peer,
            Self::Peer => Self::Vm,
        }
    }
}

/// Value of `pods`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pod {
    /// Monotonic nanoseconds. Flows seen before were an earlier pod's of this number.
    pub since: u64,
    /// [`name_digest`]; 0 if its name is not known.
    pub name: u64,
    /// Whose it is.
    pub tenant: Tenant,
    /// Number of its Kubernetes namespace; 0 for none.
    pub space: u32,
    /// Where its flows are: an index below [`TABLES`].
    pub table: u32,
    /// Whether it has an entry in `limits`.
    pub limited: bool,
    /// The one hardware address that it sends with.
    pub mac: [u8; 6],
    /// The other end of its interface, if frames may ever be handed to it past the interface.
    pub other_end: Option<OtherEnd>,
}

/// The other end of a pod's interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OtherEnd {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Whether frames for it are handed to it now.
    pub direct: bool,
}

impl Pod {
    /// The bytes of `struct pod`, with the first address of each family. (None is 0, which is an address
    /// of nobody.)
    #[must_use]
    pub fn encode(&self, addresses: &[IpAddr]) -> [u8; 64] {
        let first = |v4| addresses.iter().find(|ip| ip.is_ipv4() == v4);
        let words = |v4| first(v4).map_or([0; 16], |ip| address(*ip).1);
        let [a, b, c, d, ..] = words(true);
        let fields = Fields::new().put(self.since.to_ne_bytes()).put(self.name.to_ne_bytes());
        let fields = fields.put(self.tenant.to_ne_bytes()).put(self.space.to_ne_bytes());
        let fields = fields.put(self.table.to_ne_bytes());
        let other_end = self.other_end.unwrap_or(OtherEnd { mac: [0; 6], direct: false });
        let flags = [self.limited, other_end.direct].map(u16::from);
        let fields = fields.put(flags[0].to_ne_bytes()).put(flags[1].to_ne_bytes());
        let fields = fields.put(self.mac).put(other_end.mac);
        fields.put([a, b, c, d]).put(words(false)).bytes
    }

    /// What the bytes of `struct pod` say.
    #[must_use]
    pub fn decode(bytes: &[u8; 64]) -> Self {
        Self {
            since: u64::from_ne_bytes(part(bytes, 0)),
            name: u64::from_ne_bytes(part(bytes, 8)),
            tenant: u32::from_ne_bytes(part(bytes, 16)),
            space: u32::from_ne_bytes(part(bytes, 20)),
            table: u32::from_ne_bytes(part(bytes, 24)),
            limited: u16::from_ne_bytes(part(bytes, 28)) != 0,
            mac: part(bytes, 32),
            other_end: Some(OtherEnd {
                mac: part(bytes, 38),
                direct: u16::from_ne_bytes(part(bytes, 30)) != 0,
            })
            .filter(|other_end| other_end.mac != [0; 6]),
        }
    }
}

/// Value of `locals`: whose an address of this node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local {
    /// [`name_digest`] of the pod; 0 if not known.
    pub name: u64,
    /// Its tenant.
    pub tenant: Tenant,
    /// Its number; 0: the node itself.
    pub pod: PodId,
}

impl Local {
    /// The bytes of `struct local`.
    #[must_use]
    pub fn encode(&self) -> [u8; 16] {
        let fields = Fields::new().put(self.name.to_ne_bytes()).put(self.tenant.to_ne_bytes());
        fields.put(pod_key(self.pod).to_ne_bytes()).bytes
    }

    /// What the bytes of `struct local` say.
    #[must_use]
    pub fn decode(bytes: &[u8; 16]) -> Self {
        Self {
            name: u64::from_ne_bytes(part(bytes, 0)),
            tenant: u32::from_ne_bytes(part(bytes, 8)),
            pod: pod_id(part(bytes, 12)),
        }
    }
}

/// Value of `limits`: how many packets may pass in a second, by sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limit {
    /// Packets in a second; 0 for no limit.
    pub packets: [u64; 2],
}

impl Limit {
    /// How much of a second's packets may come at once.
    const BURST: u64 = 50;

    /// Nanoseconds that a packet takes, and how many they may be ahead: 32 packets at least.
    #[must_use]
    pub fn times(&self, sender: Side) -> (u64, u64) {
        let packets = self.packets[sender as usize];
        let interval = 1_000_000_000_u64.checked_div(packets).unwrap_or(0);
        (interval, (1_000_000_000 / Self::BURST).max(32 * interval))
    }

    /// The bytes of `struct limit`.
    #[must_use]
    pub fn encode(&self) -> [u8; 48] {
        let [sent, received] = [self.times(Side::Vm), self.times(Side::Peer)];
        let (interval, burst) = ([sent.0, received.0], [sent.1, received.1]);
        let fields = interval.into_iter().chain(burst).enumerate();
        let mut bytes = [0; 48];
        for (place, number) in fields {
            bytes[8 * place..8 * place + 8].copy_from_slice(&number.to_ne_bytes());
        }
        bytes
    }
}

/// Digest by which a pod is known whatever its address is: the first bytes of SHA-256. Never 0.
#[must_use]
pub fn name_digest(namespace: &str, name: &str) -> u64 {
    let digest =
        Sha256::new().chain_update(namespace).chain_update("/").chain_update(name).finalize();
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&digest[..8]);
    u64::from_ne_bytes(bytes).max(1)
}

/// The family's number and the address in four words.
fn address(ip: IpAddr) -> (u8, [u8; 16]) {
    match ip {
        IpAddr::V4(ip) => {
            let mut words = [0; 16];
            words[..4].copy_from_slice(&ip.octets());
            (4, words)
        }
        IpAddr::V6(ip) => (6, ip.octets()),
    }
}

fn to_address(family: u8, words: [u8; 16]) -> IpAddr {
    if family == 4 {
        let [a, b, c, d, ..] = words;
        Ipv4Addr::new(a, b, c, d).into()
    } else {
        Ipv6Addr::from(words).into()
    }
}

/// Puts fields one after another.
struct Fields<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Fields<N> {
    fn new() -> Self {
        Self { bytes: [0; N], at: 0 }
    }

    fn put<const M: usize>(mut self, field: [u8; M]) -> Self {
        self.bytes[self.at..self.at + M].copy_from_slice(&field);
        self.at += M;
        self
    }
}

/// The key of a pod in `pods` and `counters`.
#[must_use]
pub fn pod_key(pod: PodId) -> u32 {
    pod.into()
}

/// Key of `addresses`: an address that is the pod's, too.
#[must_use]
pub fn address_key(pod: PodId, ip: IpAddr) -> [u8; 24] {
    let (family, words) = address(ip);
    let fields = Fields::new().put(pod_key(pod).to_ne_bytes());
    fields.put(u32::from(family).to_ne_bytes()).put(words).bytes
}

/// The pod and the address in a key of `addresses`.
#[must_use]
pub fn address_of(key: &[u8; 24]) -> (PodId, IpAddr) {
    (pod_id(part(key, 0)), local_address(&part(key, 4)))
}

/// Key of `locals`.
#[must_use]
pub fn local_key(ip: IpAddr) -> [u8; 20] {
    let (family, words) = address(ip);
    Fields::new().put(u32::from(family).to_ne_bytes()).put(words).bytes
}

/// The address in a key of `locals`.
#[must_use]
pub fn local_address(key: &[u8; 20]) -> IpAddr {
    to_address(if u32::from_ne_bytes(part(key, 0)) == 4 { 4 } else { 6 }, part(key, 4))
}

fn pod_id(bytes: [u8; 4]) -> PodId {
    u32::from_ne_bytes(bytes).try_into().unwrap_or(0)
}

fn part<const N: usize, const M: usize>(bytes: &[u8; N], at: usize) -> [u8; M] {
    let mut part = [0; M];
    part.copy_from_slice(&bytes[at..at + M]);
    part
}

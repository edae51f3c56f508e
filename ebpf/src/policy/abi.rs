//! Keys and values of the policy's maps, as `bpf/policy.h` has them.
//!
//! Here they are plain Rust values, with addresses as such and ports in the host's order; `encode` gives
//! the bytes that the kernel compares, in which nothing is left undefined.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sha2::{Digest as _, Sha256};

use super::Reason;

/// Number of a pod on this node: the classid of its filters, so 16 bits. 0 is no pod.
pub type PodId = u16;
/// Number of a tenant, given by [`super::maps::Maps::number_of`]. 0 is none.
pub type Tenant = u32;
/// Tables in `flows`.
pub const TABLES: u32 = 64;
/// Class of the node's own addresses in `rules`.
pub const NODE: u32 = 1;
/// Part of a policy's number: what its pods may open is listed.
pub const ISOLATED_EGRESS: u32 = 1;
/// Part of a policy's number: what may be opened on its pods is listed.
pub const ISOLATED_INGRESS: u32 = 2;
/// Numbers of drop reasons, with 0 for none.
pub const REASONS: usize = Reason::ALL.len() + 1;

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
}

/// Value of `active`: what is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Active {
    /// Leads the keys of `identities`, `spaces` and `rules`.
    pub epoch: u32,
    /// Counts changes of anything that a verdict depends on.
    pub generation: u32,
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

/// Key of `identities`, without its epoch: a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    /// An address in it.
    pub address: IpAddr,
    /// How many of its leading bits count.
    pub bits: u8,
}

/// Value of `identities`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// [`name_digest`] of the pod that `group` and `policy` were made for; 0: not of one pod.
    pub name: u64,
    /// Whose the addresses are.
    pub tenant: Tenant,
    /// Class of shared services there; 0 for none.
    pub service: u32,
    /// Class of those that name this very address, and not a prefix around it: they alone open what is a
    /// tenant's or the node's.
    pub near: u32,
    /// What it is as a peer in NetworkPolicies; 0: in none.
    pub group: u32,
    /// The NetworkPolicies that select it, with [`ISOLATED_EGRESS`] and [`ISOLATED_INGRESS`]; 0: none.
    pub policy: u32,
}

/// What a [`Rule`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// What a class of addresses shares with all tenants.
    Service {
        /// The class.
        class: u32,
        /// Who may open it: [`Side::Vm`] the service's own ports, [`Side::Peer`] those of pods.
        opener: Side,
    },
    /// What one tenant may open to another.
    Tenants {
        /// Who opens.
        from: Tenant,
        /// To whom.
        to: Tenant,
    },
    /// What pods of a policy may open.
    Egress {
        /// The policy.
        policy: u32,
        /// To whom; 0: to anybody.
        group: u32,
    },
    /// What may be opened on pods of a policy.
    Ingress {
        /// The policy.
        policy: u32,
        /// By whom; 0: by anybody.
        group: u32,
    },
}

/// Protocols and ports of a [`Rule`]; the port is that of who does not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ports {
    /// Every protocol.
    Any,
    /// Every port of an IP protocol, or one without ports.
    Protocol(u8),
    /// The ports of an IP protocol whose leading `bits` are those of `port`.
    Prefix {
        /// IP protocol.
        proto: u8,
        /// A port of them.
        port: u16,
        /// 1 to 16.
        bits: u8,
    },
}

/// Key of `rules`, without its epoch: something that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rule {
    /// To whom.
    pub scope: Scope,
    /// What.
    pub ports: Ports,
}

/// Key of `flows`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The pod on this node.
    pub pod: PodId,
    /// Its address.
    pub local: IpAddr,
    /// The peer's address.
    pub remote: IpAddr,
    /// The pod's port; of ICMP echo, the identifier.
    pub local_port: u16,
    /// The peer's port.
    pub remote_port: u16,
    /// IP protocol.
    pub proto: u8,
    /// Of ICMP echo: who asks. Of others [`Side::Vm`].
    pub echo: Side,
}

/// How far a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// The other side has not answered.
    New = 0,
    /// It has.
    Answered = 1,
    /// TCP: reset, or finished by both sides.
    Closed = 2,
}

/// Value of `flows`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// When the last packet was let through, in monotonic nanoseconds.
    pub seen: u64,
    /// When the first was.
    pub begun: u64,
    /// Packets let through, by sender.
    pub packets: [u64; 2],
    /// Their bytes, from the Ethernet header on.
    pub bytes: [u64; 2],
    /// Who opened it.
    pub opener: Side,
    /// How far it is.
    pub state: State,
    /// TCP: the sides that sent FIN, as bits numbered by [`Side`].
    pub finished: u8,
    /// Of the policy that last let its opener open it.
    pub generation: u32,
}

/// Key of fragments in `flows`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// The pod on this node.
    pub pod: PodId,
    /// Who sends.
    pub sender: Side,
    /// From where.
    pub source: IpAddr,
    /// To where.
    pub destination: IpAddr,
    /// The identification that the fragments share.
    pub id: u32,
    /// IP protocol.
    pub proto: u8,
}

/// Value of `denials`: a refused attempt, under the key of the flow that it would have been, but with the
/// port of who opens 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Denied {
    /// When it was refused first, in monotonic nanoseconds.
    pub begun: u64,
    /// When last.
    pub seen: u64,
    /// How often.
    pub packets: u64,
    /// Why, the last time.
    pub reason: Reason,
    /// Who wanted to open.
    pub opener: Side,
}

/// What happened to a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It was opened.
    Opened,
    /// TCP: it was reset, or finished by both sides.
    Ended,
    /// It was refused, for the first time since it was last forgotten; only `opener`, `begun` and `seen`
    /// are meaningful in its flow.
    Denied(Reason),
}

/// An element of `events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// To which flow; of a refused one the port of who opens is 0.
    pub key: FlowKey,
    /// Its state after that.
    pub flow: Flow,
    /// Tenant of the pod.
    pub tenant: Tenant,
    /// The peer as it was known: its tenant,
    pub peer_tenant: Tenant,
    /// the class of shared services,
    pub peer_service: u32,
    /// its number if it is a pod of this node,
    pub peer_pod: PodId,
    /// and the digest of its name.
    pub peer_name: u64,
}

/// Value of `limits`: how many packets may pass in a second, by sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limit {
    /// Packets in a second; 0 for no limit.
    pub packets: [u64; 2],
}

/// Value of `counters`, of one CPU or all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters {
    /// Packets let through, by sender.
    pub packets: [u64; 2],
    /// Their bytes, from the Ethernet header on.
    pub bytes: [u64; 2],
    /// Packets dropped, by sender and reason's number.
    pub drops: [[u64; REASONS]; 2],
    /// Events that were not said, as there were too many.
    pub unsaid: u64,
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
        let fields = fields.put(u32::from(self.limited).to_ne_bytes()).put(self.mac).put([0; 2]);
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
            limited: u32::from_ne_bytes(part(bytes, 28)) != 0,
            mac: part(bytes, 32),
        }
    }
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

impl Prefix {
    /// The bytes of `struct identity_key`.
    #[must_use]
    pub fn encode(&self, epoch: u32) -> [u8; 28] {
        let (family, words) = address(self.address);
        let fields = Fields::new().put((64 + u32::from(self.bits)).to_ne_bytes());
        fields.put(epoch.to_ne_bytes()).put(u32::from(family).to_ne_bytes()).put(words).bytes
    }

    /// Whether an address is in it.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        let (family, words) = address(ip);
        let (own_family, own) = address(self.address);
        let bits = u32::from(self.bits);
        let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
        family == own_family && (u128::from_be_bytes(words) ^ u128::from_be_bytes(own)) & mask == 0
    }
}

impl Identity {
    /// The bytes of `struct identity`.
    #[must_use]
    pub fn encode(&self) -> [u8; 32] {
        let fields = Fields::new().put(self.name.to_ne_bytes()).put(self.tenant.to_ne_bytes());
        let fields = fields.put(self.service.to_ne_bytes()).put(self.near.to_ne_bytes());
        fields.put(self.group.to_ne_bytes()).put(self.policy.to_ne_bytes()).bytes
    }
}

/// Key of `spaces`: the policy of pods of a namespace whose labels are not known.
#[must_use]
pub fn space_key(epoch: u32, space: u32) -> [u8; 8] {
    Fields::new().put(epoch.to_ne_bytes()).put(space.to_ne_bytes()).bytes
}

impl Rule {
    /// The bytes of `struct rule_key`.
    #[must_use]
    pub fn encode(&self, epoch: u32) -> [u8; 20] {
        let (kind, subject, object) = match self.scope {
            Scope::Service { class, opener } => (0_u8, class, opener as u32),
            Scope::Tenants { from, to } => (1, from, to),
            Scope::Egress { policy, group } => (2, policy, group),
            Scope::Ingress { policy, group } => (3, policy, group),
        };
        let (bits, proto, port) = match self.ports {
            Ports::Any => (104, 0, 0),
            Ports::Protocol(proto) => (112, proto, 0),
            Ports::Prefix { proto, port, bits } => (112 + u32::from(bits.min(16)), proto, port),
        };
        let fields = Fields::new().put(u32::to_ne_bytes(bits)).put(epoch.to_ne_bytes());
        let fields = fields.put(subject.to_ne_bytes()).put(object.to_ne_bytes());
        fields.put([kind, proto]).put(port.to_be_bytes()).bytes
    }
}

impl Ports {
    /// Whether a packet of this protocol, to this port of who does not open, is meant.
    #[must_use]
    pub fn contain(&self, packet_proto: u8, packet_port: u16) -> bool {
        match *self {
            Self::Any => true,
            Self::Protocol(proto) => proto == packet_proto,
            Self::Prefix { proto, port, bits } => {
                let mask = u16::MAX.checked_shl(16 - u32::from(bits.min(16))).unwrap_or(0);
                proto == packet_proto && (port ^ packet_port) & mask == 0
            }
        }
    }

    /// The fewest [`Ports`] that together are `first` to `last` of a protocol.
    #[must_use]
    pub fn range(proto: u8, first: u16, last: u16) -> Vec<Self> {
        let (mut ports, mut at, end) = (Vec::new(), u32::from(first), u32::from(last) + 1);
        while at < end {
            let aligned = at.trailing_zeros().min(16);
            let fits = (end - at).ilog2();
            let free = aligned.min(fits);
            let port = u16::try_from(at).unwrap_or(u16::MAX);
            ports.push(match 16 - free {
                0 => Self::Protocol(proto),
                bits => Self::Prefix { proto, port, bits: bits as u8 },
            });
            at += 1 << free;
        }
        ports
    }
}

impl FlowKey {
    /// The bytes of `struct flow_key`.
    #[must_use]
    pub fn encode(&self) -> [u8; 44] {
        let (family, local) = address(self.local);
        let fields = Fields::new().put(pod_key(self.pod).to_ne_bytes()).put(local);
        let fields = fields.put(address(self.remote).1).put(self.local_port.to_be_bytes());
        let fields = fields.put(self.remote_port.to_be_bytes());
        fields.put([self.proto, family, self.echo as u8]).bytes
    }

    /// What the bytes of `struct flow_key` say; `None` if they are about fragments, or such as the
    /// programs never write.
    #[must_use]
    pub fn decode(bytes: &[u8; 44]) -> Option<Self> {
        let [proto, family, echo, fragments] = part(bytes, 40);
        let key = Self {
            pod: u32::from_ne_bytes(part(bytes, 0)).try_into().ok()?,
            local: to_address(family, part(bytes, 4)),
            remote: to_address(family, part(bytes, 20)),
            local_port: u16::from_be_bytes(part(bytes, 36)),
            remote_port: u16::from_be_bytes(part(bytes, 38)),
            proto,
            echo: side(echo)?,
        };
        (matches!(family, 4 | 6) && fragments == 0).then_some(key)
    }
}

impl Flow {
    /// The bytes of `struct flow`.
    #[must_use]
    pub fn encode(&self) -> [u8; 56] {
        let fields = Fields::new().put(self.seen.to_ne_bytes()).put(self.begun.to_ne_bytes());
        let [sent, received] = self.packets;
        let fields = fields.put(sent.to_ne_bytes()).put(received.to_ne_bytes());
        let [sent, received] = self.bytes;
        let fields = fields.put(sent.to_ne_bytes()).put(received.to_ne_bytes());
        let rest = [self.opener as u8, self.state as u8, self.finished];
        fields.put(self.generation.to_ne_bytes()).put(rest).bytes
    }

    /// What the bytes of `struct flow` say; `None` if the programs never write such.
    #[must_use]
    pub fn decode(bytes: &[u8; 56]) -> Option<Self> {
        let number = |at| u64::from_ne_bytes(part(bytes, at));
        let [opener, state, finished] = part(bytes, 52);
        let state = match state {
            0 => State::New,
            1 => State::Answered,
            2 => State::Closed,
            _ => return None,
        };
        Some(Self {
            seen: number(0),
            begun: number(8),
            packets: [number(16), number(24)],
            bytes: [number(32), number(40)],
            generation: u32::from_ne_bytes(part(bytes, 48)),
            opener: side(opener)?,
            state,
            finished,
        })
    }
}

impl Denied {
    /// What the bytes of `struct denied` say; `None` if the programs never write such.
    #[must_use]
    pub fn decode(bytes: &[u8; 32]) -> Option<Self> {
        let number = |at| u64::from_ne_bytes(part(bytes, at));
        Some(Self {
            begun: number(0),
            seen: number(8),
            packets: number(16),
            reason: Reason::from_number(u32::from_ne_bytes(part(bytes, 24)))?,
            opener: side(u8::try_from(u32::from_ne_bytes(part(bytes, 28))).ok()?)?,
        })
    }
}

impl Event {
    /// Length of `struct event`.
    pub const SIZE: usize = 128;

    /// What the bytes of `struct event` say; `None` if the programs never write such.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let number = |at| u32::from_ne_bytes(part(bytes, at));
        let [kind, reason] = part(bytes, 68);
        Some(Self {
            peer_name: u64::from_ne_bytes(part(bytes, 0)),
            tenant: number(8),
            peer_tenant: number(12),
            peer_service: number(16),
            peer_pod: pod_id(part(bytes, 20)),
            key: FlowKey::decode(&part(bytes, 24))?,
            kind: match kind {
                0 => EventKind::Opened,
                1 => EventKind::Ended,
                2 => EventKind::Denied(Reason::from_number(reason.into())?),
                _ => return None,
            },
            flow: Flow::decode(&part(bytes, 72))?,
        })
    }
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

impl FragmentKey {
    /// The bytes of `struct fragment_key`; `id` is in the order of the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; 44] {
        let (family, source) = address(self.source);
        let fields = Fields::new().put(pod_key(self.pod).to_ne_bytes()).put(source);
        let fields = fields.put(address(self.destination).1).put(match family {
            // 16 bits in the header.
            4 => u32::from((self.id as u16).to_be()).to_ne_bytes(),
            _ => self.id.to_be_bytes(),
        });
        fields.put([self.proto, family, self.sender as u8, 1]).bytes
    }
}

impl Default for Counters {
    fn default() -> Self {
        Self { packets: [0; 2], bytes: [0; 2], drops: [[0; REASONS]; 2], unsaid: 0 }
    }
}

impl Counters {
    /// Bytes of `struct counters`.
    pub const SIZE: usize = 8 * (6 + 2 * REASONS);

    /// Adds what the bytes of `struct counters` say.
    pub fn add(&mut self, bytes: &[u8; Self::SIZE]) {
        for (field, bytes) in self.fields().zip(bytes.as_chunks().0) {
            *field += u64::from_ne_bytes(*bytes);
        }
    }

    fn fields(&mut self) -> impl Iterator<Item = &mut u64> {
        let drops = self.drops.iter_mut().flatten();
        let first = self.packets.iter_mut().chain(&mut self.bytes).chain(drops);
        first.chain(std::iter::once(&mut self.unsaid))
    }

    /// The bytes of `struct counters`.
    #[must_use]
    pub fn encode(mut self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        for (field, place) in self.fields().zip(bytes.as_chunks_mut().0) {
            *place = field.to_ne_bytes();
        }
        bytes
    }

    /// Packets of a sender that were dropped for a reason.
    #[must_use]
    pub fn dropped(&self, sender: Side, reason: Reason) -> u64 {
        self.drops[sender as usize][reason as usize]
    }
}

fn pod_id(bytes: [u8; 4]) -> PodId {
    u32::from_ne_bytes(bytes).try_into().unwrap_or(0)
}

fn side(number: u8) -> Option<Side> {
    match number {
        0 => Some(Side::Vm),
        1 => Some(Side::Peer),
        _ => None,
    }
}

fn part<const N: usize, const M: usize>(bytes: &[u8; N], at: usize) -> [u8; M] {
    let mut part = [0; M];
    part.copy_from_slice(&bytes[at..at + M]);
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_read_as_they_are_written() {
        for (local, remote) in [("10.0.0.1", "10.255.0.2"), ("fd00::1", "fe80::2")] {
            let key = FlowKey {
                pod: 0xFEDC,
                local: local.parse().unwrap(),
                remote: remote.parse().unwrap(),
                local_port: 53,
                remote_port: 0xABCD,
                proto: 17,
                echo: Side::Peer,
            };
            assert_eq!(FlowKey::decode(&key.encode()), Some(key));
        }
        let flow = Flow {
            seen: 1 << 40,
            begun: 1 << 39,
            packets: [1, 2],
            bytes: [3, 4],
            opener: Side::Peer,
            state: State::Closed,
            finished: 3,
            generation: 0xFEDC_BA98,
        };
        assert_eq!(Flow::decode(&flow.encode()), Some(flow));
        assert_eq!(Flow::decode(&[9; 56]), None);
    }

    #[test]
    fn ranges_of_ports_are_exact() {
        for (first, last) in [(0, 65535), (80, 80), (1, 65535), (1000, 2000), (65535, 65535)] {
            let ports = Ports::range(6, first, last);
            assert!(ports.len() <= 30, "{ports:?}");
            for port in 0..=65535 {
                let within = (first..=last).contains(&port);
                assert_eq!(ports.iter().filter(|it| it.contain(6, port)).count(), within.into());
            }
        }
    }

    #[test]
    fn a_prefix_holds_its_own_family_only() {
        let prefix = |text: &str, bits| Prefix { address: text.parse().unwrap(), bits };
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(prefix("0.0.0.0", 0).contains(ip("10.1.2.3")));
        assert!(!prefix("::", 0).contains(ip("10.1.2.3")));
        assert!(prefix("10.1.0.0", 16).contains(ip("10.1.2.3")));
        assert!(!prefix("10.1.0.0", 16).contains(ip("10.2.2.3")));
        assert!(prefix("fd00::1", 128).contains(ip("fd00::1")));
        assert!(!prefix("fd00::1", 128).contains(ip("fd00::2")));
    }
}

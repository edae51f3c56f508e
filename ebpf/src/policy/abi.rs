//! Keys and values of the policy's maps, as `bpf/policy.h` has them.
//!
//! Here they are plain Rust values, with addresses as such and ports in the host's order; `encode` gives
//! the bytes that the kernel compares, in which nothing is left undefined.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Reason;

/// Number of a pod on this node: the classid of its filters, so 16 bits. 0 is no pod. A number that was
/// free for as long as a flow may live, or whose flows were removed, may be given again.
pub type PodId = u16;
/// Number of a tenant. 0 is none.
pub type Tenant = u32;
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
    /// Whose it is.
    pub tenant: Tenant,
    /// The one hardware address that it sends with.
    pub mac: [u8; 6],
}

/// Key of `identities`: a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Prefix {
    /// An address in it.
    pub address: IpAddr,
    /// How many of its leading bits count.
    pub bits: u8,
}

/// Value of `identities`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Whose the addresses are.
    pub tenant: Tenant,
    /// Class of shared services there; 0 for none.
    pub service: u32,
}

/// Key of `services`: what a class of addresses shares with all tenants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Service {
    /// The class.
    pub class: u32,
    /// IP protocol.
    pub proto: u8,
    /// Port of who does not open; 0 for all.
    pub port: u16,
    /// Who may open it.
    pub opener: Side,
}

/// Key of `allows`: what one tenant may open to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Allow {
    /// Who opens.
    pub from: Tenant,
    /// To whom.
    pub to: Tenant,
    /// IP protocol.
    pub proto: u8,
    /// Port opened; 0 for all.
    pub port: u16,
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
    /// Who opened it.
    pub opener: Side,
    /// How far it is.
    pub state: State,
    /// TCP: the sides that sent FIN, as bits numbered by [`Side`].
    pub finished: u8,
    /// Of the policy that last let its opener open it.
    pub generation: u32,
}

/// Key of `fragments`.
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

/// Value of `counters`, of one CPU or all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters {
    /// Packets let through, by sender.
    pub packets: [u64; 2],
    /// Their bytes, from the Ethernet header on.
    pub bytes: [u64; 2],
    /// Packets dropped, by sender and reason's number.
    pub drops: [[u64; REASONS]; 2],
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
    pub fn encode(&self, addresses: &[IpAddr]) -> [u8; 32] {
        let first = |v4| addresses.iter().find(|ip| ip.is_ipv4() == v4);
        let words = |v4| first(v4).map_or([0; 16], |ip| address(*ip).1);
        let [a, b, c, d, ..] = words(true);
        let fields = Fields::new().put(self.tenant.to_ne_bytes()).put(self.mac).put([0; 2]);
        fields.put([a, b, c, d]).put(words(false)).bytes
    }
}

impl Prefix {
    /// The number of bits, and the bytes that they are counted in: `struct identity_key`.
    #[must_use]
    pub fn encode(&self) -> (u32, [u8; 20]) {
        let (family, words) = address(self.address);
        let fields = Fields::new().put(u32::from(family).to_ne_bytes()).put(words);
        (32 + u32::from(self.bits), fields.bytes)
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
    pub fn encode(&self) -> [u8; 8] {
        Fields::new().put(self.tenant.to_ne_bytes()).put(self.service.to_ne_bytes()).bytes
    }
}

impl Service {
    /// The bytes of `struct service_key`.
    #[must_use]
    pub fn encode(&self) -> [u8; 8] {
        let fields = Fields::new().put(self.class.to_ne_bytes()).put(self.port.to_be_bytes());
        fields.put([self.proto, self.opener as u8]).bytes
    }
}

impl Allow {
    /// The bytes of `struct allow_key`.
    #[must_use]
    pub fn encode(&self) -> [u8; 12] {
        let fields = Fields::new().put(self.from.to_ne_bytes()).put(self.to.to_ne_bytes());
        fields.put(self.port.to_be_bytes()).put([self.proto]).bytes
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

    /// What the bytes of `struct flow_key` say; `None` if the programs never write such.
    #[must_use]
    pub fn decode(bytes: &[u8; 44]) -> Option<Self> {
        let [proto, family, echo] = part(bytes, 40);
        let key = Self {
            pod: u32::from_ne_bytes(part(bytes, 0)).try_into().ok()?,
            local: to_address(family, part(bytes, 4)),
            remote: to_address(family, part(bytes, 20)),
            local_port: u16::from_be_bytes(part(bytes, 36)),
            remote_port: u16::from_be_bytes(part(bytes, 38)),
            proto,
            echo: side(echo)?,
        };
        matches!(family, 4 | 6).then_some(key)
    }
}

impl Flow {
    /// The bytes of `struct flow`.
    #[must_use]
    pub fn encode(&self) -> [u8; 16] {
        let rest = [self.opener as u8, self.state as u8, self.finished];
        let fields = Fields::new().put(self.seen.to_ne_bytes()).put(rest).put([0]);
        fields.put(self.generation.to_ne_bytes()).bytes
    }

    /// What the bytes of `struct flow` say; `None` if the programs never write such.
    #[must_use]
    pub fn decode(bytes: &[u8; 16]) -> Option<Self> {
        let [opener, state, finished] = part(bytes, 8);
        let state = match state {
            0 => State::New,
            1 => State::Answered,
            2 => State::Closed,
            _ => return None,
        };
        let seen = u64::from_ne_bytes(part(bytes, 0));
        let generation = u32::from_ne_bytes(part(bytes, 12));
        Some(Self { seen, opener: side(opener)?, state, finished, generation })
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
        fields.put([self.proto, family, self.sender as u8]).bytes
    }
}

impl Default for Counters {
    fn default() -> Self {
        Self { packets: [0; 2], bytes: [0; 2], drops: [[0; REASONS]; 2] }
    }
}

impl Counters {
    /// Bytes of `struct counters`.
    pub const SIZE: usize = 8 * (4 + 2 * REASONS);

    /// Adds what the bytes of `struct counters` say.
    pub fn add(&mut self, bytes: &[u8; Self::SIZE]) {
        let drops = self.drops.iter_mut().flatten();
        let fields = self.packets.iter_mut().chain(&mut self.bytes).chain(drops);
        for (field, bytes) in fields.zip(bytes.as_chunks().0) {
            *field += u64::from_ne_bytes(*bytes);
        }
    }

    /// Packets of a sender that were dropped for a reason.
    #[must_use]
    pub fn dropped(&self, sender: Side, reason: Reason) -> u64 {
        self.drops[sender as usize][reason as usize]
    }
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
            opener: Side::Peer,
            state: State::Closed,
            finished: 3,
            generation: 0xFEDC_BA98,
        };
        assert_eq!(Flow::decode(&flow.encode()), Some(flow));
        assert_eq!(Flow::decode(&[9; 16]), None);
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

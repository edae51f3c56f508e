//! Flows, what was counted, and what is told of them.

use std::net::IpAddr;

use super::{Fields, PodId, Side, Tenant, address, part, pod_id, pod_key, to_address};
use crate::policy::Reason;

/// Numbers of drop reasons, with 0 for none.
pub const REASONS: usize = Reason::ALL.len() + 1;

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

fn side(number: u8) -> Option<Side> {
    match number {
        0 => Some(Side::Vm),
        1 => Some(Side::Peer),
        _ => None,
    }
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
}

//! The policy's rules, to be read: what is decided about each frame, and why.
//!
//! In this order, a frame is
//!
//! 1. dropped if its device belongs to no pod;
//! 2. from the VM, sent with the pod's hardware address; to it, addressed to that or to a group;
//! 3. ARP, IPv4 or IPv6, without VLAN tag, and well-formed (`packet.rs`); ARP is looked at by itself;
//! 4. from the VM, sent with one of the pod's addresses; to it, addressed to one, to a multicast group or
//!    to all;
//! 5. if it is a later fragment, let through where its first one was in the last 30 seconds, and else
//!    dropped: fragments that overtake their first one are lost, and the packet is sent again;
//! 6. TCP, UDP, ICMP or ICMPv6; from a VM no answer of a DHCP server;
//! 7. neighbour discovery that claims nothing but what is the pod's (`neighbour.rs`), or
//! 8. part of a flow (`flow.rs`) that the policy lets its opener open (`tables.rs`): within a tenant
//!    everything, from and to shared services what is listed, across tenants what is allowed, and nothing
//!    with unknown peers; and what NetworkPolicies list for the pods that they select. TCP opens by SYN, UDP
//!    by any packet, ICMP by an echo request; ICMP errors go with the flow of the packet that they quote;
//! 9. within the pod's limit of packets in a second, if it has one.
//!
//! Only what passes all of it is written down. Refused by 8, an attempt is remembered and told.

mod flow;
mod neighbour;
pub(super) mod packet;
mod tables;

pub use flow::lifetime;
pub use tables::{Attempt, Peer, Tables};

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use self::flow::{Role, Step};
use self::packet::{Frame, ICMP, ICMP6, Packet, Piece, Ports, TCP, UDP, field, tcp, udp};
use super::Reason;
use super::abi::{Counters, Denied, Event, Flow, FlowKey, FragmentKey, Limit, Pod, PodId, Side};

/// How long later fragments may follow their first one.
const FRAGMENTS: Duration = Duration::from_secs(30);

/// Whether one reading of the clock is before another.
fn is_before(one: u64, other: u64) -> bool {
    one.wrapping_sub(other).cast_signed() < 0
}

/// From one reading of the clock to another. None if the first was taken later, by another CPU.
fn elapsed(from: u64, to: u64) -> Duration {
    Duration::from_nanos(u64::try_from(to.wrapping_sub(from).cast_signed()).unwrap_or(0))
}

/// A limit, and the moments until which packets are paid for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Paid {
    /// How many in a second, by sender; 0 for no limit.
    pub limit: Limit,
    /// Monotonic nanoseconds, by sender.
    pub until: [u64; 2],
}

/// The maps' contents, and the decision that is made by them.
#[derive(Debug, Clone, Default)]
pub struct Model {
    /// The node's pods.
    pub pods: HashMap<PodId, Pod>,
    /// Which addresses are whose.
    pub addresses: HashSet<(PodId, IpAddr)>,
    /// What the policy says of addresses.
    pub tables: Tables,
    /// What was opened.
    pub flows: HashMap<FlowKey, Flow>,
    /// When first fragments were let through.
    pub fragments: HashMap<FragmentKey, u64>,
    /// Of pods that are limited.
    pub limits: HashMap<PodId, Paid>,
    /// Attempts that were refused.
    pub denials: HashMap<FlowKey, Denied>,
    /// What was told, as if everything could be.
    pub events: Vec<Event>,
    /// What was counted; pod 0 has what belongs to no pod.
    pub counters: HashMap<PodId, Counters>,
}

/// Who sends a packet, and when.
struct Sender {
    pod: PodId,
    config: Pod,
    side: Side,
    now: u64,
    /// Of the frame.
    length: u64,
}

/// What an allowed packet leaves behind.
#[derive(Debug, Default)]
struct Trace {
    flow: Option<Step>,
    /// Others may follow.
    fragment: Option<FragmentKey>,
    /// It keeps the link working.
    link: bool,
}

impl From<Step> for Trace {
    fn from(flow: Step) -> Self {
        Self { flow: Some(flow), ..Self::default() }
    }
}

impl Sender {
    /// The flow of a packet that `author` sends.
    fn key_of(
        &self,
        author: Side,
        proto: u8,
        source: (IpAddr, u16),
        destination: (IpAddr, u16),
    ) -> FlowKey {
        let ((local, local_port), (remote, remote_port)) = match author {
            Side::Vm => (source, destination),
            Side::Peer => (destination, source),
        };
        let (pod, echo) = (self.pod, Side::Vm);
        FlowKey { pod, local, remote, local_port, remote_port, proto, echo }
    }

    fn key(&self, packet: &Packet<'_>, ports: Ports) -> FlowKey {
        let source = (packet.source, ports.0);
        self.key_of(self.side, packet.proto, source, (packet.destination, ports.1))
    }
}

impl Model {
    /// Decides about a frame that `side` sends at `now` (monotonic nanoseconds) on a device of `pod`, and
    /// counts it.
    pub fn judge(&mut self, side: Side, pod: PodId, frame: &[u8], now: u64) -> Result<(), Reason> {
        let decision = match self.pods.get(&pod) {
            Some(&config) => {
                // A clock of ticks may be behind the pod's beginning.
                let now = if elapsed(now, config.since).is_zero() { now } else { config.since };
                let length = frame.len() as u64;
                self.pass(&Sender { pod, config, side, now, length }, frame)
            }
            None => Err(Reason::NoPod),
        };
        let counted = if decision == Err(Reason::NoPod) { 0 } else { pod };
        let counters = self.counters.entry(counted).or_default();
        match decision {
            Ok(()) => {
                counters.packets[side as usize] += 1;
                counters.bytes[side as usize] += frame.len() as u64;
            }
            Err(reason) => counters.drops[side as usize][reason as usize] += 1,
        }
        decision
    }

    /// A packet that is allowed has to be paid for, and only then it changes anything.
    fn pass(&mut self, sender: &Sender, frame: &[u8]) -> Result<(), Reason> {
        let trace = self.examine(sender, frame)?;
        // What keeps the link working comes from anybody on it, and must not use up what is the pod's.
        if sender.side == Side::Vm || !trace.link {
            self.pay(sender)?;
        }
        if let Some(key) = trace.fragment {
            self.fragments.insert(key, sender.now);
        }
        if let Some(step) = trace.flow {
            self.record(sender, step);
        }
        Ok(())
    }

    fn pay(&mut self, sender: &Sender) -> Result<(), Reason> {
        if !sender.config.limited {
            return Ok(());
        }
        let paid = self.limits.get_mut(&sender.pod).ok_or(Reason::Rate)?;
        let (interval, burst) = paid.limit.times(sender.side);
        if interval == 0 {
            return Ok(());
        }
        let until = &mut paid.until[sender.side as usize];
        let from = (*until).max(sender.now);
        if from - sender.now + interval > burst {
            return Err(Reason::Rate);
        }
        *until = from + interval;
        Ok(())
    }

    fn examine(&mut self, sender: &Sender, frame: &[u8]) -> Result<Trace, Reason> {
        let frame = Frame::parse(frame)?;
        let mac = sender.config.mac;
        match sender.side {
            Side::Vm if frame.from != mac => return Err(Reason::SpoofedMac),
            Side::Peer if frame.to[0] & 1 == 0 && frame.to != mac => {
                return Err(Reason::NotForPod);
            }
            _ => {}
        }
        let packet = match frame.kind {
            0x8100 | 0x88A8 => return Err(Reason::Vlan),
            0x0806 => {
                self.arp(sender, frame.body)?;
                return Ok(Trace { link: true, ..Trace::default() });
            }
            0x0800 => Packet::ipv4(frame.body)?,
            0x86DD => Packet::ipv6(frame.body)?,
            _ => return Err(Reason::EtherType),
        };
        self.check_addresses(sender, &packet)?;
        let Packet { source, destination, proto, .. } = packet;
        let (pod, side) = (sender.pod, sender.side);
        let key = |id| FragmentKey { pod, sender: side, source, destination, id, proto };
        match packet.piece {
            Piece::Later { id } => {
                let first = self.fragments.get(&key(id)).ok_or(Reason::Fragment)?;
                let own = !is_before(*first, sender.config.since);
                let young = own && elapsed(*first, sender.now) < FRAGMENTS;
                if young { Ok(Trace::default()) } else { Err(Reason::Fragment) }
            }
            Piece::First { id, more: true } => {
                let trace = self.transport(sender, &packet)?;
                Ok(Trace { fragment: Some(key(id)), ..trace })
            }
            Piece::First { more: false, .. } | Piece::Whole => self.transport(sender, &packet),
        }
    }

    fn is_own(&self, pod: PodId, ip: IpAddr) -> bool {
        self.addresses.contains(&(pod, ip))
    }

    fn check_addresses(&self, sender: &Sender, packet: &Packet<'_>) -> Result<(), Reason> {
        let Packet { source, destination, .. } = *packet;
        if sender.side == Side::Peer {
            let all = destination == IpAddr::V4(Ipv4Addr::BROADCAST);
            let fine = destination.is_multicast() || all || self.is_own(sender.pod, destination);
            return if fine { Ok(()) } else { Err(Reason::NotForPod) };
        }
        // To ask whether an address is taken; whether it does that is seen later.
        let nameless = source.is_ipv6()
            && source.is_unspecified()
            && packet.proto == ICMP6
            && packet.piece == Piece::Whole;
        if nameless || self.is_own(sender.pod, source) {
            Ok(())
        } else {
            Err(Reason::SpoofedAddress)
        }
    }

    fn transport(&mut self, sender: &Sender, packet: &Packet<'_>) -> Result<Trace, Reason> {
        let ipv4 = packet.source.is_ipv4();
        match packet.proto {
            TCP => {
                let (ports, flags) = tcp(packet.body)?;
                self.flow(sender, sender.key(packet, ports), Role::Segment(flags)).map(Trace::from)
            }
            UDP => {
                let ports = udp(packet.body, packet.piece)?;
                let (server, client) = if ipv4 { (67, 68) } else { (547, 546) };
                if sender.side == Side::Vm && (ports.0 == server || ports.1 == client) {
                    return Err(Reason::Dhcp);
                }
                self.flow(sender, sender.key(packet, ports), Role::Opens).map(Trace::from)
            }
            ICMP if ipv4 => self.icmp(sender, packet),
            ICMP6 if !ipv4 => self.icmp(sender, packet),
            _ => Err(Reason::Protocol),
        }
    }

    fn icmp(&mut self, sender: &Sender, packet: &Packet<'_>) -> Result<Trace, Reason> {
        let [kind, _, _, _, id @ .., _, _]: [u8; 8] = field(packet.body, 0)?;
        let ipv4 = packet.source.is_ipv4();
        if !ipv4 && matches!(kind, 130..=137 | 143) {
            self.link(sender, packet)?;
            return Ok(Trace { link: true, ..Trace::default() });
        }
        if sender.side == Side::Vm && packet.source.is_unspecified() && !ipv4 {
            return Err(Reason::SpoofedAddress);
        }
        let (role, asks) = match (ipv4, kind) {
            (true, 5) => return Err(Reason::Router),
            (true, 3 | 11 | 12) | (false, 1..=4) => {
                return self.error(sender, packet).map(|()| Trace::default());
            }
            (true, 8) | (false, 128) => (Role::Opens, sender.side),
            (true, 0) | (false, 129) => (Role::Answers, sender.side.other()),
            _ => return Err(Reason::IcmpType),
        };
        let key = sender.key(packet, (0, 0));
        let key = FlowKey { local_port: u16::from_be_bytes(id), echo: asks, ..key };
        self.flow(sender, key, role).map(Trace::from)
    }
}

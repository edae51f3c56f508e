//! Who may open what to whom, and which packets belong to what was opened.

use std::net::IpAddr;
use std::time::Duration;

use super::packet::{ACK, FIN, ICMP, ICMP6, Packet, Piece, RST, SYN, TCP, UDP, field};
use super::{Attempt, Model, Sender, elapsed, is_before};
use crate::policy::Reason;
use crate::policy::abi::{Denied, Event, EventKind, Flow, FlowKey, Identity, Side, State};

/// What a packet is to its flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// TCP, with its flags.
    Segment(u8),
    /// Opens a flow where there is none.
    Opens,
    /// Is worth nothing without one.
    Answers,
}

/// How long after its last packet a flow is known.
#[must_use]
pub fn lifetime(proto: u8, state: State) -> Duration {
    Duration::from_secs(match (proto, state) {
        (TCP, State::New) => 60,
        // RFC 5382: 2 hours and 4 minutes at least.
        (TCP, State::Answered) => 7500,
        (UDP, State::Answered) => 180,
        _ => 30,
    })
}

/// A flow that a packet belongs to, as it is with that packet.
#[derive(Debug)]
pub(super) struct Step {
    key: FlowKey,
    flow: Flow,
    /// Not known before.
    fresh: bool,
}

fn is_live(sender: &Sender, proto: u8, flow: &Flow) -> bool {
    // What was seen before was of an earlier pod with this number.
    !is_before(flow.seen, sender.config.since)
        && elapsed(flow.seen, sender.now) < lifetime(proto, flow.state)
}

impl Model {
    /// Whether the policy lets `opener` open this flow to the other side.
    fn may_open(&self, sender: &Sender, key: &FlowKey, opener: Side) -> Result<(), Reason> {
        let port = match (key.proto, opener) {
            (ICMP | ICMP6, _) => 0,
            (_, Side::Vm) => key.remote_port,
            (_, Side::Peer) => key.local_port,
        };
        let FlowKey { local, remote, proto, .. } = *key;
        let attempt = Attempt { local, remote, proto, port, opener };
        self.tables.verdict(&sender.config, &attempt).map(drop)
    }

    /// A packet of the flow `key`. While a flow is known, the policy about its opener decides, for both
    /// directions; so nothing passes by having the right source port, and a policy that changes ends
    /// what it allowed before. (The programs ask it again when its generation is another.)
    pub(super) fn flow(
        &mut self,
        sender: &Sender,
        key: FlowKey,
        role: Role,
    ) -> Result<Step, Reason> {
        let known = self.flows.get(&key).filter(|flow| is_live(sender, key.proto, flow));
        let opens = match role {
            Role::Opens => true,
            Role::Answers => false,
            Role::Segment(flags) => flags & (SYN | ACK) == SYN,
        };
        let known = match (role, known) {
            // The ports are free again.
            (Role::Segment(_), Some(flow)) if opens && flow.state == State::Closed => None,
            (_, known) => known.copied(),
        };
        let fresh = known.is_none();
        let flow = match (known, role) {
            (None, _) if !opens => return Err(Reason::NoFlow),
            (None, _) => Flow {
                seen: sender.now,
                begun: sender.now,
                packets: [0; 2],
                bytes: [0; 2],
                opener: sender.side,
                state: State::New,
                finished: 0,
                generation: 0,
            },
            (Some(flow), Role::Segment(flags)) => {
                connection(flow, flags, sender.side).ok_or(Reason::NoFlow)?
            }
            (Some(flow), _) if flow.opener == sender.side => flow,
            (Some(flow), _) => Flow { state: State::Answered, ..flow },
        };
        let flow = Flow { seen: sender.now, ..flow };
        match self.may_open(sender, &key, flow.opener) {
            Ok(()) => Ok(Step { key, flow, fresh }),
            Err(reason) => {
                self.deny(sender, key, flow, reason);
                Err(reason)
            }
        }
    }

    /// Writes down a packet of a flow, and tells of the flow's beginning and end.
    pub(super) fn record(&mut self, sender: &Sender, step: Step) {
        let Step { key, mut flow, fresh } = step;
        flow.packets[sender.side as usize] += 1;
        flow.bytes[sender.side as usize] += sender.length;
        let before = self.flows.insert(key, flow);
        let ended = flow.state == State::Closed
            && before.is_some_and(|before| before.state != State::Closed);
        if fresh {
            self.tell(sender, EventKind::Opened, key, flow);
        } else if ended {
            self.tell(sender, EventKind::Ended, key, flow);
        }
    }

    /// Remembers a refused attempt, which is the same from whichever port it is made, and tells the first.
    fn deny(&mut self, sender: &Sender, mut key: FlowKey, flow: Flow, reason: Reason) {
        match (key.proto, flow.opener) {
            (ICMP | ICMP6, _) | (_, Side::Vm) => key.local_port = 0,
            (_, Side::Peer) => key.remote_port = 0,
        }
        let (seen, opener) = (sender.now, flow.opener);
        let first = Denied { begun: seen, seen, packets: 0, reason, opener };
        let known = self.denials.get(&key);
        let known = known.filter(|known| !is_before(known.begun, sender.config.since));
        let before = known.copied();
        let denied = before.unwrap_or(first);
        self.denials.insert(key, Denied { seen, packets: denied.packets + 1, reason, ..denied });
        if before.is_none() {
            self.tell(sender, EventKind::Denied(reason), key, flow);
        }
    }

    fn tell(&mut self, sender: &Sender, kind: EventKind, key: FlowKey, flow: Flow) {
        let peer = self.tables.peer(key.remote).unwrap_or_default();
        let Identity { tenant: peer_tenant, service: peer_service, name, .. } = peer.identity;
        let (tenant, peer_pod, peer_name) = (sender.config.tenant, peer.pod, name);
        self.events.push(Event {
            kind,
            key,
            flow,
            tenant,
            peer_tenant,
            peer_service,
            peer_pod,
            peer_name,
        });
    }

    /// An ICMP error: let through if it tells its receiver about a packet that the receiver has sent in
    /// a known flow. It need not come from the flow's other end, but the policy about that end decides.
    pub(super) fn error(&self, sender: &Sender, packet: &Packet<'_>) -> Result<(), Reason> {
        if packet.piece != Piece::Whole {
            return Err(Reason::Fragment);
        }
        let quote = packet.body.get(8..).ok_or(Reason::Quote)?;
        let key = quoted(sender, packet, quote).ok_or(Reason::Quote)?;
        let flow = self.flows.get(&key).filter(|flow| is_live(sender, key.proto, flow));
        self.may_open(sender, &key, flow.ok_or(Reason::NoFlow)?.opener)
    }
}

/// What a segment makes of a connection; `None` if it has no place in it.
fn connection(flow: Flow, flags: u8, sender: Side) -> Option<Flow> {
    let (opens, accepts) = (flags & (SYN | ACK) == SYN, flags & (SYN | ACK) == SYN | ACK);
    let resets = flags & RST != 0;
    let answered = match (flow.state, sender == flow.opener) {
        // The opener repeats itself or gives up; the other accepts or refuses.
        (State::New, true) => (opens || resets).then_some(State::New),
        (State::New, false) if accepts => Some(State::Answered),
        (State::New, false) => resets.then_some(State::New),
        (state, true) => (!accepts).then_some(state),
        (state, false) => (!opens).then_some(state),
    }?;
    let finished = flow.finished | if flags & FIN != 0 { 1 << sender as u8 } else { 0 };
    let state = if resets || finished == 3 { State::Closed } else { answered };
    Some(Flow { state, finished, ..flow })
}

/// The flow of a quoted packet, whose author the error is sent to. Its first 8 bytes behind the IP header
/// are there; it has neither options nor extension headers.
fn quoted(sender: &Sender, packet: &Packet<'_>, quote: &[u8]) -> Option<FlowKey> {
    let ip = |at, length| -> Option<IpAddr> {
        let bytes = quote.get(at..at + length)?;
        match length {
            4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
            _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        }
    };
    let (source, destination, proto, body) = if packet.destination.is_ipv4() {
        let later = u16::from_be_bytes(field(quote, 6).ok()?) & 0x1FFF != 0;
        if *quote.first()? != 0x45 || later {
            return None;
        }
        (ip(12, 4)?, ip(16, 4)?, *quote.get(9)?, quote.get(20..)?)
    } else {
        if quote.first()? >> 4 != 6 {
            return None;
        }
        (ip(8, 16)?, ip(24, 16)?, *quote.get(6)?, quote.get(40..)?)
    };
    let [a, b, c, d, id @ .., _, _]: [u8; 8] = field(body, 0).ok()?;
    let author = sender.side.other();
    let (source_port, destination_port) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    if source != packet.destination {
        return None;
    }
    let asked = match (packet.destination, proto) {
        (_, TCP | UDP) => {
            return Some(sender.key_of(
                author,
                proto,
                (source, source_port),
                (destination, destination_port),
            ));
        }
        (IpAddr::V4(_), ICMP) if a == 8 => author,
        (IpAddr::V4(_), ICMP) if a == 0 => sender.side,
        (IpAddr::V6(_), ICMP6) if a == 128 => author,
        (IpAddr::V6(_), ICMP6) if a == 129 => sender.side,
        _ => return None,
    };
    let key = sender.key_of(author, proto, (source, 0), (destination, 0));
    Some(FlowKey { local_port: u16::from_be_bytes(id), echo: asked, ..key })
}

//! Who may open what to whom, and which packets belong to what was opened.

use std::net::IpAddr;
use std::time::Duration;

use super::packet::{ACK, FIN, ICMP, ICMP6, Packet, Piece, RST, SYN, TCP, UDP, field};
use super::{Attempt, Model, Sender, elapsed};
use crate::policy::Reason;
use crate::policy::abi::{Flow, FlowKey, Side, State};

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

fn is_live(proto: u8, flow: &Flow, now: u64) -> bool {
    elapsed(flow.seen, now) < lifetime(proto, flow.state)
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
    pub(super) fn flow(&mut self, sender: &Sender, key: FlowKey, role: Role) -> Result<(), Reason> {
        let known = self.flows.get(&key).filter(|flow| is_live(key.proto, flow, sender.now));
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
        let seen = sender.now;
        let next = match (known, role) {
            (None, _) if !opens => return Err(Reason::NoFlow),
            (None, _) => {
                let (opener, state) = (sender.side, State::New);
                let (packets, bytes) = ([0; 2], [0; 2]);
                Flow {
                    seen,
                    begun: seen,
                    packets,
                    bytes,
                    opener,
                    state,
                    finished: 0,
                    generation: 0,
                }
            }
            (Some(flow), Role::Segment(flags)) => {
                Flow { seen, ..connection(flow, flags, sender.side).ok_or(Reason::NoFlow)? }
            }
            (Some(flow), _) if flow.opener == sender.side => Flow { seen, ..flow },
            (Some(flow), _) => Flow { seen, state: State::Answered, ..flow },
        };
        self.may_open(sender, &key, next.opener)?;
        self.flows.insert(key, next);
        Ok(())
    }

    /// An ICMP error: let through if it tells its receiver about a packet that the receiver has sent in
    /// a known flow. It need not come from the flow's other end, but the policy about that end decides.
    pub(super) fn error(&self, sender: &Sender, packet: &Packet<'_>) -> Result<(), Reason> {
        if packet.piece != Piece::Whole {
            return Err(Reason::Fragment);
        }
        let quote = packet.body.get(8..).ok_or(Reason::Quote)?;
        let key = quoted(sender, packet, quote).ok_or(Reason::Quote)?;
        let flow = self.flows.get(&key).filter(|flow| is_live(key.proto, flow, sender.now));
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

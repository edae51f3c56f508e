//! What a frame says, as far as the policy asks: every length is checked before it is believed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::policy::Reason;

pub(in crate::policy) const ICMP: u8 = 1;
pub(in crate::policy) const TCP: u8 = 6;
pub(in crate::policy) const UDP: u8 = 17;
pub(in crate::policy) const ICMP6: u8 = 58;

pub(in crate::policy) const FIN: u8 = 1;
pub(in crate::policy) const SYN: u8 = 2;
pub(in crate::policy) const RST: u8 = 4;
pub(in crate::policy) const ACK: u8 = 16;

/// Extension headers before a fragment's or the transport's, at most.
const EXTENSIONS: usize = 4;
/// A later fragment must not overwrite the ports and flags that the first one was judged by, so it
/// begins behind the shortest TCP header: in units of 8 bytes.
const LOWEST_OFFSET: u16 = 3;

/// `bytes[at..at + N]`.
pub(super) fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Reason> {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or(Reason::Truncated)
}

fn short(bytes: &[u8], at: usize) -> Result<u16, Reason> {
    field(bytes, at).map(u16::from_be_bytes)
}

/// An Ethernet frame.
pub(super) struct Frame<'a> {
    pub(super) to: [u8; 6],
    pub(super) from: [u8; 6],
    pub(super) kind: u16,
    pub(super) body: &'a [u8],
}

impl<'a> Frame<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, Reason> {
        let (to, from) = (field(bytes, 0)?, field(bytes, 6)?);
        let kind = short(bytes, 12)?;
        Ok(Self { to, from, kind, body: &bytes[14..] })
    }
}

/// What is said about whether a packet is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    Whole,
    First { id: u32, more: bool },
    Later { id: u32 },
}

impl Piece {
    fn of(id: u32, offset: u16, more: bool, body: &[u8]) -> Result<Self, Reason> {
        if offset == 0 {
            return Ok(Self::First { id, more });
        }
        if offset < LOWEST_OFFSET || usize::from(offset) * 8 + body.len() > 0xFFFF {
            return Err(Reason::Fragment);
        }
        Ok(Self::Later { id })
    }
}

/// An IP packet; the frame may go on behind it.
pub(super) struct Packet<'a> {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) hops: u8,
    pub(super) piece: Piece,
    pub(super) proto: u8,
    pub(super) body: &'a [u8],
}

impl<'a> Packet<'a> {
    pub(super) fn ipv4(bytes: &'a [u8]) -> Result<Self, Reason> {
        let head: [u8; 20] = field(bytes, 0)?;
        let words = head[0] & 15;
        if head[0] >> 4 != 4 || words < 5 {
            return Err(Reason::Malformed);
        }
        // Some of them choose the packet's way; none is in use in a cluster.
        if words > 5 {
            return Err(Reason::Options);
        }
        let length = short(&head, 2)?.into();
        let body = bytes.get(20..length).ok_or(Reason::Malformed)?;
        let (id, flags) = (u32::from(short(&head, 4)?), short(&head, 6)?);
        let (more, offset) = (flags & 0x2000 != 0, flags & 0x1FFF);
        let piece = match (more, offset) {
            (false, 0) => Piece::Whole,
            _ => Piece::of(id, offset, more, body)?,
        };
        let address = |at| field::<4>(&head, at).map(|bytes| IpAddr::from(Ipv4Addr::from(bytes)));
        let (source, destination) = (address(12)?, address(16)?);
        Ok(Self { source, destination, hops: head[8], piece, proto: head[9], body })
    }

    pub(super) fn ipv6(bytes: &'a [u8]) -> Result<Self, Reason> {
        let head: [u8; 40] = field(bytes, 0)?;
        let length = usize::from(short(&head, 4)?);
        let body = bytes[40..].get(..length).ok_or(Reason::Malformed)?;
        if head[0] >> 4 != 6 {
            return Err(Reason::Malformed);
        }
        let address = |at| field::<16>(&head, at).map(|bytes| IpAddr::from(Ipv6Addr::from(bytes)));
        let (source, destination) = (address(8)?, address(24)?);
        let (mut proto, mut body) = extensions(head[6], body)?;
        let mut piece = Piece::Whole;
        if proto == 44 {
            let head: [u8; 8] = field(body, 0)?;
            let [proto_inside, _, high, low, id @ ..] = head;
            let place = u16::from_be_bytes([high, low]);
            (proto, body) = (proto_inside, &body[8..]);
            piece = Piece::of(u32::from_be_bytes(id), place >> 3, place & 1 != 0, body)?;
        }
        // A routing header names other destinations, and hop-by-hop options are the first or nowhere.
        // Behind a fragment's header there is the transport: later fragments could change what else
        // were there.
        if matches!(proto, 0 | 43 | 44 | 60) {
            return Err(Reason::Extension);
        }
        Ok(Self { source, destination, hops: head[7], piece, proto, body })
    }
}

/// Goes over hop-by-hop and destination options.
fn extensions(mut next: u8, mut body: &[u8]) -> Result<(u8, &[u8]), Reason> {
    for index in 0..EXTENSIONS {
        if next != 60 && (next != 0 || index > 0) {
            break;
        }
        let [then, length] = field(body, 0)?;
        body = body.get(8 * (usize::from(length) + 1)..).ok_or(Reason::Truncated)?;
        next = then;
    }
    Ok((next, body))
}

/// Source and destination port.
pub(super) type Ports = (u16, u16);

/// The ports and flags of a TCP header.
pub(super) fn tcp(body: &[u8]) -> Result<(Ports, u8), Reason> {
    let head: [u8; 20] = field(body, 0)?;
    let length = usize::from(head[12] >> 4) * 4;
    if length < 20 || length > body.len() {
        return Err(Reason::Malformed);
    }
    let flags = head[13] & (FIN | SYN | RST | ACK);
    let possible =
        if flags & SYN != 0 { flags & (FIN | RST) == 0 } else { flags & (RST | ACK) != 0 };
    if !possible {
        return Err(Reason::TcpFlags);
    }
    Ok(((short(&head, 0)?, short(&head, 2)?), flags))
}

/// The ports of a UDP header.
pub(super) fn udp(body: &[u8], piece: Piece) -> Result<Ports, Reason> {
    let head: [u8; 8] = field(body, 0)?;
    let length = usize::from(short(&head, 4)?);
    let partial = matches!(piece, Piece::First { more: true, .. });
    if length < 8 || (!partial && length > body.len()) {
        return Err(Reason::Malformed);
    }
    Ok((short(&head, 0)?, short(&head, 2)?))
}

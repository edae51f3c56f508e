//! What keeps a link working and needs no policy: ARP, neighbour discovery, and multicast listeners'
//! reports. A pod says of itself only what is true; to it comes what is well-formed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::packet::{Packet, Piece, field};
use super::{Model, Sender};
use crate::policy::Reason;
use crate::policy::abi::Side;

/// Options of a message, at most.
const OPTIONS: usize = 2;

impl Model {
    pub(super) fn arp(&self, sender: &Sender, body: &[u8]) -> Result<(), Reason> {
        let message: [u8; 28] = field(body, 0)?;
        // Ethernet, IPv4, the lengths of their addresses; a request or an answer.
        let request = match message[..8] {
            [0, 1, 8, 0, 6, 4, 0, 1] => true,
            [0, 1, 8, 0, 6, 4, 0, 2] => false,
            _ => return Err(Reason::Arp),
        };
        if sender.side == Side::Peer {
            return Ok(());
        }
        let ip = |at| field::<4>(&message, at).map(Ipv4Addr::from);
        let mut claimed = ip(14)?;
        // A probe whether an address is taken is from nobody; it has to be about the pod's own.
        if request && claimed.is_unspecified() {
            claimed = ip(24)?;
        }
        let mac: [u8; 6] = field(&message, 8)?;
        if mac != sender.config.mac || !self.is_own(sender.pod, claimed.into()) {
            return Err(Reason::SpoofedArp);
        }
        Ok(())
    }

    /// ICMPv6 messages 130 to 137 and 143.
    pub(super) fn link(&self, sender: &Sender, packet: &Packet<'_>) -> Result<(), Reason> {
        let [kind, code] = field(packet.body, 0)?;
        let (query, report2, solicit_router) = (130, 143, 133);
        let (advertise_router, solicit, advertise, redirect) = (134, 135, 136, 137);
        // Pods know their routes from the node.
        if kind == advertise_router || kind == redirect {
            return Err(Reason::Router);
        }
        // RFC 6980.
        if packet.piece != Piece::Whole {
            return Err(Reason::Fragment);
        }
        let expected = match sender.side {
            Side::Vm => kind != query,
            Side::Peer => [query, solicit, advertise].contains(&kind),
        };
        if !expected {
            return Err(Reason::IcmpType);
        }
        let length = if kind == solicit_router || kind == report2 { 8 } else { 24 };
        if packet.body.len() < length {
            return Err(Reason::Truncated);
        }
        if kind < solicit_router || kind == report2 {
            let fine = packet.hops == 1 && packet.destination.is_multicast();
            return if fine { Ok(()) } else { Err(Reason::Neighbour) };
        }
        // Only who is on the link can send with as many hops left.
        if packet.hops != 255 || code != 0 {
            return Err(Reason::Neighbour);
        }
        if sender.side == Side::Peer {
            return Ok(());
        }
        let nameless = packet.source.is_unspecified();
        if nameless && kind == advertise {
            return Err(Reason::SpoofedAddress);
        }
        // Who advertises an address, or asks whether it may take it, claims it.
        if kind == advertise || (nameless && kind == solicit) {
            let target: IpAddr = Ipv6Addr::from(field::<16>(packet.body, 8)?).into();
            if !self.is_own(sender.pod, target) {
                return Err(Reason::SpoofedNeighbour);
            }
        }
        options(sender, nameless, &packet.body[length..])
    }
}

fn options(sender: &Sender, nameless: bool, mut rest: &[u8]) -> Result<(), Reason> {
    for _ in 0..OPTIONS {
        let Some([kind, length, mac @ ..]) = rest.first_chunk::<8>() else { break };
        match (kind, length) {
            (_, 0) => return Err(Reason::Neighbour),
            // The source's or the target's hardware address.
            (1 | 2, 1) if nameless || *mac != sender.config.mac => {
                return Err(Reason::SpoofedNeighbour);
            }
            (1 | 2 | 14, 1) => {}
            _ => return Err(Reason::Neighbour),
        }
        rest = rest.get(8 * usize::from(*length)..).ok_or(Reason::Neighbour)?;
    }
    if rest.is_empty() { Ok(()) } else { Err(Reason::Neighbour) }
}

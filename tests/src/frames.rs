//! Ethernet frames with a UDP datagram, made and told by hand.

use std::net::IpAddr;

/// As much of a frame as [`udp_port`] looks at.
pub const HEADERS: usize = 14 + 40 + 8;
const IP4: [u8; 2] = [8, 0];
const IP6: [u8; 2] = [0x86, 0xDD];
const UDP: u8 = 17;

/// A datagram from a port to the same one, between hardware addresses. Both addresses are of one family.
#[must_use]
pub fn datagram(macs: ([u8; 6], [u8; 6]), from: IpAddr, to: IpAddr, port: u16) -> Vec<u8> {
    let payload = b"datagram";
    let length = (8 + payload.len()) as u16;
    let mut udp = [port, port, length, 0].map(u16::to_be_bytes).concat();
    udp.extend(payload);
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let addresses = [octets(from), octets(to)].concat();
    let pseudo = [&addresses[..], &[0, UDP], &length.to_be_bytes()[..]].concat();
    let sum = checksum(&[&pseudo[..], &udp[..]].concat());
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    let (kind, mut header) = match from {
        IpAddr::V4(_) => {
            let total = (20 + length).to_be_bytes();
            (IP4, [0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, UDP, 0, 0].to_vec())
        }
        IpAddr::V6(_) => {
            let [high, low] = length.to_be_bytes();
            (IP6, [0x60, 0, 0, 0, high, low, UDP, 64].to_vec())
        }
    };
    header.extend(addresses);
    if kind == IP4 {
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    [&macs.1[..], &macs.0, &kind, &header, &udp].concat()
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !(sum as u16)
}

/// The port to which a frame's datagram goes, if it is one without options or fragments.
#[must_use]
pub fn udp_port(frame: &[u8]) -> Option<u16> {
    let (kind, packet) = (frame.get(12..14)?, frame.get(14..)?);
    let (protocol, header) = match kind {
        kind if kind == IP4 => (*packet.get(9)?, 20),
        kind if kind == IP6 => (*packet.get(6)?, 40),
        _ => return None,
    };
    let port = packet.get(header + 2..header + 4).filter(|_| protocol == UDP)?;
    Some(u16::from_be_bytes([port[0], port[1]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_is_told() {
        for (from, to) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let frame = datagram(([2; 6], [4; 6]), from, to, 9999);
            assert_eq!(udp_port(&frame), Some(9999));
            assert_eq!(udp_port(&frame[..HEADERS.min(frame.len())]), Some(9999));
            assert_eq!(udp_port(&frame[..20]), None);
        }
    }
}

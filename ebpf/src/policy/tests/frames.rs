//! Frames, built a header at a time. Lengths are right unless a test makes them wrong afterwards.

use std::net::IpAddr;

pub(super) use crate::policy::model::packet::{ACK, FIN, ICMP, ICMP6, RST, SYN, TCP, UDP};

pub(super) type Mac = [u8; 6];

pub(super) const ARP: u16 = 0x0806;
pub(super) const IPV4: u16 = 0x0800;
pub(super) const IPV6: u16 = 0x86DD;
/// Where what follows the Ethernet header begins.
pub(super) const IP: usize = 14;

pub(super) const PSH: u8 = 8;

pub(super) fn ethernet(to: Mac, from: Mac, kind: u16, body: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), body].concat()
}

/// An IP packet of the addresses' family; `id`, `offset` (in bytes) and `more` are a fragment's.
#[derive(Clone, Copy)]
pub(super) struct Ip {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) proto: u8,
    pub(super) hops: u8,
    pub(super) fragment: Option<(u32, u16, bool)>,
}

impl Ip {
    pub(super) fn new(source: IpAddr, destination: IpAddr, proto: u8) -> Self {
        Self { source, destination, proto, hops: 64, fragment: None }
    }

    pub(super) fn hops(self, hops: u8) -> Self {
        Self { hops, ..self }
    }

    pub(super) fn fragment(self, id: u32, offset: u16, more: bool) -> Self {
        Self { fragment: Some((id, offset, more)), ..self }
    }

    pub(super) fn kind(&self) -> u16 {
        if self.source.is_ipv4() { IPV4 } else { IPV6 }
    }

    pub(super) fn packet(self, body: &[u8]) -> Vec<u8> {
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let (id, offset, more) = self.fragment.unwrap_or_default();
                let flags = (offset / 8) | if more { 0x2000 } else { 0 };
                let length = (20 + body.len()) as u16;
                let mut head = vec![0x45, 0];
                head.extend(length.to_be_bytes());
                head.extend((id as u16).to_be_bytes());
                head.extend(flags.to_be_bytes());
                head.extend([self.hops, self.proto, 0, 0]);
                head.extend(source.octets());
                head.extend(destination.octets());
                head.extend(body);
                head
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut inside = Vec::new();
                if let Some((id, offset, more)) = self.fragment {
                    inside.extend([self.proto, 0]);
                    inside.extend((offset | u16::from(more)).to_be_bytes());
                    inside.extend(id.to_be_bytes());
                }
                inside.extend(body);
                let next = if self.fragment.is_some() { 44 } else { self.proto };
                let mut head = vec![0x60, 0, 0, 0];
                head.extend((inside.len() as u16).to_be_bytes());
                head.extend([next, self.hops]);
                head.extend(source.octets());
                head.extend(destination.octets());
                head.extend(inside);
                head
            }
            mixed => panic!("addresses of two families: {mixed:?}"),
        }
    }
}

pub(super) fn tcp(source: u16, destination: u16, flags: u8) -> Vec<u8> {
    let mut head = Vec::new();
    head.extend(source.to_be_bytes());
    head.extend(destination.to_be_bytes());
    head.extend([0; 8]);
    head.extend([0x50, flags, 1, 0, 0, 0, 0, 0]);
    head
}

pub(super) fn udp(source: u16, destination: u16, data: &[u8]) -> Vec<u8> {
    let mut head = Vec::new();
    for field in [source, destination, (8 + data.len()) as u16, 0] {
        head.extend(field.to_be_bytes());
    }
    head.extend(data);
    head
}

/// A message of ICMP or ICMPv6 whose second word is `id` and a sequence number.
pub(super) fn icmp(kind: u8, id: u16, data: &[u8]) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    [&[kind, 0, 0, 0, high, low, 0, 1][..], data].concat()
}

pub(super) fn arp(operation: u16, sender: (Mac, [u8; 4]), target: (Mac, [u8; 4])) -> Vec<u8> {
    let head = [&[0, 1, 8, 0, 6, 4][..], &operation.to_be_bytes()].concat();
    [&head[..], &sender.0, &sender.1, &target.0, &target.1].concat()
}

/// A message of neighbour discovery about `target`, if it has one.
pub(super) fn discovery(kind: u8, target: Option<&str>, options: &[u8]) -> Vec<u8> {
    let target = target.map(|target| match target.parse().unwrap() {
        IpAddr::V6(target) => target.octets().to_vec(),
        IpAddr::V4(target) => panic!("{target} is IPv4"),
    });
    [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target.unwrap_or_default(), options].concat()
}

/// An option that tells a hardware address.
pub(super) fn link_option(kind: u8, mac: Mac) -> Vec<u8> {
    [&[kind, 1][..], &mac].concat()
}

/// With some bytes replaced.
pub(super) fn with(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

/// Whether BPF_PROG_TEST_RUN takes it: a kernel as of Linux 6.18 wants the IP header whole. The `wire`
/// tests send the others through a device.
pub(super) fn runs(frame: &[u8]) -> bool {
    let shortest = match frame.get(12..14) {
        Some([0x08, 0x00]) => IP + 20,
        Some([0x86, 0xDD]) => IP + 40,
        _ => IP + 1,
    };
    frame.len() >= shortest
}

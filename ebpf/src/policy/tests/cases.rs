//! The node that the table's cases are about, and what its pods send.

use std::net::IpAddr;

use super::frames::*;
use super::{World, ip};
use crate::policy::abi::{Allow, Identity, Pod, Service, Side};

/// The pod on this node, and another machine on its link.
pub(super) const POD: Mac = [2, 0, 0, 0, 0, 1];
pub(super) const OTHER: Mac = [2, 0, 0, 0, 0, 2];
pub(super) const ALL: Mac = [0xFF; 6];

const RED: u32 = 10;
const BLUE: u32 = 20;
const GREEN: u32 = 30;
/// Classes of services: the cluster's, and the nodes.
const CLUSTER: u32 = 1;
const NODE: u32 = 2;

/// The addresses of one family.
#[derive(Clone, Copy)]
pub(super) struct Net {
    pub(super) own: IpAddr,
    /// Of the same tenant.
    pub(super) friend: IpAddr,
    /// Of another tenant, to whom TCP 80 is allowed.
    pub(super) blue: IpAddr,
    /// Of another tenant, who may open UDP to the pod.
    pub(super) green: IpAddr,
    /// With TCP and UDP 53.
    pub(super) cluster: IpAddr,
    /// May open TCP to pods, and ask for echo.
    pub(super) node: IpAddr,
    pub(super) unknown: IpAddr,
    pub(super) group: IpAddr,
    pub(super) icmp: u8,
    pub(super) ask: u8,
    pub(super) answer: u8,
    pub(super) unreachable: u8,
}

pub(super) fn nets() -> [Net; 2] {
    [
        Net {
            own: ip("10.0.0.1"),
            friend: ip("10.0.0.2"),
            blue: ip("10.0.0.3"),
            green: ip("10.0.0.4"),
            cluster: ip("10.96.0.10"),
            node: ip("192.168.0.7"),
            unknown: ip("8.8.8.8"),
            group: ip("224.0.0.5"),
            icmp: ICMP,
            ask: 8,
            answer: 0,
            unreachable: 3,
        },
        Net {
            own: ip("fd00::1"),
            friend: ip("fd00::2"),
            blue: ip("fd00::3"),
            green: ip("fd00::4"),
            cluster: ip("fd96::10"),
            node: ip("fd16::7"),
            unknown: ip("2001:db8::8"),
            group: ip("ff02::5"),
            icmp: ICMP6,
            ask: 128,
            answer: 129,
            unreachable: 1,
        },
    ]
}

/// Pod 1, of RED, and the policy about it; pod 3 has no IPv6 and pod 4 no IPv4.
pub(super) fn node(world: &mut World) {
    let mut own: Vec<_> = nets().iter().map(|net| net.own).collect();
    own.push(ip("fe80::1"));
    world.pod(1, Pod { tenant: RED, mac: POD }, &own);
    world.pod(2, Pod { tenant: BLUE, mac: OTHER }, &nets().map(|net| net.blue));
    world.pod(3, Pod { tenant: 0, mac: OTHER }, &[ip("10.0.0.9")]);
    world.pod(4, Pod { tenant: RED, mac: POD }, &[nets()[1].own]);
    for net in nets() {
        let (all, some) = if net.own.is_ipv4() { (32, 24) } else { (128, 64) };
        let of = |tenant| Identity { tenant, service: 0 };
        world.identity(net.own, all, of(RED));
        world.identity(net.friend, all, of(RED));
        world.identity(net.blue, all, of(BLUE));
        world.identity(net.green, all, of(GREEN));
        world.identity(net.cluster, all, Identity { tenant: 0, service: CLUSTER });
        world.identity(net.node, some, Identity { tenant: 0, service: NODE });
        for proto in [TCP, UDP] {
            world.service(Service { class: CLUSTER, proto, port: 53, opener: Side::Vm });
        }
        world.service(Service { class: NODE, proto: TCP, port: 0, opener: Side::Peer });
        world.service(Service { class: NODE, proto: net.icmp, port: 0, opener: Side::Peer });
    }
    // The most specific prefix decides: 10.1.0.0/16 is BLUE's, 10.1.2.0/24 in it RED's.
    world.identity(ip("10.1.0.0"), 16, Identity { tenant: BLUE, service: 0 });
    world.identity(ip("10.1.2.0"), 24, Identity { tenant: RED, service: 0 });
    world.identity(ip("fd01::"), 32, Identity { tenant: BLUE, service: 0 });
    world.identity(ip("fd01::2:0"), 112, Identity { tenant: RED, service: 0 });
    // Nobody's.
    world.identity(ip("10.2.0.0"), 16, Identity { tenant: 0, service: 0 });
    world.allow(web());
    world.allow(Allow { from: GREEN, to: RED, proto: UDP, port: 0 });
}

/// What RED may open to BLUE.
pub(super) fn web() -> Allow {
    Allow { from: RED, to: BLUE, proto: TCP, port: 80 }
}

/// A frame that the pod sends.
pub(super) fn out(ip: Ip, body: &[u8]) -> Vec<u8> {
    ethernet(OTHER, POD, ip.kind(), &ip.packet(body))
}

/// A frame that comes to the pod.
pub(super) fn into(ip: Ip, body: &[u8]) -> Vec<u8> {
    ethernet(POD, OTHER, ip.kind(), &ip.packet(body))
}

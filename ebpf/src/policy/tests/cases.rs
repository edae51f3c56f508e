//! The node that the table's cases are about, and what its pods send.

use std::net::IpAddr;

use super::frames::*;
use super::{World, ip, pod, port};
use crate::policy::abi::{Identity, Ports, Scope, Side};

/// The pod on this node, and another machine on its link.
pub(super) const POD: Mac = [2, 0, 0, 0, 0, 1];
pub(super) const OTHER: Mac = [2, 0, 0, 0, 0, 2];
pub(super) const ALL: Mac = [0xFF; 6];

const RED: u32 = 10;
const BLUE: u32 = 20;
const GREEN: u32 = 30;
/// Classes of services: the cluster's, and that of other nodes.
const CLUSTER: u32 = 5;
const NODES: u32 = 6;

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
    world.pod(1, pod(RED, POD), &own);
    world.pod(2, pod(BLUE, OTHER), &nets().map(|net| net.blue));
    world.pod(3, pod(0, OTHER), &[ip("10.0.0.9")]);
    world.pod(4, pod(RED, POD), &[nets()[1].own]);
    let of = |tenant| Identity { tenant, ..Identity::default() };
    for net in nets() {
        let (all, some) = if net.own.is_ipv4() { (32, 24) } else { (128, 64) };
        world.identity(net.own, all, of(RED));
        world.identity(net.friend, all, of(RED));
        world.identity(net.blue, all, of(BLUE));
        world.identity(net.green, all, of(GREEN));
        world.identity(net.cluster, all, Identity { service: CLUSTER, ..Identity::default() });
        world.identity(net.node, some, Identity { service: NODES, ..Identity::default() });
        for proto in [TCP, UDP] {
            let scope = Scope::Service { class: CLUSTER, opener: Side::Vm };
            world.allow(scope, port(proto, 53));
        }
        let scope = Scope::Service { class: NODES, opener: Side::Peer };
        world.allow(scope, Ports::Protocol(TCP));
        world.allow(scope, Ports::Protocol(net.icmp));
    }
    // The most specific prefix decides: 10.1.0.0/16 is BLUE's, 10.1.2.0/24 in it RED's.
    world.identity(ip("10.1.0.0"), 16, of(BLUE));
    world.identity(ip("10.1.2.0"), 24, of(RED));
    world.identity(ip("fd01::"), 32, of(BLUE));
    world.identity(ip("fd01::2:0"), 112, of(RED));
    // Nobody's.
    world.identity(ip("10.2.0.0"), 16, of(0));
    let (scope, ports) = web();
    world.allow(scope, ports);
    world.allow(Scope::Tenants { from: GREEN, to: RED }, Ports::Protocol(UDP));
}

/// What RED may open to BLUE.
pub(super) fn web() -> (Scope, Ports) {
    (Scope::Tenants { from: RED, to: BLUE }, port(TCP, 80))
}

/// A frame that the pod sends.
pub(super) fn out(ip: Ip, body: &[u8]) -> Vec<u8> {
    ethernet(OTHER, POD, ip.kind(), &ip.packet(body))
}

/// A frame that comes to the pod.
pub(super) fn into(ip: Ip, body: &[u8]) -> Vec<u8> {
    ethernet(POD, OTHER, ip.kind(), &ip.packet(body))
}

//! The rules, case by case: what is sent, in order, and what becomes of it. Programs and model have to
//! say the same, and what the table says.

use super::cases::*;
use super::frames::*;
use super::{Decision, World, ip, tell};
use crate::policy::Reason::{self, *};
use crate::policy::abi::{PodId, Side};

/// Runs cases and counts packets.
pub(super) struct Table {
    pub(super) world: World,
    packets: usize,
}

impl Table {
    pub(super) fn new(what: &str) -> Option<Self> {
        let mut world = World::new(what)?;
        node(&mut world);
        Some(Self { world, packets: 0 })
    }

    pub(super) fn sent(
        &mut self,
        sender: Side,
        pod: PodId,
        name: &str,
        frame: &[u8],
        expected: Decision,
    ) {
        let (program, model) = self.world.judge(sender, pod, frame);
        assert_eq!(program, expected, "the program about {name}: {frame:02x?}");
        assert_eq!(model, expected, "the model about {name}: {frame:02x?}");
        self.packets += 1;
    }

    /// What the pod sends.
    pub(super) fn sends(&mut self, name: &str, frame: Vec<u8>, expected: impl IntoDecision) {
        self.sent(Side::Vm, 1, name, &frame, expected.decision());
    }

    /// What comes to the pod.
    pub(super) fn gets(&mut self, name: &str, frame: Vec<u8>, expected: impl IntoDecision) {
        self.sent(Side::Peer, 1, name, &frame, expected.decision());
    }

    /// Both ways, with the same outcome.
    pub(super) fn both(
        &mut self,
        name: &str,
        ip: Ip,
        body: &[u8],
        expected: impl IntoDecision + Copy,
    ) {
        let back = Ip { source: ip.destination, destination: ip.source, ..ip };
        self.sends(name, out(ip, body), expected);
        self.gets(name, into(back, body), expected);
    }

    pub(super) fn end(mut self, least: usize) {
        self.world.compare_flows();
        self.world.compare_counters();
        self.world.compare_events();
        tell(&format!("{} packets in the table", self.packets));
        assert!(self.packets >= least, "{} packets", self.packets);
    }
}

/// Lets cases say `Yes` or a reason.
pub(super) trait IntoDecision {
    fn decision(self) -> Decision;
}

#[derive(Clone, Copy)]
pub(super) struct Yes;

impl IntoDecision for Yes {
    fn decision(self) -> Decision {
        Ok(())
    }
}

impl IntoDecision for Reason {
    fn decision(self) -> Decision {
        Err(self)
    }
}

fn syn() -> Vec<u8> {
    tcp(1000, 80, SYN)
}

#[test]
fn frames_that_are_no_ip() {
    let Some(mut t) = Table::new("the policy's table of frames") else { return };
    let ip4 = Ip::new(nets()[0].own, nets()[0].friend, TCP);
    let good = out(ip4, &syn());
    t.sent(Side::Vm, 7, "a pod that is not known", &good, Err(NoPod));
    t.sent(Side::Peer, 7, "a pod that is not known", &good, Err(NoPod));
    t.sent(Side::Vm, 0, "no pod", &good, Err(NoPod));
    t.sent(Side::Vm, 0xFFFF, "the last pod", &good, Err(NoPod));
    t.sends("a good frame", good.clone(), Yes);
    for at in 6..12 {
        t.sends("another MAC", with(good.clone(), at, &[good[at] ^ 1]), SpoofedMac);
    }
    for kind in [0x8100_u16, 0x88A8] {
        let tagged = [&[0, 5, 8, 0][..], &ip4.packet(&syn())].concat();
        t.sends("a VLAN tag", ethernet(OTHER, POD, kind, &tagged), Vlan);
        t.gets("a VLAN tag", ethernet(POD, OTHER, kind, &tagged), Vlan);
    }
    // PPPoE, MPLS, LLDP, EAPOL, MACsec, LLC, and old double tags.
    for kind in [0x8863_u16, 0x8864, 0x8847, 0x88CC, 0x888E, 0x88E5, 0x0040, 0x05DC, 0x9100, 0] {
        t.sends("another protocol", ethernet(OTHER, POD, kind, &[0; 46]), EtherType);
        t.gets("another protocol", ethernet(POD, OTHER, kind, &[0; 46]), EtherType);
    }
    let back = Ip::new(nets()[0].friend, nets()[0].own, TCP).packet(&syn());
    t.gets("to another MAC", ethernet(OTHER, OTHER, IPV4, &back), NotForPod);
    t.gets("to all", ethernet(ALL, OTHER, IPV4, &back), Yes);
    t.gets("to a group", ethernet([1, 0, 0x5E, 0, 0, 1], OTHER, IPV4, &back), Yes);
    t.end(35);
}

#[test]
fn arp_tells_the_truth() {
    let Some(mut t) = Table::new("the policy's table of ARP") else { return };
    let (own, friend, none) = ([10, 0, 0, 1], [10, 0, 0, 2], [0; 4]);
    let out = |body: &[u8]| ethernet(ALL, POD, ARP, body);
    let into = |body: &[u8]| ethernet(POD, OTHER, ARP, body);
    let ask = arp(1, (POD, own), ([0; 6], friend));
    for operation in [1, 2] {
        let said = |who, whom| arp(operation, who, whom);
        t.sends("an own address", out(&said((POD, own), (OTHER, friend))), Yes);
        t.sends("to itself", out(&said((POD, own), (POD, own))), Yes);
        t.sends("another's MAC", out(&said((OTHER, own), (OTHER, friend))), SpoofedArp);
        t.sends("another's address", out(&said((POD, friend), (OTHER, own))), SpoofedArp);
        t.sends("another's both", out(&said((OTHER, friend), (POD, own))), SpoofedArp);
        t.gets("from the link", into(&said((OTHER, friend), (POD, own))), Yes);
        t.gets(
            "from the link to all",
            ethernet(ALL, OTHER, ARP, &said((OTHER, friend), (POD, own))),
            Yes,
        );
    }
    t.sends("a probe", out(&arp(1, (POD, none), ([0; 6], own))), Yes);
    t.sends("a probe of another's", out(&arp(1, (POD, none), ([0; 6], friend))), SpoofedArp);
    t.sends("an answer from none", out(&arp(2, (POD, none), (POD, own))), SpoofedArp);
    t.sends("a probe by another", out(&arp(1, (OTHER, none), ([0; 6], own))), SpoofedArp);
    let wrong: [(usize, &[u8]); 9] = [
        (0, &[0, 6]),
        (0, &[1, 0]),
        (2, &[0x86, 0xDD]),
        (4, &[8]),
        (5, &[16]),
        (6, &[0, 0]),
        (6, &[0, 3]),
        (6, &[0, 8]),
        (6, &[1, 1]),
    ];
    for (at, bytes) in wrong {
        t.sends("malformed ARP", out(&with(ask.clone(), at, bytes)), Arp);
        t.gets("malformed ARP", into(&with(ask.clone(), at, bytes)), Arp);
    }
    for length in [1, 2, 6, 7, 8, 13, 14, 17, 18, 23, 24, 27] {
        t.sends("cut ARP", out(&ask[..length]), Truncated);
        t.gets("cut ARP", into(&ask[..length]), Truncated);
    }
    t.sends("padded ARP", out(&[&ask[..], &[0; 18]].concat()), Yes);
    t.end(60);
}

#[test]
fn headers_that_are_cut_or_wrong() {
    let Some(mut t) = Table::new("the policy's table of headers") else { return };
    for net in nets() {
        let v4 = net.own.is_ipv4();
        let head = if v4 { 20 } else { 40 };
        let echo = icmp(net.ask, 7, &[0; 16]);
        let bodies = [(TCP, syn(), 20), (UDP, udp(1000, 53, &[0; 16]), 8), (net.icmp, echo, 8)];
        for (proto, body, shortest) in bodies {
            let ip = Ip::new(net.own, net.friend, proto);
            let whole = out(ip, &body);
            t.sends("whole", whole.clone(), Yes);
            t.sends("padded", [&whole[..], &[0; 20]].concat(), Yes);
            for length in [0, 1, 4, 7, 8, 12, 19] {
                let cut = whole[..IP + head + length].to_vec();
                t.sends("shorter than it says", cut, Malformed);
                if length < shortest {
                    t.both("cut header", ip, &body[..length], Truncated);
                    let padded = [&out(ip, &body[..length])[..], &[0; 40]].concat();
                    t.sends("cut header, padded", padded, Truncated);
                }
            }
        }
        // Lengths.
        let ip = Ip::new(net.own, net.friend, TCP);
        let good = out(ip, &syn());
        for words in [0, 1, 4] {
            let body = with(syn(), 12, &[words << 4]);
            t.both("a short TCP header", ip, &body, Malformed);
        }
        t.both("a long TCP header", ip, &with(syn(), 12, &[0x60]), Malformed);
        t.both("the longest TCP header", ip, &with(syn(), 12, &[0xF0]), Malformed);
        let options = [&with(syn(), 12, &[0x60])[..], &[2, 4, 5, 0xB4]].concat();
        t.both("TCP options", ip, &options, Yes);
        t.world.forget();
        for length in [0_u16, 7, 9, 0xFFFF] {
            let body = with(udp(1000, 53, &[]), 4, &length.to_be_bytes());
            t.both("a wrong UDP length", Ip::new(net.own, net.friend, UDP), &body, Malformed);
        }
        if v4 {
            for version in [0x05, 0x35, 0x55, 0x65, 0x40, 0x41, 0x44] {
                t.sends("a wrong version", with(good.clone(), IP, &[version]), Malformed);
            }
            for version in [0x46, 0x4F] {
                t.sends("options", with(good.clone(), IP, &[version]), Options);
            }
            for length in [0_u16, 19, 41, 0xFFFF] {
                t.sends(
                    "a wrong length",
                    with(good.clone(), IP + 2, &length.to_be_bytes()),
                    Malformed,
                );
            }
            t.sends("length 20", with(good.clone(), IP + 2, &20_u16.to_be_bytes()), Truncated);
            t.sends("IPv6 as IPv4", ethernet(OTHER, POD, IPV4, &[0x60; 60]), Malformed);
        } else {
            for version in [0x00, 0x40, 0x45, 0x50, 0x70, 0xF0] {
                t.sends("a wrong version", with(good.clone(), IP, &[version]), Malformed);
            }
            for length in [21_u16, 0xFFFF] {
                t.sends(
                    "a wrong length",
                    with(good.clone(), IP + 4, &length.to_be_bytes()),
                    Malformed,
                );
            }
            t.sends("length 0", with(good.clone(), IP + 4, &[0, 0]), Truncated);
        }
        // Protocols: hop-by-hop alone, IGMP, IPIP, the other family's ICMP, GRE, ESP, AH, none, SCTP.
        let other = if v4 { ICMP6 } else { ICMP };
        for proto in [2, 4, 41, 47, 50, 51, 59, 132, 136, 255, other] {
            t.both("another protocol", Ip::new(net.own, net.friend, proto), &[0; 24], Protocol);
        }
        for flags in [0, FIN, PSH, SYN | FIN, SYN | RST, SYN | ACK | FIN, FIN | PSH | 32, 0xFF] {
            t.both("impossible flags", ip, &tcp(1000, 80, flags), TcpFlags);
        }
        // ECN's and PSH do not matter.
        t.both("more flags", ip, &tcp(1001, 80, SYN | 0xC0), Yes);
        t.world.forget();
    }
    t.end(250);
}

#[test]
fn addresses_are_the_pods() {
    let Some(mut t) = Table::new("the policy's table of addresses") else { return };
    for net in nets() {
        let v4 = net.own.is_ipv4();
        let mut foreign = vec![net.friend, net.blue, net.node, net.unknown, net.group];
        foreign.extend(if v4 {
            ["0.0.0.0", "127.0.0.1", "255.255.255.255", "10.0.0.9", "1.0.0.10"].map(ip)
        } else {
            ["::", "::1", "::ffff:10.0.0.1", "fe80::2", "fd00::1:1"].map(ip)
        });
        for source in foreign {
            for proto in [TCP, UDP] {
                let ip = Ip::new(source, net.friend, proto);
                let body = if proto == TCP { syn() } else { udp(1, 2, &[]) };
                t.sends("spoofed", out(ip, &body), SpoofedAddress);
                t.sends("spoofed, in pieces", out(ip.fragment(1, 0, true), &body), SpoofedAddress);
                t.sends("spoofed, later", out(ip.fragment(1, 24, false), &body), SpoofedAddress);
                t.gets(
                    "to another",
                    into(Ip::new(net.friend, source, proto), &body),
                    if source == net.group || source == self::ip("255.255.255.255") {
                        Ok(())
                    } else {
                        Err(NotForPod)
                    },
                );
            }
            let echo = out(Ip::new(source, net.friend, net.icmp), &icmp(net.ask, 1, &[]));
            t.sends("spoofed echo", echo, SpoofedAddress);
        }
        t.world.forget();
        t.sent(
            Side::Vm,
            2,
            "pod 2 as pod 1",
            &ethernet(
                POD,
                OTHER,
                if v4 { IPV4 } else { IPV6 },
                &Ip::new(net.own, net.blue, TCP).packet(&syn()),
            ),
            Err(SpoofedAddress),
        );
        t.sends(
            "to a group of nobody",
            out(Ip::new(net.own, net.group, UDP), &udp(1, 2, &[])),
            Unknown,
        );
    }
    // Who has no address of a family has not the one that stands for none.
    let none = Ip::new(ip("0.0.0.0"), nets()[0].friend, UDP);
    t.sent(Side::Vm, 4, "no IPv4", &out(none, &udp(1, 2, &[])), Err(SpoofedAddress));
    let probe = ethernet(ALL, POD, ARP, &arp(1, (POD, [0; 4]), (POD, [0; 4])));
    t.sent(Side::Vm, 4, "a probe of none", &probe, Err(SpoofedArp));
    let none = Ip::new(ip("::"), nets()[1].friend, UDP).packet(&udp(1, 2, &[]));
    let frame = ethernet(POD, OTHER, IPV6, &none);
    t.sent(Side::Vm, 3, "no IPv6", &frame, Err(SpoofedAddress));
    for (server, client, net) in [(67, 68, nets()[0]), (547, 546, nets()[1])] {
        let ip = Ip::new(net.own, net.friend, UDP);
        t.sends("a DHCP answer", out(ip, &udp(server, client, &[])), Dhcp);
        t.sends("a DHCP answer elsewhere", out(ip, &udp(server, 9, &[])), Dhcp);
        t.sends("a DHCP answer from elsewhere", out(ip, &udp(9, client, &[])), Dhcp);
        t.sends("no answer", out(ip, &udp(client, server, &[])), Yes);
        let back = Ip::new(net.friend, net.own, UDP);
        t.gets("from a friend", into(back, &udp(server, client, &[])), Yes);
        t.sends(
            "TCP is none",
            out(Ip::new(net.own, net.friend, TCP), &tcp(server, client, SYN)),
            Yes,
        );
    }
    t.end(120);
}

impl IntoDecision for Decision {
    fn decision(self) -> Decision {
        self
    }
}

/// A protocol (0 for an echo request) and port, and whether the pod may open it, and the peer.
type Case = (u8, u16, Decision, Decision);

#[test]
fn who_may_open_to_whom() {
    let Some(mut t) = Table::new("the policy's table of peers") else { return };
    for net in nets() {
        let peers: [(_, &[Case]); 6] = [
            (
                net.friend,
                &[(TCP, 80, Ok(()), Ok(())), (UDP, 9, Ok(()), Ok(())), (0, 0, Ok(()), Ok(()))],
            ),
            (
                net.blue,
                &[
                    (TCP, 80, Ok(()), Err(Tenant)),
                    (TCP, 81, Err(Tenant), Err(Tenant)),
                    (UDP, 80, Err(Tenant), Err(Tenant)),
                    (0, 0, Err(Tenant), Err(Tenant)),
                ],
            ),
            (
                net.green,
                &[
                    (UDP, 5, Err(Tenant), Ok(())),
                    (UDP, 0, Err(Tenant), Ok(())),
                    (TCP, 5, Err(Tenant), Err(Tenant)),
                    (0, 0, Err(Tenant), Err(Tenant)),
                ],
            ),
            (
                net.cluster,
                &[
                    (UDP, 53, Ok(()), Err(Service)),
                    (TCP, 53, Ok(()), Err(Service)),
                    (TCP, 54, Err(Service), Err(Service)),
                    (UDP, 54, Err(Service), Err(Service)),
                    (0, 0, Err(Service), Err(Service)),
                ],
            ),
            (
                net.node,
                &[
                    (TCP, 53, Err(Service), Ok(())),
                    (TCP, 8080, Err(Service), Ok(())),
                    (UDP, 8080, Err(Service), Err(Service)),
                    (0, 0, Err(Service), Ok(())),
                ],
            ),
            (
                net.unknown,
                &[
                    (TCP, 53, Err(Unknown), Err(Unknown)),
                    (UDP, 53, Err(Unknown), Err(Unknown)),
                    (0, 0, Err(Unknown), Err(Unknown)),
                ],
            ),
        ];
        for (peer, cases) in peers {
            for &(proto, port, from_pod, to_pod) in cases {
                let (proto, body) = match proto {
                    TCP => (proto, tcp(50000, port, SYN)),
                    UDP => (proto, udp(50000, port, &[])),
                    _ => (net.icmp, icmp(net.ask, 9, &[])),
                };
                let name = format!("{proto}/{port} between the pod and {peer}");
                t.sends(&name, out(Ip::new(net.own, peer, proto), &body), from_pod);
                t.world.forget();
                t.gets(&name, into(Ip::new(peer, net.own, proto), &body), to_pod);
                t.world.forget();
            }
        }
    }
    // The most specific prefix; what is nobody's; a pod without tenant.
    for (peer, expected) in [
        ("10.1.0.1", Err(Tenant)),
        ("10.1.1.255", Err(Tenant)),
        ("10.1.2.0", Ok(())),
        ("10.1.2.255", Ok(())),
        ("10.1.3.0", Err(Tenant)),
        ("10.2.0.1", Err(Unknown)),
        ("10.3.0.1", Err(Unknown)),
        ("fd01::3:1", Err(Tenant)),
        ("fd01::2:1", Ok(())),
        ("fd02::1", Err(Unknown)),
        ("::ffff:10.0.0.2", Err(Unknown)),
        ("::a00:2", Err(Unknown)),
    ] {
        let own = if ip(peer).is_ipv4() { nets()[0].own } else { nets()[1].own };
        t.sends(peer, out(Ip::new(own, ip(peer), UDP), &udp(1, 2, &[])), expected);
    }
    let lone = Ip::new(ip("10.0.0.9"), ip("10.2.0.1"), UDP).packet(&udp(1, 2, &[]));
    let frame = ethernet(POD, OTHER, IPV4, &lone);
    t.sent(Side::Vm, 3, "no tenant to no tenant", &frame, Err(Unknown));
    let lone = Ip::new(ip("10.0.0.9"), nets()[0].blue, TCP).packet(&syn());
    let frame = ethernet(POD, OTHER, IPV4, &lone);
    t.sent(Side::Vm, 3, "no tenant to a tenant", &frame, Err(Tenant));
    t.end(100);
}

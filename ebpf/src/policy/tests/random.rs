//! Random policies and random packets: the programs decide as the model does.
//!
//! Addresses, ports and identifiers come from small sets, so that packets meet flows, fragments and
//! services often; and many frames are damaged a little afterwards.

use std::net::IpAddr;
use std::time::Instant;

use super::frames::*;
use super::{World, ip, tell};
use crate::policy::Reason;
use crate::policy::abi::{Identity, Pod, Ports, Rule, Scope, Side};

/// How many packets, and the seed of the first scenario.
const PACKETS: &str = "JOEY_POLICY_PACKETS";
const SEED: &str = "JOEY_POLICY_SEED";
const DEFAULT: u64 = 100_000;
/// Packets of one policy.
const SCENARIO: u64 = 500;

const MACS: [Mac; 3] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2], [0x33, 0x33, 0, 0, 0, 1]];
const PORTS: [u16; 6] = [53, 80, 443, 1000, 67, 546];
const PROTOS: [u8; 5] = [TCP, UDP, ICMP, ICMP6, 47];
const FLAGS: [u8; 8] = [SYN, SYN | ACK, ACK, ACK | PSH, FIN | ACK, RST, RST | ACK, 0xFF];

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Once in `n` times.
    fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Addresses 1 and 2 are of the pods with these numbers.
fn address(v6: bool, number: usize) -> IpAddr {
    let text = if v6 {
        ["::", "fd00::1", "fd00::2", "fd00::3", "fd00:1::4", "fe80::5", "ff02::1"][number]
    } else {
        ["0.0.0.0", "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.1.0.4", "8.8.8.8", "224.0.0.1"][number]
    };
    ip(text)
}

fn identity(random: &mut Random) -> Identity {
    Identity {
        name: random.below(3) as u64,
        tenant: random.below(4) as u32,
        service: random.below(3) as u32,
        near: random.below(3) as u32,
        group: random.below(3) as u32,
        policy: random.below(8) as u32,
    }
}

fn rule(random: &mut Random) -> (Scope, Ports) {
    let (subject, object) = (random.below(4) as u32, random.below(4) as u32);
    let scope = match random.below(4) {
        0 => {
            let opener = random.pick(&[Side::Vm, Side::Peer]);
            Scope::Service { class: 1 + random.below(2) as u32, opener }
        }
        1 => Scope::Tenants { from: subject, to: object },
        2 => Scope::Egress { policy: random.below(8) as u32, group: random.below(3) as u32 },
        _ => Scope::Ingress { policy: random.below(8) as u32, group: random.below(3) as u32 },
    };
    let proto = random.pick(&PROTOS);
    let ports = match random.below(6) {
        0 => Ports::Any,
        1 | 2 => Ports::Protocol(proto),
        3 => Ports::Prefix { proto, port: 0, bits: random.pick(&[1, 8, 10]) },
        _ => Ports::Prefix { proto, port: random.pick(&PORTS), bits: 16 },
    };
    (scope, ports)
}

fn policy(world: &mut World, random: &mut Random) {
    for (id, mac) in [(1, MACS[0]), (2, MACS[1])] {
        let number = usize::from(id);
        let mut own = vec![address(false, number), address(true, number)];
        if random.once_in(2) {
            own.push(address(true, 5));
        }
        let (name, space) = (random.below(3) as u64, random.below(3) as u32);
        let table = random.below(3) as u32;
        let pod = super::pod(random.below(4) as u32, mac);
        world.pod(id, Pod { name, space, table, ..pod }, &own);
    }
    for v6 in [false, true] {
        if random.once_in(3) {
            world.node_address(address(v6, 3 + random.below(2)));
        }
        for number in 1..7 {
            let most = if v6 { 128 } else { 32 };
            let bits = random.pick(&[most, most, most - 4, most / 2, 8, 0]);
            if !random.once_in(4) {
                let masked = masked(address(v6, number), bits);
                world.identity(masked, bits, identity(random));
            }
        }
    }
    for space in 0..3 {
        if random.once_in(2) {
            world.model.tables.spaces.insert(space, random.below(8) as u32);
        }
    }
    for _ in 0..random.below(40) {
        let (scope, ports) = rule(random);
        world.allow(scope, ports);
    }
}

/// Gives an address to another, allows something, and something else no longer.
fn change(world: &mut World, random: &mut Random) {
    let (v6, bits) = random.pick(&[(false, 32), (true, 128)]);
    world.identity(address(v6, 3), bits, identity(random));
    let mut rules: Vec<_> = world.model.tables.rules.iter().copied().collect();
    rules.sort();
    if !rules.is_empty() {
        let Rule { scope, ports } = random.pick(&rules);
        world.disallow(scope, ports);
    }
    let (scope, ports) = rule(random);
    world.allow(scope, ports);
}

/// The first address of a prefix, so that the model's map has each prefix once, as the kernel's has.
fn masked(address: IpAddr, bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            IpAddr::V4((u32::from(ip) & mask).into())
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
            IpAddr::V6((u128::from(ip) & mask).into())
        }
    }
}

/// What follows the IP header.
fn body(random: &mut Random, v6: bool, proto: u8, recent: &[Vec<u8>]) -> Vec<u8> {
    match proto {
        TCP => tcp(random.pick(&PORTS), random.pick(&PORTS), random.pick(&FLAGS)),
        UDP => udp(random.pick(&PORTS), random.pick(&PORTS), &[0; 24][..random.below(25)]),
        ICMP if !v6 => {
            let kind = random.pick(&[8, 8, 0, 0, 3, 11, 12, 5, 4]);
            let quote = if matches!(kind, 3 | 11 | 12) { quote(random, recent) } else { vec![] };
            icmp(kind, 1 + random.below(3) as u16, &quote)
        }
        ICMP6 if v6 && random.once_in(2) => {
            let kind = random.pick(&[128, 129, 1, 2, 3, 4, 200]);
            let quote = if kind < 5 { quote(random, recent) } else { vec![] };
            icmp(kind, 1 + random.below(3) as u16, &quote)
        }
        ICMP6 if v6 => {
            let kind = random.pick(&[130, 131, 132, 133, 134, 135, 135, 136, 136, 137, 143]);
            let target = random.pick(&["fd00::1", "fd00::2", "fe80::5"]);
            let mut options = Vec::new();
            for _ in 0..random.below(6) {
                options.extend(link_option(random.pick(&[1, 2, 14]), random.pick(&MACS[..2])));
            }
            if random.once_in(2) {
                options.clear();
            }
            discovery(kind, (kind != 133).then_some(target), &options)
        }
        _ => vec![0; random.below(30)],
    }
}

fn quote(random: &mut Random, recent: &[Vec<u8>]) -> Vec<u8> {
    if recent.is_empty() {
        return vec![0x45; 28];
    }
    let packet = &recent[random.below(recent.len())];
    packet[..packet.len().min(60)].to_vec()
}

/// Puts extension headers before what an IPv6 packet carries.
fn extend(random: &mut Random, packet: &mut Vec<u8>) {
    for _ in 0..1 + random.below(5) {
        let kind = random.pick(&[60, 60, 60, 60, 0, 0, 43, 44]);
        let header = [packet[6], 0, 0, 0, 0, 0, 0, 0];
        packet[6] = kind;
        packet.splice(40..40, header);
    }
    let length = (packet.len() - 40) as u16;
    packet[4..6].copy_from_slice(&length.to_be_bytes());
}

fn frame(random: &mut Random, sender: Side, pod: u16, recent: &mut Vec<Vec<u8>>) -> Vec<u8> {
    let own = usize::from(pod.clamp(1, 2));
    let mac = MACS[own - 1];
    let (to, from) = match (sender, random.once_in(20)) {
        (_, true) => (random.pick(&MACS), random.pick(&MACS)),
        (Side::Vm, _) => (MACS[2 - own], mac),
        (Side::Peer, _) => (if random.once_in(8) { MACS[2] } else { mac }, MACS[2 - own]),
    };
    if random.once_in(25) {
        let (macs, ips) = (&MACS[..2], [[10, 0, 0, 1], [10, 0, 0, 2], [0; 4]]);
        let who = (random.pick(macs), random.pick(&ips));
        let whom = (random.pick(macs), random.pick(&ips));
        return ethernet(to, from, ARP, &arp(1 + random.below(3) as u16, who, whom));
    }
    let v6 = random.once_in(2);
    let mine = address(v6, if random.once_in(12) { random.below(7) } else { own });
    let other = address(v6, random.pick(&[1, 2, 3, 3, 4, 5, 6]));
    let (source, destination) = if sender == Side::Vm { (mine, other) } else { (other, mine) };
    let proto = match random.below(24) {
        0 => random.pick(&PROTOS),
        1..10 => TCP,
        10..16 => UDP,
        _ => {
            if v6 {
                ICMP6
            } else {
                ICMP
            }
        }
    };
    let mut head = Ip::new(source, destination, proto).hops(random.pick(&[255, 255, 64, 1]));
    if random.once_in(10) {
        let offset = random.pick(&[0, 0, 8, 16, 24, 32, 1480, 65528]);
        head = head.fragment(1 + random.below(3) as u32, offset, random.once_in(2));
    }
    let mut packet = head.packet(&body(random, v6, proto, recent));
    if v6 && random.once_in(8) {
        extend(random, &mut packet);
    }
    if recent.len() == 16 {
        recent.swap_remove(random.below(16));
    }
    recent.push(packet.clone());
    let mut kind = head.kind();
    if random.once_in(60) {
        kind = random.pick(&[0x8100, 0x88A8, 0x88CC, 0x05DC, IPV4, IPV6]);
    }
    ethernet(to, from, kind, &packet)
}

fn damage(random: &mut Random, frame: &mut Vec<u8>) {
    match random.below(12) {
        0 => frame.truncate(15 + random.below(frame.len() - 14)),
        1 => frame.extend([0; 12]),
        2 | 3 => {
            let at = random.below(frame.len());
            frame[at] = random.next() as u8;
        }
        4 => {
            let at = random.below(frame.len());
            frame[at] ^= 1 << random.below(8);
        }
        _ => {}
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap())
}

#[test]
fn programs_decide_as_the_model_does() {
    let Some(mut world) = World::new("the comparison of the policy's programs with its model")
    else {
        return;
    };
    let (packets, seed) = (number(PACKETS, DEFAULT), number(SEED, 1));
    let start = Instant::now();
    let mut outcomes = std::collections::BTreeMap::new();
    for scenario in 0..packets.div_ceil(SCENARIO) {
        let seed = seed + scenario;
        let mut random = Random(seed.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        policy(&mut world, &mut random);
        let mut recent = Vec::new();
        for index in 0..SCENARIO {
            let sender = random.pick(&[Side::Vm, Side::Peer]);
            let pod = if random.once_in(100) { 3 } else { random.pick(&[1, 2]) };
            let mut frame = frame(&mut random, sender, pod, &mut recent);
            damage(&mut random, &mut frame);
            if !runs(&frame) {
                continue;
            }
            if random.once_in(100) {
                // No sum of these is a lifetime, where the clocks' precision would decide.
                world.age(random.pick(&[21, 43, 101, 199, 8000]));
            }
            if random.once_in(40) {
                change(&mut world, &mut random);
            }
            let (program, model) = world.judge(sender, pod, &frame);
            assert_eq!(
                program, model,
                "packet {index} of seed {seed}, sent by {sender:?} of pod {pod}: {frame:02x?}"
            );
            *outcomes.entry(program.err()).or_insert(0_u64) += 1;
        }
        world.compare_flows();
        world.compare_counters();
        world.compare_events();
        world.clear();
    }
    let mut words = format!("{packets} random packets in {:.1?}:", start.elapsed());
    for (reason, count) in &outcomes {
        let name = reason.map_or("allowed".to_owned(), |reason| format!("{reason:?}"));
        words += &format!(" {name} {count},");
    }
    tell(words.trim_end_matches(','));
    let allowed = outcomes.get(&None).copied().unwrap_or(0);
    assert!(allowed * 20 > packets, "too few packets are allowed to say anything: {words}");
    // Those need a limit, and a mesh.
    let others = [Reason::Rate, Reason::Proxy, Reason::ProxyPort];
    for reason in Reason::ALL.iter().filter(|reason| !others.contains(reason)) {
        assert!(outcomes.contains_key(&Some(*reason)), "no packet was dropped as {reason:?}");
    }
}

//! Packets in a second, an earlier pod's flows, and tables that tenants do not share.

use super::cases::*;
use super::frames::*;
use super::table::{Table, Yes};
use super::{now, pod};
use crate::policy::Reason::*;
use crate::policy::abi::{Limit, Pod, Side};
use crate::policy::model::Paid;

const RED: u32 = 10;

/// Limits pod 1, in the model too, with a second for each packet.
fn limited(t: &mut Table, packets: [u64; 2]) {
    let own: Vec<_> = nets().iter().map(|net| net.own).collect();
    let limit = Limit { packets };
    t.world.maps().put_limit(1, limit).unwrap();
    t.world.model.limits.insert(1, Paid { limit, until: [0; 2] });
    t.world.pod(1, Pod { limited: true, ..pod(RED, POD) }, &own);
}

#[test]
fn packets_are_paid_for() {
    let Some(mut t) = Table::new("the policy's table of limits") else { return };
    limited(&mut t, [1, 0]);
    let net = nets()[0];
    let datagram = |port| out(Ip::new(net.own, net.friend, UDP), &udp(port, 2, &[]));
    let back = into(Ip::new(net.friend, net.own, UDP), &udp(2, 1, &[]));
    // At least 32 at once; what is refused for another reason is not paid for.
    for index in 0..32 {
        t.sends("not allowed", out(Ip::new(net.own, net.blue, UDP), &udp(1, 2, &[])), Tenant);
        t.sends(&format!("packet {index}"), datagram(1), Yes);
    }
    t.sends("one too many", datagram(1), Rate);
    // What is refused leaves nothing behind.
    t.sends("a flow too many", datagram(7), Rate);
    t.sends(
        "ARP, too",
        ethernet(ALL, POD, ARP, &arp(1, (POD, [10, 0, 0, 1]), ([0; 6], [0; 4]))),
        Rate,
    );
    for _ in 0..40 {
        t.gets("the other direction is not limited", back.clone(), Yes);
    }
    limited(&mut t, [1, 1]);
    t.sends("paid anew", datagram(1), Yes);
    t.world.model.limits.clear();
    t.world.maps().remove_limit(1).unwrap();
    t.sends("a limit that is missing", datagram(1), Rate);
    t.end(100);
}

#[test]
fn what_keeps_the_link_working_does_not_use_up_what_comes_to_a_pod() {
    let Some(mut t) = Table::new("the policy's limits and link messages") else { return };
    limited(&mut t, [0, 1]);
    let [old, new] = nets();
    let ask = ethernet(ALL, OTHER, ARP, &arp(1, (OTHER, [10, 0, 0, 9]), ([0; 6], [10, 0, 0, 1])));
    let neighbour = Ip::new(new.friend, new.own, ICMP6).hops(255);
    let target = new.own.to_string();
    let solicitation = into(neighbour, &discovery(135, Some(&target), &link_option(1, OTHER)));
    for _ in 0..200 {
        t.gets("ARP", ask.clone(), Yes);
        t.gets("neighbour discovery", solicitation.clone(), Yes);
    }
    // All of the 32 that may come at once are left.
    let datagram = into(Ip::new(old.friend, old.own, UDP), &udp(2, 1, &[]));
    for index in 0..32 {
        t.gets(&format!("packet {index}"), datagram.clone(), Yes);
    }
    t.gets("one too many", datagram, Rate);
    t.gets("ARP beyond the limit", ask, Yes);
    t.gets("neighbour discovery beyond the limit", solicitation, Yes);
    t.end(435);
}

#[test]
fn a_large_packet_costs_as_many_as_it_stands_for() {
    let Some(mut t) = Table::new("the policy's limits and large packets") else { return };
    limited(&mut t, [1, 0]);
    t.world.apply();
    let net = nets()[0];
    // In segments of 40, which count as segments of 536, as nobody has smaller ones: 3242 bytes are 7 packets,
    // so the fifth goes beyond the 32, and the sixth is refused.
    let large = out(Ip::new(net.own, net.friend, UDP), &udp(1, 2, &[0; 3200]));
    let policy = &mut t.world.policy;
    for expected in [Ok(()), Ok(()), Ok(()), Ok(()), Ok(()), Err(Rate)] {
        let run = policy.run_segmented(Side::Vm, 1, &large, 1, 40).unwrap();
        assert_eq!(run.decision, expected);
    }
}

#[test]
fn a_limit_is_kept_over_time() {
    let Some(mut t) = Table::new("the policy's limits over time") else { return };
    limited(&mut t, [10_000, 0]);
    t.world.apply();
    let net = nets()[0];
    let frame = out(Ip::new(net.own, net.friend, UDP), &udp(1, 2, &[]));
    let (start, mut before, mut unused) = (now(), now(), 0);
    while before - start < 300_000_000 {
        t.world.policy.run(Side::Vm, 1, &frame, 1).unwrap();
        let moment = now();
        // Who has no processor for longer than what may come at once (but for a tick) has not used its limit.
        unused += (moment - before).saturating_sub(16_000_000);
        before = moment;
    }
    let seconds = (before - start - unused) as f64 / 1e9;
    let counted = t.world.maps().counters(1).unwrap().unwrap();
    // A fiftieth of a second more may have come at once.
    let rate = (counted.packets[0] as f64 - 200.0) / seconds;
    super::tell(&format!("{rate:.0} packets a second of 10000"));
    assert!(counted.dropped(Side::Vm, Rate) > 0, "too slow to be limited");
    assert!((9_500.0..=10_200.0).contains(&rate), "{rate}");
}

#[test]
fn flows_of_an_earlier_pod_are_not_the_next_ones() {
    let Some(mut t) = Table::new("the policy's table of pods' beginnings") else { return };
    let net = nets()[0];
    let own: Vec<_> = nets().iter().map(|net| net.own).collect();
    let (there, back) = (Ip::new(net.own, net.friend, TCP), Ip::new(net.friend, net.own, TCP));
    let piece = Ip::new(net.own, net.friend, UDP);
    t.sends("opens", out(there, &tcp(1, 80, SYN)), Yes);
    t.gets("is answered", into(back, &tcp(80, 1, SYN | ACK)), Yes);
    t.sends("a first fragment", out(piece.fragment(1, 0, true), &udp(1, 2, &[0; 40])), Yes);
    t.sends("its next", out(piece.fragment(1, 48, false), &[0; 8]), Yes);
    let blue = Ip::new(net.own, net.blue, UDP);
    t.sends("an attempt", out(blue, &udp(1, 2, &[])), Tenant);
    // A tick of the coarse clock later.
    std::thread::sleep(std::time::Duration::from_millis(20));
    t.world.pod(1, Pod { since: now(), ..pod(RED, POD) }, &own);
    t.sends("of the earlier pod", out(there, &tcp(1, 80, ACK)), NoFlow);
    t.gets("to the earlier pod", into(back, &tcp(80, 1, ACK)), NoFlow);
    t.sends("its fragment", out(piece.fragment(1, 48, false), &[0; 8]), Fragment);
    t.sends("an attempt that is told again", out(blue, &udp(1, 2, &[])), Tenant);
    t.sends("opens anew", out(there, &tcp(1, 80, SYN)), Yes);
    t.gets("is answered anew", into(back, &tcp(80, 1, SYN | ACK)), Yes);
    t.end(11);
}

#[test]
fn a_flood_of_flows_stays_in_its_table() {
    let Some(mut t) = Table::new("the policy's tables of flows") else { return };
    let net = nets()[0];
    let blue: Vec<_> = nets().iter().map(|net| net.blue).collect();
    t.world.pod(2, Pod { table: 1, ..pod(20, OTHER) }, &blue);
    let open = out(Ip::new(net.own, net.friend, TCP), &tcp(1, 80, SYN));
    t.sends("a flow", open, Yes);
    // More of the other tenant's than a table holds.
    for port in 1000..10_000 {
        let packet = Ip::new(net.blue, net.blue, UDP).packet(&udp(port, 2, &[]));
        let frame = ethernet(POD, OTHER, IPV4, &packet);
        assert_eq!(t.world.policy.run(Side::Vm, 2, &frame, 1).unwrap().decision, Ok(()));
    }
    let answer = into(Ip::new(net.friend, net.own, TCP), &tcp(80, 1, SYN | ACK));
    let decision = t.world.policy.run(Side::Peer, 1, &answer, 1).unwrap().decision;
    assert_eq!(decision, Ok(()), "the flow is still known");
    assert!(t.world.maps().flows(1).unwrap().len() > 1000);
    assert_eq!(t.world.maps().flows(0).unwrap().len(), 1);
    // Without its table a pod has no flows.
    t.world.pod(2, Pod { table: 64, ..pod(20, OTHER) }, &blue);
    let packet = Ip::new(net.blue, net.blue, UDP).packet(&udp(1, 2, &[]));
    let frame = ethernet(POD, OTHER, IPV4, &packet);
    let decision = t.world.policy.run(Side::Vm, 2, &frame, 1).unwrap().decision;
    assert_eq!(decision, Err(NoFlow));
}

//! What is told of flows and refused attempts, and what is counted of pods that are gone.

use super::cases::*;
use super::frames::*;
use super::table::{Table, Yes};
use crate::policy::Reason::*;
use crate::policy::abi::{EventKind, Side, State};

const RED: u32 = 10;
const BLUE: u32 = 20;

#[test]
fn flows_are_told_when_they_open_and_end() {
    let Some(mut t) = Table::new("the policy's table of events") else { return };
    for net in nets() {
        let (there, back) = (Ip::new(net.own, net.blue, TCP), Ip::new(net.blue, net.own, TCP));
        t.sends("opens", out(there, &tcp(1000, 80, SYN)), Yes);
        t.gets("is answered", into(back, &tcp(80, 1000, SYN | ACK)), Yes);
        t.sends("finishes", out(there, &tcp(1000, 80, FIN | ACK)), Yes);
        t.gets("is finished", into(back, &tcp(80, 1000, FIN | ACK)), Yes);
        t.sends("the last", out(there, &tcp(1000, 80, ACK)), Yes);
        let told = t.world.told();
        let [opened, ended] = told[..] else { panic!("{told:?}") };
        assert_eq!((opened.kind, ended.kind), (EventKind::Opened, EventKind::Ended));
        for event in [opened, ended] {
            let key = event.key;
            assert_eq!((key.pod, key.local, key.remote), (1, net.own, net.blue));
            assert_eq!((key.local_port, key.remote_port, key.proto), (1000, 80, TCP));
            assert_eq!((event.tenant, event.peer_tenant, event.peer_pod), (RED, BLUE, 2));
        }
        assert_eq!((opened.flow.packets, ended.flow.packets), ([1, 0], [2, 2]));
        assert_eq!(ended.flow.state, State::Closed);
        let head = if net.own.is_ipv4() { 54 } else { 74 };
        assert_eq!(ended.flow.bytes, [2 * head, 2 * head]);
        t.world.model.events.clear();
    }
    t.end(10);
}

#[test]
fn refused_attempts_are_told_once() {
    let Some(mut t) = Table::new("the policy's table of refusals") else { return };
    for net in nets() {
        let peers = [(net.unknown, Unknown), (net.green, Tenant), (net.cluster, Service)];
        for (peer, reason) in peers {
            for port in 1000..1010 {
                let there = Ip::new(net.own, peer, TCP);
                t.sends("an attempt", out(there, &tcp(port, 80, SYN)), reason);
            }
            let told = t.world.told();
            let [event] = told[..] else { panic!("{told:?}") };
            assert_eq!(event.kind, EventKind::Denied(reason));
            assert_eq!((event.key.local_port, event.key.remote_port), (0, 80));
            assert_eq!(event.flow.opener, Side::Vm);
            let denials = t.world.maps().denials().unwrap();
            let denied = denials.iter().find(|(key, _)| *key == event.key).unwrap().1;
            assert_eq!((denied.packets, denied.reason), (10, reason));
            t.world.model.events.clear();
            // Forgotten by who reads them, it is told again.
            t.world.maps().remove_denied(&event.key).unwrap();
            t.world.model.denials.remove(&event.key);
            t.sends("another", out(Ip::new(net.own, peer, TCP), &tcp(1, 80, SYN)), reason);
            assert_eq!(t.world.told().len(), 1);
            t.world.model.events.clear();
        }
        let (there, back) = (Ip::new(net.own, net.green, TCP), Ip::new(net.green, net.own, TCP));
        t.gets("no attempt", into(back, &tcp(80, 1, ACK)), NoFlow);
        t.sends("no attempt", out(there, &tcp(1, 81, ACK)), NoFlow);
        t.gets("an attempt from outside", into(back, &tcp(80, 22, SYN)), Tenant);
        let told = t.world.told();
        let [event] = told[..] else { panic!("{told:?}") };
        assert_eq!((event.key.local_port, event.key.remote_port), (22, 0));
        t.world.model.events.clear();
    }
    t.end(70);
}

#[test]
fn a_pod_may_say_so_much() {
    let Some(mut t) = Table::new("the policy's budget of events") else { return };
    t.world.apply();
    let net = nets()[0];
    // One CPU, whose budget it is.
    let cpus = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
    let first = (0..nix::sched::CpuSet::count()).find(|cpu| cpus.is_set(*cpu).unwrap()).unwrap();
    let mut one = nix::sched::CpuSet::new();
    one.set(first).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one).unwrap();
    let start = std::time::Instant::now();
    for port in 1000..3000 {
        let frame = out(Ip::new(net.own, net.friend, UDP), &udp(1, port, &[]));
        assert_eq!(t.world.policy.run(Side::Vm, 1, &frame, 1).unwrap().decision, Ok(()));
    }
    let most = 501 + (start.elapsed().as_millis() / 2 + 10) as u64;
    let told = t.world.told().len() as u64;
    assert!((500..=most).contains(&told), "{told} of {most}");
    let counted = t.world.maps().counters(1).unwrap().unwrap();
    assert_eq!(counted.unsaid, 2000 - told);
    // Another pod has its own.
    let frame =
        ethernet(POD, OTHER, IPV4, &Ip::new(net.blue, net.blue, UDP).packet(&udp(1, 2, &[])));
    t.world.policy.run(Side::Vm, 2, &frame, 1).unwrap();
    assert_eq!(t.world.told().len(), 1);
}

#[test]
fn what_a_pod_counted_is_its_tenants() {
    let Some(mut t) = Table::new("the policy's totals") else { return };
    let net = nets()[0];
    let good = out(Ip::new(net.own, net.friend, UDP), &udp(1, 2, &[]));
    for round in 1..3 {
        t.sends("a packet", good.clone(), Yes);
        t.sends("a drop", out(Ip::new(net.own, net.unknown, UDP), &udp(1, 2, &[])), Unknown);
        let own: Vec<_> = nets().iter().map(|net| net.own).collect();
        t.world.remove_pod(1);
        assert_eq!(t.world.maps().counters(1).unwrap(), None);
        let totals = t.world.maps().totals().unwrap();
        let total = &totals[&RED];
        assert_eq!((total.packets, total.bytes[0]), ([round, 0], round * good.len() as u64));
        assert_eq!(total.dropped(Side::Vm, Unknown), round);
        t.world.pod(1, super::pod(RED, POD), &own);
        t.world.forget();
    }
    t.world.model.events.clear();
    t.world.told();
    t.end(4);
}

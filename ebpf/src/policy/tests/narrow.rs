//! NetworkPolicies, the node's own addresses, ranges of ports, and policies that change while packets run.

use std::sync::atomic::{AtomicBool, Ordering};

use super::cases::*;
use super::frames::*;
use super::table::{Table, Yes};
use super::{World, alone, ip, pod};
use crate::policy::Reason::*;
use crate::policy::abi::{
    ISOLATED_EGRESS, ISOLATED_INGRESS, Identity, NODE, Pod, Ports, Rule, Scope, Side,
};

const RED: u32 = 10;
/// Digests of names.
const OWN: u64 = 77;
const FRIEND: u64 = 78;
/// A group, and a policy that isolates both ways.
const GROUP: u32 = 5;
const POLICY: u32 = 8 | ISOLATED_EGRESS | ISOLATED_INGRESS;

/// Pod 1 is known by its name, selected by the policy; its friend, on another node, is in the group.
fn isolated(t: &mut Table, own: Identity) {
    let red = Identity { tenant: RED, ..Identity::default() };
    let mut addresses = Vec::new();
    for net in nets() {
        let all = if net.own.is_ipv4() { 32 } else { 128 };
        t.world.identity(net.own, all, own);
        t.world.identity(net.friend, all, Identity { name: FRIEND, group: GROUP, ..red });
        addresses.push(net.own);
    }
    t.world.remove_pod(4);
    t.world.pod(1, Pod { name: OWN, space: 3, ..pod(RED, POD) }, &addresses);
}

fn own() -> Identity {
    Identity { name: OWN, tenant: RED, policy: POLICY, ..Identity::default() }
}

#[test]
fn network_policies_narrow() {
    let Some(mut t) = Table::new("the policy's table of NetworkPolicies") else { return };
    isolated(&mut t, own());
    for net in nets() {
        let (there, back) = (Ip::new(net.own, net.friend, TCP), Ip::new(net.friend, net.own, TCP));
        let open = |port| tcp(50000, port, SYN);
        t.sends("nothing is listed", out(there, &open(80)), NetworkPolicy);
        t.gets("nothing is listed", into(back, &open(80)), NetworkPolicy);
        let egress = Scope::Egress { policy: POLICY, group: GROUP };
        t.world.allow(egress, Ports::Prefix { proto: TCP, port: 80, bits: 16 });
        t.sends("it is listed", out(there, &open(80)), Yes);
        t.gets("its answer", into(back, &tcp(80, 50000, SYN | ACK)), Yes);
        t.sends("another port", out(there, &open(81)), NetworkPolicy);
        t.gets("the other direction", into(back, &open(80)), NetworkPolicy);
        let other = Scope::Egress { policy: POLICY, group: GROUP + 1 };
        t.world.allow(other, Ports::Protocol(UDP));
        let datagram = out(Ip::new(net.own, net.friend, UDP), &udp(50000, 9, &[]));
        t.sends("another group's", datagram.clone(), NetworkPolicy);
        let anybody = Scope::Egress { policy: POLICY, group: 0 };
        t.world.allow(anybody, Ports::Protocol(UDP));
        t.sends("anybody's", datagram, Yes);
        // Listed or not: tenancy is another thing, and what is allowed across tenants needs both.
        let blue = |proto, body: &[u8]| out(Ip::new(net.own, net.blue, proto), body);
        t.sends("anybody, but of another tenant", blue(UDP, &udp(1, 9, &[])), Tenant);
        t.sends("allowed across tenants, not listed", blue(TCP, &open(80)), NetworkPolicy);
        t.world.allow(anybody, Ports::Prefix { proto: TCP, port: 80, bits: 16 });
        t.sends("allowed and listed", blue(TCP, &open(80)), Yes);
        // Ranges of ports, as NetworkPolicies have them.
        let ingress = Scope::Ingress { policy: POLICY, group: GROUP };
        for ports in Ports::range(TCP, 1000, 2000) {
            t.world.allow(ingress, ports);
        }
        let cases = [(999, false), (1000, true), (1023, true), (1024, true), (1500, true)];
        for (port, within) in cases.into_iter().chain([(2000, true), (2001, false)]) {
            let expected = if within { Ok(()) } else { Err(NetworkPolicy) };
            t.gets(&format!("port {port}"), into(back, &open(port)), expected);
        }
        t.world.disallow(egress, Ports::Prefix { proto: TCP, port: 80, bits: 16 });
        t.world.disallow(anybody, Ports::Prefix { proto: TCP, port: 80, bits: 16 });
        t.sends(
            "of a flow that is listed no more",
            out(there, &tcp(50000, 80, ACK)),
            NetworkPolicy,
        );
        t.world.disallow(anybody, Ports::Protocol(UDP));
        t.world.forget();
    }
    t.end(38);
}

#[test]
fn policies_belong_to_pods_by_name() {
    let Some(mut t) = Table::new("the policy's table of names") else { return };
    // The address was an earlier pod's, which the policy was made for; pod 1 is in namespace 3.
    isolated(&mut t, Identity { name: OWN + 9, ..own() });
    for net in nets() {
        let there = Ip::new(net.own, net.friend, UDP);
        let data = udp(1, 2, &[]);
        t.sends("an earlier pod's policy", out(there, &data), Yes);
        t.world.model.tables.spaces.insert(3, 16 | ISOLATED_EGRESS);
        t.world.changed = true;
        t.sends("labels that are not known yet", out(there, &data), NetworkPolicy);
        t.gets("the other way", into(Ip::new(net.friend, net.own, UDP), &udp(7, 8, &[])), Yes);
        let all = if net.own.is_ipv4() { 32 } else { 128 };
        t.world.identity(net.own, all, Identity { policy: 0, ..own() });
        t.sends("labels that no policy selects", out(there, &data), Yes);
        t.world.identity(net.own, all, own());
        t.world.allow(Scope::Egress { policy: POLICY, group: GROUP }, Ports::Any);
        t.sends("a peer by its group", out(there, &data), Yes);
        // Another pod of this node has the peer's address now: the group was not made for it.
        t.world.pod(9, Pod { name: FRIEND + 1, ..pod(RED, OTHER) }, &[net.friend]);
        t.sends("a peer that is another by now", out(there, &data), NetworkPolicy);
        t.world.remove_pod(9);
        t.world.pod(9, Pod { name: FRIEND, ..pod(RED, OTHER) }, &[net.friend]);
        t.sends("the very peer", out(there, &data), Yes);
        t.world.remove_pod(9);
        t.world.model.tables.spaces.clear();
        t.world.identity(net.own, all, Identity { name: OWN + 9, ..own() });
        t.world.forget();
    }
    t.end(14);
}

#[test]
fn the_node_itself_reaches_its_pods() {
    let Some(mut t) = Table::new("the policy's table of the node") else { return };
    isolated(&mut t, own());
    for (net, address) in nets().into_iter().zip(["192.168.9.1", "fd99::1"]) {
        let address = ip(address);
        let probe = into(Ip::new(address, net.own, TCP), &tcp(40000, 8080, SYN));
        t.gets("somebody unknown", probe.clone(), Unknown);
        t.world.node_address(address);
        t.gets("the node without a rule", probe.clone(), Service);
        t.world.allow(Scope::Service { class: NODE, opener: Side::Peer }, Ports::Any);
        t.gets("the node's probe, of an isolated pod", probe, Yes);
        t.sends(
            "its answer",
            out(Ip::new(net.own, address, TCP), &tcp(8080, 40000, SYN | ACK)),
            Yes,
        );
        t.sends(
            "the pod to the node",
            out(Ip::new(net.own, address, TCP), &tcp(1, 10250, SYN)),
            Service,
        );
        t.world.disallow(Scope::Service { class: NODE, opener: Side::Peer }, Ports::Any);
        // An address that a pod has is not the node's, and is the pod's no longer than the pod is there.
        t.world.node_address(net.blue);
        t.sends("the pod's", out(Ip::new(net.own, net.blue, UDP), &udp(1, 2, &[])), Tenant);
        t.world.forget();
    }
    t.end(12);
}

/// Two epochs that allow different things; a mixture of them would allow a third.
#[test]
fn an_epoch_is_seen_whole() {
    let Some(mut world) = World::new("the policy's epochs under load") else { return };
    node(&mut world);
    let net = nets()[0];
    let (a, b) = (40, 50);
    let rule = |from| Rule { scope: Scope::Tenants { from: RED, to: from }, ports: Ports::Any };
    // In epoch A the peer is A's and only B may be opened to, and the other way round in B: nothing passes
    // unless somebody takes the identity of one and the rules of the other.
    let peer = crate::policy::abi::Prefix { address: net.green, bits: 32 };
    let identity = |tenant| Identity { tenant, ..Identity::default() };
    let write = |epoch: u32| {
        let (who, allowed) = if epoch.is_multiple_of(2) { (a, b) } else { (b, a) };
        world.policy.maps.put_identity(epoch, peer, identity(who)).unwrap();
        world.policy.maps.put_rule(epoch, &rule(allowed)).unwrap();
    };
    write(2);
    world.policy.maps.activate(&alone(), 2).unwrap();
    let frame = out(Ip::new(net.own, net.green, TCP), &tcp(1, 2, SYN));
    let stop = AtomicBool::new(false);
    let World { policy, .. } = world;
    let maps = super::Maps::with(|name| policy.map(name)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for epoch in 3..300 {
                let (who, allowed) = if epoch % 2 == 0 { (a, b) } else { (b, a) };
                maps.put_identity(epoch, peer, identity(who)).unwrap();
                maps.put_rule(epoch, &rule(allowed)).unwrap();
                maps.activate(&alone(), epoch).unwrap();
                maps.keep_only(&alone(), epoch).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        while !stop.load(Ordering::Relaxed) {
            let outcome = policy.run(Side::Vm, 1, &frame, 1000).unwrap();
            assert!(matches!(outcome.decision, Err(Tenant | Unknown)), "{outcome:?}");
        }
    });
    let counted = policy.maps.counters(1).unwrap().unwrap();
    assert_eq!(counted.packets, [0; 2]);
    super::tell(&format!("{} packets while epochs changed", counted.dropped(Side::Vm, Tenant)));
}

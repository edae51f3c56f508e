//! Which way a meshed pod's packets go where there is no proxy: what is the proxy's goes nowhere. (A program that is run
//! by hand cannot give a packet to a socket; the harness's lab shows that on devices.)

use super::cases::*;
use super::frames::*;
use super::{World, ip};
use crate::policy::Reason::{self, *};
use crate::policy::abi::{EventKind, NODE, Ports, Scope, Side};
use crate::policy::attach::Program::{self, *};

/// `TC_ACT_OK`: to the stack, or on the way it was going. `TC_ACT_REDIRECT`: to the other device.
const STACK: Result<u32, Reason> = Ok(0);
const PAST: Result<u32, Reason> = Ok(7);

struct Mesh(World);

impl Mesh {
    fn new(what: &str) -> Option<Self> {
        let mut world = World::new(what)?;
        node(&mut world);
        world.apply();
        Some(Self(world))
    }

    fn check(&mut self, what: &str, program: Program, frame: &[u8], expected: Result<u32, Reason>) {
        let decision = self.0.policy.run_program(program, 1, frame, 1, 0).unwrap().decision;
        assert_eq!(decision, expected, "{what}: {} of {frame:02x?}", program.name());
    }
}

#[test]
fn nothing_passes_without_a_proxy() {
    let Some(mut mesh) = Mesh::new("the way of a meshed pod's packets") else { return };
    for net in nets() {
        let own = |to, proto| Ip::new(net.own, to, proto);
        let others = |from, proto| Ip::new(from, net.own, proto);
        let open = tcp(1000, 80, SYN);
        let vm = |mesh: &mut Mesh, what: &str, frame: &[u8], expected| {
            for program in [MeshFromVm, MeshDnsFromVm] {
                mesh.check(what, program, frame, expected);
            }
        };
        vm(&mut mesh, "opens", &out(own(net.friend, TCP), &open), Err(Proxy));
        vm(&mut mesh, "of nothing", &out(own(net.friend, TCP), &tcp(1, 80, ACK)), Err(NoFlow));
        let part = own(net.friend, TCP).fragment(7, 0, true);
        vm(&mut mesh, "a part", &out(part, &tcp(1, 80, SYN)), Err(Fragment));
        vm(&mut mesh, "a datagram", &out(own(net.friend, UDP), &udp(1, 80, &[])), PAST);
        vm(
            &mut mesh,
            "spoofed",
            &out(Ip::new(net.friend, net.blue, TCP), &open),
            Err(SpoofedAddress),
        );
        mesh.check("a query", MeshFromVm, &out(own(net.cluster, UDP), &udp(1, 53, &[])), PAST);
        let query = out(own(net.cluster, UDP), &udp(1, 53, &[]));
        mesh.check("a query", MeshDnsFromVm, &query, Err(Proxy));
        let query = out(own(net.cluster, TCP), &tcp(1, 53, SYN));
        mesh.check("a query by TCP", MeshDnsFromVm, &query, Err(Proxy));
        let to = |mesh: &mut Mesh, what: &str, frame: &[u8], expected| {
            mesh.check(what, MeshToVm, frame, expected);
        };
        for port in [80, 15008] {
            let frame = into(others(net.friend, TCP), &tcp(1000, port, SYN));
            to(&mut mesh, "another opens", &frame, Err(Proxy));
        }
        for port in [15001, 15006, 15053] {
            let frame = into(others(net.friend, TCP), &tcp(1000, port, SYN));
            to(&mut mesh, "the proxy's port", &frame, Err(ProxyPort));
        }
        to(&mut mesh, "a datagram", &into(others(net.friend, UDP), &udp(1, 80, &[])), PAST);
        to(&mut mesh, "of nothing", &into(others(net.friend, TCP), &tcp(1, 80, ACK)), Err(NoFlow));
    }
    let told = mesh.0.told();
    let denied = told.iter().filter(|event| event.kind == EventKind::Denied(Proxy)).count();
    assert!(denied >= 4, "{denied} missing proxies were told of: {told:?}");
}

#[test]
fn addresses_that_would_be_the_proxys_own_are_nobodys() {
    let Some(mut mesh) = Mesh::new("addresses that are nobody's to a mesh") else { return };
    let nowhere = ["127.0.0.1", "127.9.9.9", "0.0.0.0", "0.1.2.3"];
    let nowhere6 = ["::", "::1", "::ffff:10.0.0.2", "::ffff:127.0.0.1", "::10.0.0.2"];
    for (net, addresses) in nets().into_iter().zip([&nowhere[..], &nowhere6]) {
        for address in addresses {
            let frame = out(Ip::new(net.own, ip(address), TCP), &tcp(1000, 80, SYN));
            mesh.check(address, MeshFromVm, &frame, Err(ProxyPort));
        }
    }
}

/// What the proxy has opened or was given in the pod's name is not the VM's to go on with.
#[test]
fn the_proxys_flows_are_not_the_vms() {
    let Some(mut mesh) = Mesh::new("whose a meshed pod's flows are") else { return };
    for net in nets() {
        let there = |flags| out(Ip::new(net.own, net.friend, TCP), &tcp(2000, 80, flags));
        let back = |flags| into(Ip::new(net.friend, net.own, TCP), &tcp(80, 2000, flags));
        mesh.check("the proxy opens", MeshOut, &there(SYN), STACK);
        mesh.check("the VM goes on", MeshFromVm, &there(ACK), Err(NoFlow));
        mesh.check("the answer", MeshToVm, &back(SYN | ACK), STACK);
        mesh.check("the VM goes on", MeshFromVm, &there(ACK), Err(NoFlow));
        mesh.check("the proxy goes on", MeshOut, &there(ACK), STACK);
        // As judged as the VM is.
        let apart = out(Ip::new(net.own, net.blue, TCP), &tcp(2000, 81, SYN));
        mesh.check("the proxy opens across tenants", MeshOut, &apart, Err(Tenant));
        let spoofed = out(Ip::new(net.friend, net.blue, TCP), &tcp(2000, 80, SYN));
        mesh.check("the proxy spoofs", MeshOut, &spoofed, Err(SpoofedAddress));
        // Its datagrams are answered to it, the VM's to the VM.
        let there = |port| out(Ip::new(net.own, net.cluster, UDP), &udp(port, 53, &[]));
        let back = |port| into(Ip::new(net.cluster, net.own, UDP), &udp(53, port, &[]));
        mesh.check("the proxy asks", MeshOut, &there(3000), STACK);
        mesh.check("the answer", MeshToVm, &back(3000), STACK);
        mesh.check("the VM asks", MeshFromVm, &there(3001), PAST);
        mesh.check("the answer", MeshToVm, &back(3001), PAST);
    }
    let counted = mesh.0.maps().counters(1).unwrap().unwrap();
    // Three packets of each side let through and counted for each family, with those of the VM.
    assert_eq!(counted.packets, [2 * 4, 2 * 3], "what passes twice is counted once");
    assert_eq!(counted.dropped(Side::Vm, NoFlow), 2 * 2);
}

/// The node's own connections, and those that have the addresses which istio-cni gives a kubelet's.
#[test]
fn probes_pass_the_proxy() {
    let Some(mut mesh) = Mesh::new("probes of a meshed pod") else { return };
    mesh.0.allow(Scope::Service { class: NODE, opener: Side::Peer }, Ports::Any);
    mesh.0.apply();
    for net in nets() {
        mesh.0.node_address(net.node);
        let istio = ip(if net.own.is_ipv4() {
            "169.254.7.127"
        } else {
            "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"
        });
        for (from, allowed) in [(net.node, true), (istio, false)] {
            let there = into(Ip::new(from, net.own, TCP), &tcp(1000, 80, SYN));
            let back = |flags| out(Ip::new(net.own, from, TCP), &tcp(80, 1000, flags));
            if allowed {
                mesh.check("probe", MeshToVm, &there, PAST);
                mesh.check("its answer", MeshFromVm, &back(SYN | ACK), PAST);
                mesh.check("its data", MeshFromVm, &back(ACK), PAST);
            } else {
                // The policy has not heard of these.
                mesh.check("probe", MeshToVm, &there, Err(Unknown));
            }
            let open = out(Ip::new(net.own, from, TCP), &tcp(1001, 80, SYN));
            mesh.check("the VM opens to the node", MeshFromVm, &open, Err(Proxy));
        }
    }
}

/// Answers about the link are for the guest and the stack, questions for the guest alone.
#[test]
fn answers_about_the_link_are_for_both() {
    let Some(mut mesh) = Mesh::new("a meshed pod's link") else { return };
    let arp = |operation| {
        let body = arp(operation, (OTHER, [10, 0, 0, 2]), (POD, [10, 0, 0, 1]));
        ethernet(POD, OTHER, ARP, &body)
    };
    let discover = |kind| {
        let body = discovery(kind, Some(if kind == 135 { "fd00::1" } else { "fd00::2" }), &[]);
        into(Ip::new(ip("fd00::2"), ip("fd00::1"), ICMP6).hops(255), &body)
    };
    mesh.check("an ARP question", MeshToVm, &arp(1), PAST);
    mesh.check("an ARP answer", MeshToVm, &arp(2), STACK);
    mesh.check("who is it", MeshToVm, &discover(135), PAST);
    mesh.check("it is me", MeshToVm, &discover(136), STACK);
}

/// The stack has nothing to say to the VM but the proxy's.
#[test]
fn only_the_proxy_speaks_to_the_vm() {
    let Some(mut mesh) = Mesh::new("what a meshed pod's VM is sent") else { return };
    for net in nets() {
        let to = |proto| Ip::new(net.friend, net.own, proto);
        mesh.check("the proxy", MeshIn, &into(to(TCP), &tcp(1000, 80, SYN)), STACK);
        mesh.check("a datagram", MeshIn, &into(to(UDP), &udp(1000, 80, &[])), Err(Protocol));
        mesh.check("an answer unasked", MeshIn, &into(to(UDP), &udp(15053, 80, &[])), Err(NoFlow));
        let ping = into(to(net.icmp), &icmp(net.ask, 1, &[]));
        mesh.check("a ping", MeshIn, &ping, Err(Protocol));
    }
    let body = arp(1, (OTHER, [10, 0, 0, 2]), (POD, [10, 0, 0, 1]));
    mesh.check("ARP", MeshIn, &ethernet(POD, OTHER, ARP, &body), Err(EtherType));
}

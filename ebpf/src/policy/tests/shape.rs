//! What the verifier and a packet cost, and that the maps are as `abi` says.

use std::time::Duration;

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, include_bytes_aligned};

use super::frames::*;
use super::{World, cases, tell};
use crate::policy::Reason;
use crate::policy::abi::Side;
use crate::policy::attach::Program;

/// Instructions that the verifier may have to go through for a program; Linux 6.1 goes through the most.
const BUDGET: u32 = 65_536;

#[test]
fn the_verifier_keeps_its_budget() {
    let Some(mut world) = World::new("the budget of the policy's programs") else { return };
    for program in Program::ALL {
        let (count, name) = (world.policy.verified(program).unwrap(), program.name());
        tell(&format!("{name}: {count:?} verified instructions of {BUDGET}"));
        assert!(count.is_some_and(|count| count <= BUDGET), "{name}: {count:?}");
    }
}

#[test]
fn reasons_are_numbered_as_in_the_programs() {
    for (index, reason) in Reason::ALL.iter().enumerate() {
        assert_eq!(*reason as usize, index + 1);
        assert_eq!(Reason::from_number(*reason as u32), Some(*reason));
        assert!(!reason.to_string().is_empty());
    }
    assert_eq!(Reason::from_number(0), None);
    assert_eq!(Reason::from_number(u32::MAX), None);
}

/// The time of a run of the program that only redirects.
fn wire(repeat: u32) -> Duration {
    let mut object = Ebpf::load(include_bytes_aligned!(env!("JOEY_WIRE_OBJECT"))).unwrap();
    let program: &mut SchedClassifier = object.program_mut("wire").unwrap().try_into().unwrap();
    program.load().unwrap();
    let options = TestRunOptions { data_in: Some(&[0; 64]), repeat, ..TestRunOptions::default() };
    program.test_run(options).unwrap().duration
}

#[test]
fn a_packet_costs_what_is_told() {
    const REPEAT: u32 = 200_000;
    let Some(mut world) = World::new("the cost of the policy's programs") else { return };
    cases::node(&mut world);
    world.apply();
    tell(&format!("the wire, which judges nothing: {} ns a packet", wire(REPEAT).as_nanos()));
    let stray = world.policy.run(Side::Vm, 9, &[0; 64], REPEAT).unwrap();
    tell(&format!("a packet of no pod: {} ns", stray.time.as_nanos()));
    for net in cases::nets() {
        let ip = |proto| Ip::new(net.own, net.blue, proto);
        let back = |proto| Ip::new(net.blue, net.own, proto);
        let data = tcp(1000, 80, ACK);
        let answer = tcp(80, 1000, SYN | ACK);
        let runs = [
            ("opening across tenants", Side::Vm, cases::out(ip(TCP), &tcp(1000, 80, SYN))),
            ("an answer to it", Side::Peer, cases::into(back(TCP), &answer)),
            ("a segment from the VM", Side::Vm, cases::out(ip(TCP), &data)),
            ("a segment to the VM", Side::Peer, cases::into(back(TCP), &tcp(80, 1000, ACK))),
            (
                "UDP within the tenant",
                Side::Vm,
                cases::out(Ip::new(net.own, net.friend, UDP), &udp(1000, 53, &[0; 100])),
            ),
            ("a drop across tenants", Side::Vm, cases::out(ip(UDP), &udp(1000, 80, &[]))),
            (
                "a drop of a spoofed address",
                Side::Vm,
                cases::out(Ip::new(net.friend, net.blue, UDP), &udp(1000, 80, &[])),
            ),
        ];
        for (name, side, frame) in runs {
            let outcome = world.policy.run(side, 1, &frame, REPEAT).unwrap();
            let nanoseconds = outcome.time.as_nanos();
            let family = if net.own.is_ipv4() { "IPv4" } else { "IPv6" };
            tell(&format!("{family}, {name}: {nanoseconds} ns a packet ({:?})", outcome.decision));
        }
    }
}

//! Both sides' packets of one flow on two CPUs at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::frames::*;
use super::*;

/// Flows of which each is finished by both sides at once: in some of so many they meet.
const FLOWS: usize = 30_000;

/// Waits for the other side, awake: whoever is woken comes too late.
fn meet(at: &AtomicUsize, moment: usize) {
    at.fetch_add(1, Ordering::AcqRel);
    let begun = Instant::now();
    while at.load(Ordering::Acquire) < 2 * moment {
        assert!(begun.elapsed() < Duration::from_secs(30), "the other side has ended");
    }
}

#[test]
fn a_flow_that_both_sides_finish_at_once_has_ended() {
    let Some(mut world) = World::new("a flow finished on two CPUs at once") else { return };
    if std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() < 2) {
        return tell("SKIPPED a flow finished on two CPUs at once: needs two CPUs");
    }
    let net = &cases::nets()[0];
    cases::node(&mut world);
    world.apply();
    let out = |flags| cases::out(Ip::new(net.own, net.friend, TCP), &tcp(1000, 80, flags));
    let into = |flags| cases::into(Ip::new(net.friend, net.own, TCP), &tcp(80, 1000, flags));
    let World { policy, ring, .. } = &mut world;
    let (policy, at) = (&*policy, AtomicUsize::new(0));
    let run = |side, frame: &[u8]| policy.run(side, 1, frame, 1).unwrap().decision.unwrap();
    let (mut wrong, mut told, mut key) = (Vec::new(), 0, None);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let last = into(FIN | ACK);
            for number in 0..FLOWS {
                meet(&at, 2 * number + 1);
                run(Side::Peer, &last);
                meet(&at, 2 * number + 2);
            }
        });
        let (first, answer, last) = (out(SYN), into(SYN | ACK), out(FIN | ACK));
        for number in 0..FLOWS {
            run(Side::Vm, &first);
            run(Side::Peer, &answer);
            meet(&at, 2 * number + 1);
            run(Side::Vm, &last);
            meet(&at, 2 * number + 2);
            let key = key.get_or_insert_with(|| policy.maps.flows(0).unwrap()[0].0);
            let flow = policy.maps.flow(0, key).unwrap().unwrap();
            let mut ends = 0;
            while let Some(event) = ring.next() {
                let event = Event::decode(event[..].try_into().unwrap()).unwrap();
                ends += usize::from(event.kind == EventKind::Ended);
            }
            // Not all are told: a pod may tell so many in a second.
            if (flow.finished, flow.state) != (3, State::Closed) || ends > 1 {
                wrong.push((number, flow.finished, flow.state, ends));
            }
            told += ends;
            policy.maps.remove_flow(0, key).unwrap();
        }
    });
    assert!(wrong.is_empty(), "{} of {FLOWS}, as {:?}", wrong.len(), wrong[0]);
    assert!(told > 100, "{told} ends are told");
}

//! Both sides' packets of one flow on two CPUs at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::frames::*;
use super::*;

/// Flows of which each is finished by both sides at once, or as many as this time allows: in some they meet.
const FLOWS: usize = 30_000;
const TIME: Duration = Duration::from_secs(5);

/// Waits for the other side, awake: whoever is woken comes too late.
fn meet(at: &AtomicUsize, moment: usize) {
    at.fetch_add(1, Ordering::AcqRel);
    let (mut looks, begun) = (0_u32, Instant::now());
    while at.load(Ordering::Acquire) < 2 * moment {
        looks += 1;
        if looks > 2000 {
            // It has no CPU.
            std::thread::yield_now();
            assert!(begun.elapsed() < 12 * TIME, "the other side has ended");
        }
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
    let (policy, at, over) = (&*policy, AtomicUsize::new(0), AtomicBool::new(false));
    let run = |side, frame: &[u8]| policy.run(side, 1, frame, 1).unwrap().decision.unwrap();
    let (mut wrong, mut told, mut key, mut all) = (Vec::new(), 0, None, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let last = into(FIN | ACK);
            for moment in (1..).step_by(2) {
                meet(&at, moment);
                // Whoever is the quicker one, it is so by another time each time.
                (0..moment % 64).for_each(|_| std::hint::spin_loop());
                run(Side::Peer, &last);
                let ends = over.load(Ordering::Acquire);
                meet(&at, moment + 1);
                if ends {
                    return;
                }
            }
        });
        let (first, answer, last) = (out(SYN), into(SYN | ACK), out(FIN | ACK));
        let begun = Instant::now();
        while !over.load(Ordering::Acquire) {
            run(Side::Vm, &first);
            run(Side::Peer, &answer);
            over.store(all + 1 == FLOWS || begun.elapsed() > TIME, Ordering::Release);
            meet(&at, 2 * all + 1);
            run(Side::Vm, &last);
            meet(&at, 2 * all + 2);
            all += 1;
            let key = key.get_or_insert_with(|| policy.maps.flows(0).unwrap()[0].0);
            let flow = policy.maps.flow(0, key).unwrap().unwrap();
            let mut ends = 0;
            while let Some(event) = ring.next() {
                let event = Event::decode(event[..].try_into().unwrap()).unwrap();
                ends += usize::from(event.kind == EventKind::Ended);
            }
            // Not all are told: a pod may tell so many in a second.
            if (flow.finished, flow.state) != (3, State::Closed) || ends > 1 {
                wrong.push((flow.finished, flow.state, ends));
            }
            told += ends;
            policy.maps.remove_flow(0, key).unwrap();
        }
    });
    tell(&format!("{all} flows finished by both sides at once"));
    assert!(wrong.is_empty(), "{} of {all}, as {:?}", wrong.len(), wrong[0]);
    assert!(told > 0, "no end is told");
}

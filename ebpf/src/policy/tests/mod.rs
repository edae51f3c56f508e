//! The programs, run by BPF_PROG_TEST_RUN, beside the model: by a table of cases (`table`), over random
//! packets (`random`), and their layouts and cost (`shape`).

use std::io;
use std::net::IpAddr;

use super::Reason;
use super::abi::{Allow, Counters, Flow, Identity, Pod, PodId, Prefix, Service, Side};
use super::loader::Policy;
use super::model::Model;

mod cases;
mod device;
mod frames;
mod link;
mod random;
mod replies;
mod shape;
mod table;

type Decision = Result<(), Reason>;

/// Not by a macro, whose output a harness keeps for itself when a test passes.
fn tell(words: &str) {
    let _ = io::Write::write_all(&mut io::stdout(), format!("\n{words}\n").as_bytes());
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Monotonic nanoseconds, as the programs see them.
fn now() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    u64::try_from(time.tv_sec() * 1_000_000_000 + time.tv_nsec()).unwrap()
}

/// The programs and the model, kept alike.
struct World {
    policy: Policy,
    model: Model,
}

impl World {
    /// `None` where it cannot be tested, which is told.
    fn new(what: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            tell(&format!("SKIPPED {what}: needs root"));
            return None;
        }
        Some(Self { policy: Policy::load_to_run().unwrap(), model: Model::default() })
    }

    fn pod(&mut self, id: PodId, pod: Pod, addresses: &[IpAddr]) {
        self.policy.put_pod(id, &pod, addresses).unwrap();
        self.model.pods.insert(id, pod);
        self.model.addresses.extend(addresses.iter().map(|address| (id, *address)));
    }

    fn identity(&mut self, address: IpAddr, bits: u8, identity: Identity) {
        let prefix = Prefix { address, bits };
        self.policy.put_identity(prefix, identity).unwrap();
        self.model.identities.insert(prefix, identity);
    }

    fn service(&mut self, service: Service) {
        self.policy.put_service(&service).unwrap();
        self.model.services.insert(service);
    }

    fn allow(&mut self, allow: Allow) {
        self.policy.put_allow(&allow).unwrap();
        self.model.allows.insert(allow);
    }

    fn disallow(&mut self, allow: Allow) {
        self.policy.remove_allow(&allow).unwrap();
        self.model.allows.remove(&allow);
    }

    /// What the program says, and the model.
    fn judge(&mut self, sender: Side, pod: PodId, frame: &[u8]) -> (Decision, Decision) {
        let program = match self.policy.run(sender, pod, frame, 1) {
            Ok(outcome) => outcome.decision,
            Err(error) => panic!("{error}, {} bytes from {sender:?}: {frame:02x?}", frame.len()),
        };
        (program, self.model.judge(sender, pod, frame, now()))
    }

    /// Makes everything that was seen that much older; earlier than the machine's start, too.
    fn age(&mut self, seconds: u64) {
        let nanoseconds = seconds * 1_000_000_000;
        for (key, flow) in &mut self.model.flows {
            flow.seen = flow.seen.wrapping_sub(nanoseconds);
            let generation = self.policy.flow(key).unwrap().map_or(0, |flow| flow.generation);
            self.policy.put_flow(key, &Flow { generation, ..*flow }).unwrap();
        }
        for (key, seen) in &mut self.model.fragments {
            *seen = seen.wrapping_sub(nanoseconds);
            self.policy.put_fragment(key, *seen).unwrap();
        }
    }

    /// Compares the flows that were written down, but for the moment and the policy's generation.
    fn compare_flows(&mut self) {
        for (key, flow) in &self.model.flows {
            let mut known = self.policy.flow(key).unwrap().unwrap();
            known.seen = flow.seen;
            known.generation = flow.generation;
            assert_eq!(known, *flow, "{key:?}");
        }
    }

    fn compare_counters(&mut self) {
        let pods = std::iter::once(0).chain(self.model.pods.keys().copied());
        for pod in pods {
            let counted = self.policy.counters(pod).unwrap();
            let expected = self.model.counters.get(&pod).cloned();
            assert_eq!(counted, expected.unwrap_or_else(Counters::default), "pod {pod}");
        }
    }

    /// Forgets flows and fragments.
    fn forget(&mut self) {
        for (key, _) in self.model.flows.drain() {
            self.policy.remove_flow(&key).unwrap();
        }
        for (key, _) in self.model.fragments.drain() {
            self.policy.remove_fragment(&key).unwrap();
        }
    }

    /// Forgets the policy, too.
    fn clear(&mut self) {
        self.forget();
        for (prefix, _) in self.model.identities.drain() {
            self.policy.remove_identity(prefix).unwrap();
        }
        for service in self.model.services.drain() {
            self.policy.remove_service(&service).unwrap();
        }
        for allow in self.model.allows.drain() {
            self.policy.remove_allow(&allow).unwrap();
        }
        let addresses: Vec<_> = self.model.addresses.drain().collect();
        for (pod, _) in self.model.pods.drain() {
            let own = addresses.iter().filter(|(id, _)| *id == pod).map(|(_, address)| *address);
            self.policy.remove_pod(pod, &own.collect::<Vec<_>>()).unwrap();
            self.model.counters.remove(&pod);
        }
    }
}

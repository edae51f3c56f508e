//! The programs, run by BPF_PROG_TEST_RUN, beside the model: by a table of cases (`table`), over random
//! packets (`random`), and their layouts and cost (`shape`).

use std::io;
use std::net::IpAddr;

use aya::maps::{MapData, RingBuf};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Reason;
use super::abi::{
    Counters, Event, EventKind, Flow, Identity, Local, Pod, PodId, Ports, Prefix, Rule, Scope,
    Side, State, Tenant,
};
use super::loader::Policy;
use super::maps::{Lock, Maps, is_link_local};
use super::model::{Model, Tables};

mod cases;
mod device;
mod events;
mod frames;
mod limit;
mod link;
mod mesh;
mod narrow;
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

/// A pod that is limited by nothing, whose flows may be as old as a test makes them.
fn pod(tenant: Tenant, mac: [u8; 6]) -> Pod {
    let since = now().wrapping_sub(1 << 62);
    Pod { since, name: 0, tenant, space: 0, table: 0, limited: false, mac }
}

/// For maps that nobody else has.
fn alone() -> Lock {
    let file = memfd_create("lock", MFdFlags::MFD_CLOEXEC).unwrap();
    Lock::of(file.into()).unwrap()
}

/// Makes a pod, or another one of it.
fn put_pod(maps: &Maps, id: PodId, pod: &Pod, own: &[IpAddr]) {
    if !maps.add_pod(id, pod, own).unwrap() {
        maps.change_pod(&alone(), id, pod, own).unwrap();
    }
}

/// One port of a protocol, or all for 0.
fn port(proto: u8, port: u16) -> Ports {
    if port == 0 { Ports::Protocol(proto) } else { Ports::Prefix { proto, port, bits: 16 } }
}

/// An event without what a clock or a counter of changes says.
fn timeless(event: Event) -> Event {
    let flow = match event.kind {
        EventKind::Denied(_) => {
            Flow { state: State::New, finished: 0, packets: [0; 2], bytes: [0; 2], ..event.flow }
        }
        _ => event.flow,
    };
    Event { flow: Flow { seen: 0, begun: 0, generation: 0, ..flow }, ..event }
}

/// The programs and the model, kept alike.
struct World {
    policy: Policy,
    model: Model,
    ring: RingBuf<MapData>,
    epoch: u32,
    /// Whether the model's tables are others than the epoch's.
    changed: bool,
}

impl World {
    /// `None` where it cannot be tested, which is told.
    fn new(what: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            tell(&format!("SKIPPED {what}: needs root"));
            return None;
        }
        Some(Self::of(Policy::load_to_run().unwrap()))
    }

    fn of(mut policy: Policy) -> Self {
        let ring = policy.take_events();
        Self { policy, model: Model::default(), ring, epoch: 0, changed: true }
    }

    fn maps(&self) -> &Maps {
        &self.policy.maps
    }

    fn pod(&mut self, id: PodId, pod: Pod, addresses: &[IpAddr]) {
        put_pod(self.maps(), id, &pod, addresses);
        self.model.pods.insert(id, pod);
        self.model.addresses.extend(addresses.iter().map(|address| (id, *address)));
        let local = Local { name: pod.name, tenant: pod.tenant, pod: id };
        let named = addresses.iter().filter(|ip| !is_link_local(**ip));
        self.model.tables.locals.extend(named.map(|address| (*address, local)));
    }

    fn remove_pod(&mut self, id: PodId) {
        let own = self.model.addresses.iter().filter(|(pod, _)| *pod == id);
        let own: Vec<_> = own.map(|(_, address)| *address).collect();
        self.maps().remove_pod(&alone(), id, &own).unwrap();
        self.model.pods.remove(&id);
        self.model.addresses.retain(|(pod, _)| *pod != id);
        self.model.tables.locals.retain(|_, local| local.pod != id);
        self.model.counters.remove(&id);
    }

    fn node_address(&mut self, address: IpAddr) {
        self.maps().put_node_addresses(&[address]).unwrap();
        let node = Local { name: 0, tenant: 0, pod: 0 };
        self.model.tables.locals.entry(address).or_insert(node);
    }

    fn identity(&mut self, address: IpAddr, bits: u8, identity: Identity) {
        self.model.tables.identities.insert(Prefix { address, bits }, identity);
        self.changed = true;
    }

    fn allow(&mut self, scope: Scope, ports: Ports) {
        self.model.tables.rules.insert(Rule { scope, ports });
        self.changed = true;
    }

    fn disallow(&mut self, scope: Scope, ports: Ports) {
        self.model.tables.rules.remove(&Rule { scope, ports });
        self.changed = true;
    }

    /// Writes the model's tables down as an epoch.
    fn write(&self, epoch: u32) {
        let tables = &self.model.tables;
        for (prefix, identity) in &tables.identities {
            self.maps().put_identity(epoch, *prefix, *identity).unwrap();
        }
        for rule in &tables.rules {
            self.maps().put_rule(epoch, rule).unwrap();
        }
        for (space, policy) in &tables.spaces {
            self.maps().put_space(epoch, *space, *policy).unwrap();
        }
    }

    /// Puts the model's tables in force, in place of what was.
    fn apply(&mut self) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        self.epoch += 1;
        self.write(self.epoch);
        let lock = alone();
        self.maps().activate(&lock, self.epoch).unwrap();
        self.maps().forget_others(&lock, self.epoch).unwrap();
    }

    /// What the program says, and the model.
    fn judge(&mut self, sender: Side, pod: PodId, frame: &[u8]) -> (Decision, Decision) {
        self.apply();
        let program = match self.policy.run(sender, pod, frame, 1) {
            Ok(outcome) => outcome.decision,
            Err(error) => panic!("{error}, {} bytes from {sender:?}: {frame:02x?}", frame.len()),
        };
        (program, self.model.judge(sender, pod, frame, now()))
    }

    fn table(&self, pod: PodId) -> u32 {
        self.model.pods.get(&pod).map_or(0, |pod| pod.table)
    }

    /// Makes everything that was seen that much older; earlier than the machine's start, too.
    fn age(&mut self, seconds: u64) {
        let nanoseconds = seconds * 1_000_000_000;
        let (maps, pods) = (&self.policy.maps, &self.model.pods);
        let table = |pod: PodId| pods.get(&pod).map_or(0, |pod| pod.table);
        for (key, flow) in &mut self.model.flows {
            flow.seen = flow.seen.wrapping_sub(nanoseconds);
            let known = maps.flow(table(key.pod), key).unwrap();
            let generation = known.map_or(0, |flow| flow.generation);
            maps.put_flow(table(key.pod), key, &Flow { generation, ..*flow }).unwrap();
        }
        for (key, seen) in &mut self.model.fragments {
            *seen = seen.wrapping_sub(nanoseconds);
            let flow = Flow {
                seen: *seen,
                begun: *seen,
                packets: [0; 2],
                bytes: [0; 2],
                opener: Side::Vm,
                state: State::New,
                finished: 0,
                generation: 0,
            };
            maps.put_fragment(table(key.pod), key, &flow).unwrap();
        }
    }

    /// Compares the flows that were written down, but for the moment and the policy's generation.
    fn compare_flows(&self) {
        for (key, flow) in &self.model.flows {
            let known = self.maps().flow(self.table(key.pod), key).unwrap().unwrap();
            let Flow { seen, begun, generation, .. } = *flow;
            assert_eq!(Flow { seen, begun, generation, ..known }, *flow, "{key:?}");
        }
        let mut denials = self.maps().denials().unwrap();
        assert_eq!(denials.len(), self.model.denials.len());
        for (key, denied) in &mut denials {
            let expected = self.model.denials[key];
            (denied.begun, denied.seen) = (expected.begun, expected.seen);
            assert_eq!(*denied, expected, "{key:?}");
        }
    }

    fn compare_counters(&self) {
        let pods = std::iter::once(0).chain(self.model.pods.keys().copied());
        for pod in pods {
            let counted = self.maps().counters(pod).unwrap().unwrap();
            let expected = self.model.counters.get(&pod).cloned();
            assert_eq!(counted, expected.unwrap_or_else(Counters::default), "pod {pod}");
        }
    }

    /// What was told since the last time.
    fn told(&mut self) -> Vec<Event> {
        let mut told = Vec::new();
        while let Some(event) = self.ring.next() {
            told.push(Event::decode(event[..].try_into().unwrap()).unwrap());
        }
        told
    }

    fn compare_events(&mut self) {
        let told: Vec<_> = self.told().into_iter().map(timeless).collect();
        let expected: Vec<_> = self.model.events.drain(..).map(timeless).collect();
        assert_eq!(told, expected);
    }

    /// Forgets flows, fragments and what was refused.
    fn forget(&mut self) {
        let flows: Vec<_> = self.model.flows.drain().collect();
        for (key, _) in flows {
            self.maps().remove_flow(self.table(key.pod), &key).unwrap();
        }
        let fragments: Vec<_> = self.model.fragments.drain().collect();
        for (key, _) in fragments {
            self.maps().remove_fragment(self.table(key.pod), &key).unwrap();
        }
        let denials: Vec<_> = self.model.denials.drain().collect();
        for (key, _) in denials {
            self.maps().remove_denied(&key).unwrap();
        }
    }

    /// Forgets pods and policy, too.
    fn clear(&mut self) {
        self.forget();
        let pods: Vec<_> = self.model.pods.keys().copied().collect();
        for pod in pods {
            self.remove_pod(pod);
        }
        let nodes: Vec<_> = self.model.tables.locals.keys().copied().collect();
        self.maps().remove_node_addresses(&nodes).unwrap();
        self.model.tables = Tables::default();
        self.changed = true;
    }
}

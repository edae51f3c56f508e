//! The book of flows: what is told by events, put right by what the tables say.
//!
//! Events may be missing (too many at once, or no daemon), and those of different CPUs may come in another order
//! than they happened. So nothing depends on an order: a flow is its key and when it began, an end without a
//! beginning makes a record of its own, a beginning after its end makes none, and every sweep finds what was not
//! told. Memory is bounded: the past is a ring, and of what lives a tenant has at most as much as is left for others;
//! what there is no room for is counted.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use joey_ebpf::policy::abi::{Denied, Event, EventKind, Flow, FlowKey, PodId, Side, Tenant};

use super::names::{Names, Who};
use super::record::{Direction, End, Filter, Phase, Record, Verdict, protocol};

mod sweep;

pub use sweep::Sweep;

/// Records of the past.
pub const PAST: usize = 65_536;
/// Records of what lives, flows and refused attempts: twice what a tenant's own tables hold, so that the first tenant
/// with many has room for all of them, and others have as much. About 80 MiB.
pub const LIVING: usize = 131_072;
/// Refused attempts are forgotten after so long a silence, so that they are told anew.
pub const DENIAL_SILENCE: Duration = Duration::from_secs(60);

/// Where monotonic time is on the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// Nanoseconds since 1970 when the monotonic clock was 0.
    pub boot: u64,
}

impl Clock {
    fn ms(self, monotonic: u64) -> u64 {
        self.boot.saturating_add(monotonic) / 1_000_000
    }
}

fn age(from: u64, to: u64) -> Duration {
    Duration::from_nanos(to.saturating_sub(from))
}

#[derive(Debug)]
struct Live {
    begun: u64,
    seen: u64,
    /// When the book heard of it last.
    noted: u64,
    record: Record,
}

/// The book.
#[derive(Debug)]
pub struct Book {
    clock: Clock,
    past_limit: usize,
    living_limit: usize,
    flows: HashMap<FlowKey, Live>,
    denials: HashMap<FlowKey, Live>,
    /// How many of these two each tenant has, by its pods.
    living: HashMap<String, usize>,
    past: VecDeque<Arc<Record>>,
    /// How many of the past's records each tenant has, by its pods.
    shares: HashMap<String, usize>,
    /// Of flows that ended lately: when they began and ended.
    ended: HashMap<FlowKey, (u64, u64)>,
    told: Vec<Arc<Record>>,
    next: u64,
    /// Records of the past that made room for others.
    pub dropped: u64,
    /// Flows and attempts that were told of and had no room.
    pub unkept: u64,
    /// Those without room that the last sweep found.
    pub homeless: usize,
    /// Names of those at both ends.
    pub names: Names,
}

/// The peer as an event tells of it.
#[derive(Debug, Clone, Copy, Default)]
struct Told {
    tenant: Tenant,
    peer_tenant: Tenant,
    peer_pod: PodId,
    node: bool,
}

impl Book {
    /// An empty one that keeps so many records of the past, and so many of what lives.
    #[must_use]
    pub fn new(clock: Clock, past_limit: usize, living_limit: usize, names: Names) -> Self {
        Self {
            clock,
            past_limit,
            living_limit,
            living: HashMap::new(),
            unkept: 0,
            homeless: 0,
            flows: HashMap::new(),
            denials: HashMap::new(),
            past: VecDeque::new(),
            shares: HashMap::new(),
            ended: HashMap::new(),
            told: Vec::new(),
            next: 1,
            dropped: 0,
            names,
        }
    }

    /// What was begun or has ended since this was asked last.
    pub fn take_told(&mut self) -> Vec<Arc<Record>> {
        std::mem::take(&mut self.told)
    }

    /// Flows that live.
    #[must_use]
    pub fn open(&self) -> usize {
        self.flows.len()
    }

    /// Refused attempts that are still repeated.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.denials.len()
    }

    /// The records that a filter wants, the oldest first.
    #[must_use]
    pub fn select(&self, filter: &Filter) -> Vec<Arc<Record>> {
        let mut found: Vec<Arc<Record>> =
            self.past.iter().filter(|record| filter.fits(record)).cloned().collect();
        let live = self.flows.values().chain(self.denials.values());
        let live = live.filter(|live| filter.fits(&live.record));
        found.extend(live.map(|live| Arc::new(live.record.clone())));
        found.sort_by_key(|record| (record.seen_ms, record.id));
        let limit = filter.limit.unwrap_or(usize::MAX);
        found.split_off(found.len().saturating_sub(limit))
    }

    /// Notes what a program told, at `now`.
    pub fn note(&mut self, event: &Event, now: u64) {
        let told = Told {
            tenant: event.tenant,
            peer_tenant: event.peer_tenant,
            peer_pod: event.peer_pod,
            node: event.peer_service == joey_ebpf::policy::abi::NODE,
        };
        let (key, flow) = (&event.key, &event.flow);
        match event.kind {
            EventKind::Opened => self.unkept += u64::from(!self.flow(key, flow, told, now, None)),
            EventKind::Ended => {
                self.flow(key, flow, told, now, Some(end_of(flow)));
                self.end_flow(key, flow.begun, end_of(flow));
            }
            EventKind::Denied(reason) => {
                let (begun, seen) = (flow.begun, flow.seen);
                let denied = Denied { begun, seen, packets: 1, reason, opener: flow.opener };
                self.unkept += u64::from(!self.denial(key, &denied, told, now));
            }
        }
    }

    /// Takes room for one more that lives; `false` if its tenant has as many as there is room left.
    fn take_room(&mut self, record: &Record) -> bool {
        let left = self.living_limit.saturating_sub(self.flows.len() + self.denials.len());
        let own = self.living.entry(record.pod.tenant.clone()).or_default();
        let fits = *own < left;
        *own += usize::from(fits);
        fits
    }

    /// Whether there is room for another that ended lately.
    fn remembers_ends(&self) -> bool {
        self.ended.len() < self.living_limit
    }

    fn give_room(&mut self, record: &Record) {
        match self.living.get_mut(&record.pod.tenant) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(self.living.remove(&record.pod.tenant)),
        }
    }

    /// Brings a flow up to date, or begins its record; of one that has ended already, `end` says how, and it needs no
    /// room among those that live. `false` if there is no room.
    fn flow(
        &mut self,
        key: &FlowKey,
        flow: &Flow,
        told: Told,
        now: u64,
        end: Option<Phase>,
    ) -> bool {
        if let Some(&(begun, _)) = self.ended.get(key)
            && flow.begun <= begun
        {
            return true;
        }
        match self.flows.get(key).map(|live| live.begun) {
            Some(begun) if begun > flow.begun => return true,
            Some(begun) if begun < flow.begun => self.end_flow(key, begun, Phase::Evicted),
            _ => {}
        }
        if !self.flows.contains_key(key) {
            let mut record = self.record(key, flow.opener, (flow.begun, flow.seen), told);
            count(&mut record, flow);
            if !self.take_room(&record) {
                let Some(state) = end.filter(|_| self.remembers_ends()) else { return false };
                self.ended.insert(*key, (flow.begun, flow.seen));
                self.finish(record, state);
                return true;
            }
            self.told.push(Arc::new(record.clone()));
            let live = Live { begun: flow.begun, seen: flow.seen, noted: now, record };
            self.flows.insert(*key, live);
        } else if let Some(live) = self.flows.get_mut(key)
            && flow.seen >= live.seen
        {
            live.seen = flow.seen;
            live.noted = now;
            live.record.seen_ms = self.clock.ms(flow.seen);
            count(&mut live.record, flow);
        }
        true
    }

    /// The same of a refused attempt.
    fn denial(&mut self, key: &FlowKey, denied: &Denied, told: Told, now: u64) -> bool {
        match self.denials.get(key).map(|live| live.begun) {
            Some(begun) if begun > denied.begun => return true,
            Some(begun) if begun < denied.begun => self.end_denial(key, Phase::Evicted),
            _ => {}
        }
        if !self.denials.contains_key(key) {
            let mut record = self.record(key, denied.opener, (denied.begun, denied.seen), told);
            record.verdict = Verdict::Drop;
            refuse(&mut record, denied);
            if !self.take_room(&record) {
                return false;
            }
            self.told.push(Arc::new(record.clone()));
            let live = Live { begun: denied.begun, seen: denied.seen, noted: now, record };
            self.denials.insert(*key, live);
        } else if let Some(live) = self.denials.get_mut(key)
            && denied.seen >= live.seen
        {
            live.seen = denied.seen;
            live.noted = now;
            live.record.seen_ms = self.clock.ms(denied.seen);
            refuse(&mut live.record, denied);
        }
        true
    }

    fn record(&mut self, key: &FlowKey, opener: Side, time: (u64, u64), told: Told) -> Record {
        let own = self.names.pod(key.pod, time.0);
        let own = own.map_or_else(
            || Who { tenant: self.names.tenant(told.tenant), name: String::new() },
            |who| (*who).clone(),
        );
        let peer = self.peer(key, time.0, told);
        let id = self.next;
        self.next += 1;
        Record {
            id,
            begun_ms: self.clock.ms(time.0),
            seen_ms: self.clock.ms(time.1),
            state: Phase::Open,
            verdict: Verdict::Allow,
            reason: None,
            proto: protocol(key.proto),
            direction: match opener {
                Side::Vm => Direction::Egress,
                Side::Peer => Direction::Ingress,
            },
            pod: end(key.local, key.local_port, own),
            peer: end(key.remote, key.remote_port, peer),
            egress_packets: 0,
            egress_bytes: 0,
            ingress_packets: 0,
            ingress_bytes: 0,
        }
    }

    fn peer(&mut self, key: &FlowKey, at: u64, told: Told) -> Who {
        if told.node {
            return Who { tenant: String::new(), name: "node".to_owned() };
        }
        if told.peer_pod != 0
            && let Some(who) = self.names.pod(told.peer_pod, at)
        {
            return (*who).clone();
        }
        let tenant = self.names.tenant(told.peer_tenant);
        match self.names.peer(key.remote) {
            // The table may be of another time than the flow.
            Some(who) if told.peer_tenant == 0 || who.tenant == tenant => (*who).clone(),
            _ => Who { tenant, name: String::new() },
        }
    }

    fn end_flow(&mut self, key: &FlowKey, begun: u64, state: Phase) {
        if self.flows.get(key).is_some_and(|live| live.begun == begun)
            && let Some(live) = self.flows.remove(key)
        {
            self.give_room(&live.record);
            // If it is not remembered, a beginning that is told late makes a record that a sweep ends.
            if self.remembers_ends() {
                self.ended.insert(*key, (live.begun, live.seen));
            }
            self.finish(live.record, state);
        }
    }

    fn end_denial(&mut self, key: &FlowKey, state: Phase) {
        if let Some(live) = self.denials.remove(key) {
            self.give_room(&live.record);
            self.finish(live.record, state);
        }
    }

    fn finish(&mut self, mut record: Record, state: Phase) {
        record.state = state;
        let record = Arc::new(record);
        self.told.push(Arc::clone(&record));
        if self.past.len() >= self.past_limit {
            self.make_room();
        }
        *self.shares.entry(record.pod.tenant.clone()).or_default() += 1;
        self.past.push_back(record);
    }

    /// Forgets the oldest record of the tenant that has the most: one that makes many pushes out its own.
    fn make_room(&mut self) {
        let most = self.shares.iter().max_by_key(|(_, count)| **count);
        let of = most.map(|(tenant, _)| tenant.clone()).unwrap_or_default();
        let at = self.past.iter().position(|record| record.pod.tenant == of).unwrap_or(0);
        if self.past.remove(at).is_some() {
            self.dropped += 1;
        }
        match self.shares.get_mut(&of) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(self.shares.remove(&of)),
        }
    }
}

fn end(address: std::net::IpAddr, port: u16, who: Who) -> End {
    End { address, port, tenant: who.tenant, name: who.name }
}

fn end_of(flow: &Flow) -> Phase {
    if flow.finished == 3 { Phase::Closed } else { Phase::Reset }
}

fn count(record: &mut Record, flow: &Flow) {
    [record.egress_packets, record.ingress_packets] = flow.packets;
    [record.egress_bytes, record.ingress_bytes] = flow.bytes;
}

fn refuse(record: &mut Record, denied: &Denied) {
    record.reason = Some(format!("{:?}", denied.reason));
    match denied.opener {
        Side::Vm => record.egress_packets = denied.packets,
        Side::Peer => record.ingress_packets = denied.packets,
    }
}

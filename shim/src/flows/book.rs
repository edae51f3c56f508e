//! The book of flows: what is told by events, put right by what the tables say.
//!
//! Events may be missing (too many at once, or no daemon), and those of different CPUs may come in another order
//! than they happened. So nothing depends on an order: a flow is its key and when it began, an end without a
//! beginning makes a record of its own, a beginning after its end makes none, and every sweep finds what was not
//! told. Memory is bounded: the past is a ring, and what lives has its place in the tables.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use joey_ebpf::policy::abi::{
    Denied, Event, EventKind, Flow, FlowKey, Pod, PodId, Side, State, Tenant,
};
use joey_ebpf::policy::maps::MapError;
use joey_ebpf::policy::model::lifetime;

use super::names::{Names, Who};
use super::record::{Direction, End, Filter, Phase, Record, Verdict, protocol};
use super::tables::Tables;

/// Records of the past.
pub const PAST: usize = 65_536;
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

/// What a sweep read from the tables; reading takes long, so it is apart from the book.
#[derive(Debug, Default)]
pub struct Sweep {
    /// Monotonic nanoseconds before it was read.
    pub now: u64,
    pods: HashMap<PodId, Pod>,
    flows: Vec<(FlowKey, Flow)>,
    denials: Vec<(FlowKey, Denied)>,
}

impl Sweep {
    /// Reads the tables of all pods, and the denials; those silent for long are removed from the map.
    pub fn read(tables: &impl Tables, now: u64) -> Result<Self, MapError> {
        let pods = tables.pods()?;
        let mut used: Vec<u32> = pods.values().map(|pod| pod.table).collect();
        used.sort_unstable();
        used.dedup();
        let mut flows = Vec::new();
        for table in used {
            flows.extend(tables.flows(table)?);
        }
        let mut denials = tables.denials()?;
        for (key, denied) in &denials {
            if age(denied.seen, now) >= DENIAL_SILENCE {
                tables.remove_denied(key)?;
            }
        }
        denials.retain(|(key, _)| pods.contains_key(&key.pod));
        Ok(Self { now, pods, flows, denials })
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
    flows: HashMap<FlowKey, Live>,
    denials: HashMap<FlowKey, Live>,
    past: VecDeque<Arc<Record>>,
    /// How many of the past's records each tenant has, by its pods.
    shares: HashMap<String, usize>,
    /// Of flows that ended lately: when they began and ended.
    ended: HashMap<FlowKey, (u64, u64)>,
    told: Vec<Arc<Record>>,
    next: u64,
    /// Records of the past that made room for others.
    pub dropped: u64,
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
    /// An empty one that keeps so many records of the past.
    #[must_use]
    pub fn new(clock: Clock, past_limit: usize, names: Names) -> Self {
        Self {
            clock,
            past_limit,
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
            EventKind::Opened => self.flow(key, flow, told, now),
            EventKind::Ended => {
                self.flow(key, flow, told, now);
                self.end_flow(key, flow.begun, end_of(flow));
            }
            EventKind::Denied(reason) => {
                let (begun, seen) = (flow.begun, flow.seen);
                let denied = Denied { begun, seen, packets: 1, reason, opener: flow.opener };
                self.denial(key, &denied, told, now);
            }
        }
    }

    /// Brings a flow up to date, or begins its record.
    fn flow(&mut self, key: &FlowKey, flow: &Flow, told: Told, now: u64) {
        if let Some(&(begun, _)) = self.ended.get(key)
            && flow.begun <= begun
        {
            return;
        }
        match self.flows.get(key).map(|live| live.begun) {
            Some(begun) if begun > flow.begun => return,
            Some(begun) if begun < flow.begun => self.end_flow(key, begun, Phase::Evicted),
            _ => {}
        }
        if !self.flows.contains_key(key) {
            let mut record = self.record(key, flow.opener, (flow.begun, flow.seen), told);
            count(&mut record, flow);
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
    }

    fn denial(&mut self, key: &FlowKey, denied: &Denied, told: Told, now: u64) {
        match self.denials.get(key).map(|live| live.begun) {
            Some(begun) if begun > denied.begun => return,
            Some(begun) if begun < denied.begun => self.end_denial(key, Phase::Evicted),
            _ => {}
        }
        if !self.denials.contains_key(key) {
            let mut record = self.record(key, denied.opener, (denied.begun, denied.seen), told);
            record.verdict = Verdict::Drop;
            refuse(&mut record, denied);
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
            self.ended.insert(*key, (live.begun, live.seen));
            self.finish(live.record, state);
        }
    }

    fn end_denial(&mut self, key: &FlowKey, state: Phase) {
        if let Some(live) = self.denials.remove(key) {
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

    /// Puts the book right by what the tables said; `locals` tells who the peers of unknown flows are.
    pub fn sweep(
        &mut self,
        sweep: &Sweep,
        tables: &impl Tables,
        whose: impl Fn(&FlowKey) -> Option<PodId>,
    ) -> Result<(), MapError> {
        let now = sweep.now;
        let told = |key: &FlowKey, pod: &Pod| Told {
            tenant: pod.tenant,
            peer_tenant: 0,
            peer_pod: whose(key).unwrap_or(0),
            node: whose(key) == Some(0),
        };
        for (key, flow) in &sweep.flows {
            let Some(pod) = sweep.pods.get(&key.pod) else { continue };
            // An earlier pod's of the same number.
            if flow.seen < pod.since {
                continue;
            }
            let over = age(flow.seen, now) >= lifetime(key.proto, flow.state);
            if over && self.flows.get(key).is_none_or(|live| live.begun != flow.begun) {
                continue;
            }
            self.flow(key, flow, told(key, pod), now);
            if flow.state == State::Closed {
                self.end_flow(key, flow.begun, end_of(flow));
            } else if over {
                self.end_flow(key, flow.begun, Phase::TimedOut);
            }
        }
        for (key, denied) in &sweep.denials {
            let Some(pod) = sweep.pods.get(&key.pod) else { continue };
            if denied.seen >= pod.since && age(denied.seen, now) < DENIAL_SILENCE {
                self.denial(key, denied, told(key, pod), now);
            }
        }
        self.missing(sweep, tables)?;
        self.ended.retain(|_, (_, seen)| age(*seen, now) < Duration::from_secs(60));
        Ok(())
    }

    /// Ends what the tables do not have any more.
    fn missing(&mut self, sweep: &Sweep, tables: &impl Tables) -> Result<(), MapError> {
        let now = sweep.now;
        let missing: Vec<(FlowKey, u64, u64)> = self
            .flows
            .iter()
            .filter(|(_, live)| live.noted < now)
            .map(|(key, live)| (*key, live.begun, live.seen))
            .collect();
        for (key, begun, seen) in missing {
            let Some(pod) = sweep.pods.get(&key.pod).filter(|pod| seen >= pod.since) else {
                self.end_flow(&key, begun, Phase::Gone);
                continue;
            };
            // A list of what changes may lack what is there.
            let there = tables.flow(pod.table, &key)?.filter(|flow| flow.begun == begun);
            match there {
                Some(flow) if flow.state != State::Closed => {
                    self.flow(&key, &flow, Told::default(), now);
                }
                Some(flow) => self.end_flow(&key, begun, end_of(&flow)),
                None => self.end_flow(&key, begun, Phase::Evicted),
            }
        }
        let silent: Vec<(FlowKey, Phase)> = self
            .denials
            .iter()
            .filter(|(_, live)| live.noted < now)
            .map(|(key, live)| {
                let there = sweep.pods.get(&key.pod).is_some_and(|pod| live.seen >= pod.since);
                let silent = age(live.seen, now) >= DENIAL_SILENCE;
                (
                    *key,
                    match (there, silent) {
                        (false, _) => Phase::Gone,
                        (true, true) => Phase::TimedOut,
                        (true, false) => Phase::Evicted,
                    },
                )
            })
            .collect();
        for (key, state) in silent {
            self.end_denial(&key, state);
        }
        Ok(())
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

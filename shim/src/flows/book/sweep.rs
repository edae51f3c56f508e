//! What the tables say, and the book put right by it.

use std::collections::HashMap;
use std::time::Duration;

use joey_ebpf::policy::abi::{Denied, Flow, FlowKey, Pod, PodId, State};
use joey_ebpf::policy::maps::MapError;
use joey_ebpf::policy::model::lifetime;

use super::super::record::Phase;
use super::super::tables::Tables;
use super::{Book, DENIAL_SILENCE, Told, age, end_of};

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

impl Book {
    /// Puts the book right by what the tables said; `locals` tells who the peers of unknown flows are.
    pub fn sweep(
        &mut self,
        sweep: &Sweep,
        tables: &impl Tables,
        whose: impl Fn(&FlowKey) -> Option<PodId>,
    ) -> Result<(), MapError> {
        let now = sweep.now;
        self.homeless = 0;
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
            let end = (flow.state == State::Closed).then(|| end_of(flow));
            if end.is_some() && !self.flows.contains_key(key) && !self.remembers_ends() {
                // It may have its record already.
                continue;
            }
            let kept = self.flow(key, flow, told(key, pod), now, end);
            self.homeless += usize::from(!kept);
            if let Some(state) = end {
                self.end_flow(key, flow.begun, state);
            } else if over {
                self.end_flow(key, flow.begun, Phase::TimedOut);
            }
        }
        for (key, denied) in &sweep.denials {
            let Some(pod) = sweep.pods.get(&key.pod) else { continue };
            if denied.seen >= pod.since && age(denied.seen, now) < DENIAL_SILENCE {
                let kept = self.denial(key, denied, told(key, pod), now);
                self.homeless += usize::from(!kept);
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
                    self.flow(&key, &flow, Told::default(), now, None);
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

//! Names of those at both ends of a flow.
//!
//! Pods of this node are known by their sandboxes' records, others by the identity table, tenants by the map
//! of names. What is not known is looked for once a second at most, and a pod as soon as its number is given
//! to it; one that is gone keeps its name until its number was given twice more.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use joey_ebpf::policy::abi::{PodId, Tenant};
use joey_ebpf::policy::maps::{Maps, directory};

use crate::policy::state::Store;
use crate::sandbox::record::Record;

/// How often what is not known is looked for.
const PAUSE: Duration = Duration::from_secs(1);
/// Pods that are remembered for one number.
const REMEMBERED: usize = 3;

/// Who somebody is. Empty: not known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Who {
    /// The tenant's name.
    pub tenant: String,
    /// `namespace/name`.
    pub name: String,
}

/// Where names come from.
#[derive(Debug, Clone)]
pub struct Places {
    /// The sandboxes' records.
    pub run_dir: PathBuf,
    /// The identity table.
    pub state_dir: PathBuf,
    /// Where the maps are pinned.
    pub bpf_dir: PathBuf,
    /// The maps.
    pub maps: Arc<Maps>,
}

/// What is known.
#[derive(Debug, Default)]
pub struct Names {
    places: Option<Places>,
    /// With the time from which on the number was this pod's; ascending.
    pods: HashMap<PodId, Vec<(u64, Arc<Who>)>>,
    /// The last time from which on a number was somebody's who was looked for.
    sought: HashMap<PodId, u64>,
    peers: HashMap<IpAddr, Arc<Who>>,
    peers_of: Option<SystemTime>,
    tenants: HashMap<Tenant, String>,
    read: Option<Instant>,
}

impl Names {
    /// Nothing yet; looks in these places when asked.
    #[must_use]
    pub fn new(places: Places) -> Self {
        Self { places: Some(places), ..Self::default() }
    }

    /// A pod that has a number from a time on.
    pub fn put_pod(&mut self, id: PodId, since: u64, who: Who) {
        let known = self.pods.entry(id).or_default();
        known.retain(|(other, _)| *other != since);
        known.push((since, Arc::new(who)));
        known.sort_by_key(|(since, _)| *since);
        if known.len() > REMEMBERED {
            known.remove(0);
        }
    }

    /// A tenant's name.
    pub fn put_tenant(&mut self, number: Tenant, name: &str) {
        self.tenants.insert(number, name.to_owned());
    }

    /// Who has an address elsewhere.
    pub fn put_peer(&mut self, address: IpAddr, who: Who) {
        self.peers.insert(address, Arc::new(who));
    }

    /// The pod that had a number at a time (monotonic nanoseconds).
    pub fn pod(&mut self, id: PodId, at: u64) -> Option<Arc<Who>> {
        let given = self.given(id).filter(|since| *since <= at);
        // Its record was there before it had the number, so that one look is enough.
        if given.is_some_and(|since| self.sought.insert(id, since) != Some(since)) {
            self.refresh();
        }
        let (since, who) = self.pods.get(&id)?.iter().rev().find(|(since, _)| *since <= at)?;
        given.is_none_or(|given| given == *since).then(|| Arc::clone(who))
    }

    /// The same of many.
    pub fn pods(&mut self, all: &[(PodId, u64)]) -> Vec<Option<Arc<Who>>> {
        all.iter().map(|(id, at)| self.pod(*id, *at)).collect()
    }

    /// Since when a number is a pod's.
    fn given(&self, id: PodId) -> Option<u64> {
        let pod = self.places.as_ref()?.maps.pod(id);
        pod.inspect_err(|error| tracing::warn!(%error, "a pod unreadable"))
            .ok()?
            .map(|pod| pod.since)
    }

    /// A tenant's name; empty for none.
    pub fn tenant(&mut self, number: Tenant) -> String {
        if number != 0 && !self.tenants.contains_key(&number) {
            self.look();
        }
        self.tenants.get(&number).cloned().unwrap_or_default()
    }

    /// Who has an address by the identity table.
    #[must_use]
    pub fn peer(&self, address: IpAddr) -> Option<Arc<Who>> {
        self.peers.get(&address).cloned()
    }

    fn look(&mut self) {
        if self.read.is_none_or(|read| read.elapsed() >= PAUSE) {
            self.refresh();
        }
    }

    /// Reads all names anew. What cannot be read stays as it was.
    pub fn refresh(&mut self) {
        let Some(places) = self.places.clone() else { return };
        self.read = Some(Instant::now());
        match places.maps.names() {
            Ok(names) => self.tenants = names,
            Err(error) => tracing::warn!(%error, "tenants' names unreadable"),
        }
        match Record::all(&places.run_dir) {
            Ok(records) => {
                for record in records {
                    let Some(network) = record.network else { continue };
                    if network.maps == directory(&places.bpf_dir) {
                        let name = record.pod.unwrap_or(record.id);
                        let who = Who { tenant: network.tenant, name };
                        self.put_pod(network.id, network.since, who);
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "sandboxes' records unreadable"),
        }
        self.refresh_peers(&places);
    }

    /// The identity table is read again only when it is another file.
    fn refresh_peers(&mut self, places: &Places) {
        let file = places.state_dir.join("network/identities.json");
        let of = std::fs::metadata(file).and_then(|meta| meta.modified()).ok();
        if of.is_none() || of == self.peers_of {
            return;
        }
        match Store::new(&places.state_dir).identities() {
            Ok(table) => {
                self.peers_of = of;
                let entries = table.content.entries.into_iter();
                self.peers = entries
                    .map(|entry| {
                        let name = if entry.namespace.is_empty() {
                            entry.name.clone()
                        } else {
                            format!("{}/{}", entry.namespace, entry.name)
                        };
                        let who = Who { tenant: entry.tenant().to_owned(), name };
                        (entry.address, Arc::new(who))
                    })
                    .collect();
            }
            Err(error) => tracing::warn!(%error, "identity table unreadable"),
        }
    }
}

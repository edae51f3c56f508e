//! The policy's maps as the node reads and writes them: pinned, by the kernel's calls alone, so that a pod's
//! start pays for nothing else.
//!
//! Whoever removes pods, changes `names` or what belongs to an epoch holds the [`Lock`]. Readers need none, and
//! neither do pods that start: they take their number by a write that fails if somebody has it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use super::abi::{
    Active, Counters, Denied, Flow, FlowKey, Identity, Limit, Local, Pod, PodId, Prefix, Rule,
    TABLES, Tenant, address_key, local_address, local_key, pod_key, space_key,
};
use crate::map::Map;
pub use crate::map::MapError;
use crate::sys;

#[cfg(test)]
mod by_hand;
mod pins;

pub use pins::{Lock, directory, others};

/// `BPF_NOEXIST`, a flag of map updates.
const NO_EXIST: u64 = 1;
/// Keys of `active`, `enum active` in `bpf/policy.h`.
const EPOCH: [u8; 4] = 0_u32.to_ne_bytes();
const GENERATION: [u8; 4] = 1_u32.to_ne_bytes();
/// Names that maps can have; the kernel's is as long.
const NAME: usize = 256;

/// The maps.
#[derive(Debug)]
pub struct Maps {
    pods: Map<4, 64>,
    addresses: Map<24, 4>,
    active: Map<4, 4>,
    locals: Map<20, 16>,
    identities: Map<28, 32>,
    spaces: Map<8, 4>,
    rules: Map<20, 4>,
    flows: Map<4, 4>,
    denials: Map<44, 32>,
    limits: Map<4, 48>,
    counters: Map<4, { Counters::SIZE }>,
    totals: Map<4, { Counters::SIZE }>,
    names: Map<NAME, 4>,
    cpus: usize,
}

/// Names of the maps that user space reads or writes by key.
pub const NAMES: [&str; 13] = [
    "pods",
    "addresses",
    "active",
    "locals",
    "identities",
    "spaces",
    "rules",
    "flows",
    "denials",
    "limits",
    "counters",
    "totals",
    "names",
];

impl Maps {
    /// The pinned ones.
    ///
    /// # Errors
    /// `NotFound` if they are not loaded on this node yet, or what else the kernel says.
    pub fn open(bpf_dir: &Path) -> io::Result<Self> {
        let directory = directory(bpf_dir);
        Self::with(|name| sys::open_pin(&directory.join(name)))
    }

    /// Those that `open` gives by name.
    pub(super) fn with(open: impl Fn(&'static str) -> io::Result<OwnedFd>) -> io::Result<Self> {
        fn map<const K: usize, const V: usize>(
            name: &'static str,
            open: &impl Fn(&'static str) -> io::Result<OwnedFd>,
        ) -> io::Result<Map<K, V>> {
            Ok(Map { name, fd: open(name)? })
        }
        Ok(Self {
            pods: map("pods", &open)?,
            addresses: map("addresses", &open)?,
            active: map("active", &open)?,
            locals: map("locals", &open)?,
            identities: map("identities", &open)?,
            spaces: map("spaces", &open)?,
            rules: map("rules", &open)?,
            flows: map("flows", &open)?,
            denials: map("denials", &open)?,
            limits: map("limits", &open)?,
            counters: map("counters", &open)?,
            totals: map("totals", &open)?,
            names: map("names", &open)?,
            cpus: possible_cpus()?,
        })
    }

    /// What is in force.
    pub fn active(&self) -> Result<Active, MapError> {
        let word = |key| Ok(self.active.get(&key)?.map_or(0, u32::from_ne_bytes));
        Ok(Active { epoch: word(EPOCH)?, generation: word(GENERATION)? })
    }

    /// Puts an epoch in force whose entries are there, and has every flow be judged by it.
    pub fn activate(&self, _lock: &Lock, epoch: u32) -> Result<(), MapError> {
        self.active.put(&EPOCH, &epoch.to_ne_bytes())?;
        self.changed()
    }

    /// Has flows be judged anew: what was changed before counts from now on. Nobody is waited for: the moment,
    /// read after the change, is as good as a count, and two who write at once have both changed before either
    /// is seen.
    fn changed(&self) -> Result<(), MapError> {
        let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let time = Duration::from(time.map_err(io::Error::from).map_err(self.active.fail("date"))?);
        // Units of 64 ns: the same number comes again after 275 seconds.
        let generation = (time.as_nanos() >> 6) as u32;
        self.active.put(&GENERATION, &generation.to_ne_bytes())
    }

    /// Makes a pod with these addresses, which are known as its own from now on, its counters at zero; `false`
    /// if somebody else has taken the number meanwhile. Needs no lock.
    ///
    /// Its entry in `pods` comes first and goes last: while it is there the number is taken, and what a
    /// killed process left of the rest is found by it.
    pub fn add_pod(&self, id: PodId, pod: &Pod, own: &[IpAddr]) -> Result<bool, MapError> {
        let key = pod_key(id).to_ne_bytes();
        match sys::map::put(self.pods.fd.as_fd(), &key, &pod.encode(own), NO_EXIST) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
            other => other.map_err(self.pods.fail("add a pod"))?,
        }
        self.put_counters(id)?;
        for address in own {
            self.addresses.put(&address_key(id, *address), &1_u32.to_ne_bytes())?;
            if !is_link_local(*address) {
                let local = Local { name: pod.name, tenant: pod.tenant, pod: id };
                self.locals.put(&local_key(*address), &local.encode())?;
            }
        }
        self.changed()?;
        Ok(true)
    }

    /// Changes what is known of a pod that has these addresses; under the lock, so that it is still there.
    pub fn change_pod(
        &self,
        _lock: &Lock,
        id: PodId,
        pod: &Pod,
        own: &[IpAddr],
    ) -> Result<(), MapError> {
        self.pods.put(&pod_key(id).to_ne_bytes(), &pod.encode(own))?;
        self.changed()
    }

    /// Removes a pod with these addresses: from now on all of its packets are dropped. What it has counted
    /// is added to its tenant's totals, or lost if this process is killed just then. Fine when it is not
    /// there.
    pub fn remove_pod(&self, _lock: &Lock, id: PodId, own: &[IpAddr]) -> Result<(), MapError> {
        let key = pod_key(id).to_ne_bytes();
        for address in own {
            self.addresses.remove(&address_key(id, *address))?;
            let key = local_key(*address);
            let local = self.locals.get(&key)?.map(|bytes| Local::decode(&bytes));
            if local.is_some_and(|local| local.pod == id) {
                self.locals.remove(&key)?;
            }
        }
        self.limits.remove(&key)?;
        let counted = self.counters(id)?;
        self.counters.remove(&key)?;
        if let (Some(pod), Some(counted)) = (self.pod(id)?, counted) {
            self.add_to_total(pod.tenant, counted)?;
        }
        self.pods.remove(&key)?;
        self.changed()
    }

    fn add_to_total(&self, tenant: Tenant, counted: Counters) -> Result<(), MapError> {
        let key = tenant.to_ne_bytes();
        let mut sum = Counters::default();
        sum.add(&counted.encode());
        if let Some(before) = self.totals.get(&key)? {
            sum.add(&before);
        }
        self.totals.put(&key, &sum.encode())
    }

    /// A pod.
    pub fn pod(&self, id: PodId) -> Result<Option<Pod>, MapError> {
        let pod = self.pods.get(&pod_key(id).to_ne_bytes())?;
        Ok(pod.map(|bytes| Pod::decode(&bytes)))
    }

    /// All pods.
    pub fn pods(&self) -> Result<HashMap<PodId, Pod>, MapError> {
        let entries = self.pods.entries()?.into_iter();
        let id = |key| PodId::try_from(u32::from_ne_bytes(key)).unwrap_or(0);
        Ok(entries.map(|(key, bytes)| (id(key), Pod::decode(&bytes))).collect())
    }

    /// A number that no pod has, and the table for a new pod of this tenant.
    pub fn vacancy(&self, tenant: Tenant) -> Result<(PodId, u32), MapError> {
        let pods = self.pods()?;
        let full = || MapError {
            name: "pods",
            step: "find a free number",
            source: io::Error::other("as many pods as the node can have"),
        };
        let id = (1..PodId::MAX).find(|id| !pods.contains_key(id)).ok_or_else(full)?;
        let mut tables = [(false, 0_u32); TABLES as usize];
        for pod in pods.values() {
            if let Some((strangers, count)) = tables.get_mut(pod.table as usize) {
                *strangers |= pod.tenant != tenant;
                *count += 1;
            }
        }
        Ok((id, table(&tables)))
    }

    /// What is known of the node's own addresses and those of its pods.
    pub fn locals(&self) -> Result<HashMap<IpAddr, Local>, MapError> {
        let entries = self.locals.entries()?.into_iter();
        Ok(entries.map(|(key, bytes)| (local_address(&key), Local::decode(&bytes))).collect())
    }

    /// Adds addresses of the node itself that are not known as such. One that a pod has stays the pod's.
    pub fn put_node_addresses(&self, addresses: &[IpAddr]) -> Result<(), MapError> {
        let node = Local { name: 0, tenant: 0, pod: 0 }.encode();
        let mut changed = false;
        let known = self.locals()?;
        for address in addresses.iter().filter(|address| !known.contains_key(address)) {
            let key = local_key(*address);
            match sys::map::put(self.locals.fd.as_fd(), &key, &node, NO_EXIST) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => {
                    other.map_err(self.locals.fail("add the node's address"))?;
                    changed = true;
                }
            }
        }
        if changed { self.changed() } else { Ok(()) }
    }

    /// Forgets addresses that are not the node's any more.
    pub fn remove_node_addresses(&self, gone: &[IpAddr]) -> Result<(), MapError> {
        let mut changed = false;
        for address in gone {
            let key = local_key(*address);
            let local = self.locals.get(&key)?.map(|bytes| Local::decode(&bytes));
            if local.is_some_and(|local| local.pod == 0) {
                changed |= self.locals.remove(&key)?;
            }
        }
        if changed { self.changed() } else { Ok(()) }
    }

    /// Says, in an epoch, whose the addresses of a prefix are.
    pub fn put_identity(
        &self,
        epoch: u32,
        prefix: Prefix,
        identity: Identity,
    ) -> Result<(), MapError> {
        self.identities.put(&prefix.encode(epoch), &identity.encode())
    }

    /// Says, in an epoch, which policy pods of a namespace have whose labels are not known.
    pub fn put_space(&self, epoch: u32, space: u32, policy: u32) -> Result<(), MapError> {
        self.spaces.put(&space_key(epoch, space), &policy.to_ne_bytes())
    }

    /// Allows something in an epoch.
    pub fn put_rule(&self, epoch: u32, rule: &Rule) -> Result<(), MapError> {
        self.rules.put(&rule.encode(epoch), &1_u32.to_ne_bytes())
    }

    /// Removes all entries of other epochs than this one, once no packet is judged by them any more.
    pub fn keep_only(&self, lock: &Lock, epoch: u32) -> Result<(), MapError> {
        sys::wait_for_programs().map_err(self.active.fail("wait for who reads an old epoch"))?;
        self.forget_others(lock, epoch)
    }

    /// The same without waiting: who is judged meanwhile may see a part of an epoch.
    pub(super) fn forget_others(&self, _lock: &Lock, epoch: u32) -> Result<(), MapError> {
        let is = |bytes: &[u8]| bytes == epoch.to_ne_bytes();
        for key in self.identities.keys()?.iter().filter(|key| !is(&key[4..8])) {
            self.identities.remove(key)?;
        }
        for key in self.rules.keys()?.iter().filter(|key| !is(&key[4..8])) {
            self.rules.remove(key)?;
        }
        for key in self.spaces.keys()?.iter().filter(|key| !is(&key[..4])) {
            self.spaces.remove(key)?;
        }
        Ok(())
    }

    /// The number of a tenant or namespace, if it has one. 0 for no name.
    pub fn known_number(&self, name: &str) -> Result<Option<u32>, MapError> {
        if name.is_empty() {
            return Ok(Some(0));
        }
        Ok(self.names.get(&name_key(name)?)?.map(u32::from_ne_bytes))
    }

    /// The number of a tenant or namespace, which it has from now on. 0 for no name.
    pub fn number_of(&self, _lock: &Lock, name: &str) -> Result<u32, MapError> {
        if let Some(number) = self.known_number(name)? {
            return Ok(number);
        }
        let key = name_key(name)?;
        // The nameless entry has the last number that was given.
        let last = self.names.get(&[0; NAME])?.map_or(0, u32::from_ne_bytes);
        let number = last + 1;
        self.names.put(&[0; NAME], &number.to_ne_bytes())?;
        self.names.put(&key, &number.to_ne_bytes())?;
        Ok(number)
    }

    /// Names by their numbers.
    pub fn names(&self) -> Result<HashMap<u32, String>, MapError> {
        let entries = self.names.entries()?.into_iter().map(|(key, number)| {
            let end = key.iter().position(|byte| *byte == 0).unwrap_or(NAME);
            (u32::from_ne_bytes(number), String::from_utf8_lossy(&key[..end]).into_owned())
        });
        Ok(entries.filter(|(_, name)| !name.is_empty()).collect())
    }

    /// Limits a pod's packets. Its entry in `pods` says whether it is limited at all.
    pub fn put_limit(&self, id: PodId, limit: Limit) -> Result<(), MapError> {
        self.limits.put(&pod_key(id).to_ne_bytes(), &limit.encode())
    }

    fn table(&self, table: u32) -> Result<Option<Map<44, 56>>, MapError> {
        let Some(id) = self.flows.get(&table.to_ne_bytes())? else { return Ok(None) };
        let fd = sys::map::by_id(u32::from_ne_bytes(id));
        Ok(Some(Map { name: "flows", fd: fd.map_err(self.flows.fail("open a table"))? }))
    }

    /// Flows in a table, those whose time is over among them.
    pub fn flows(&self, table: u32) -> Result<Vec<(FlowKey, Flow)>, MapError> {
        let Some(table) = self.table(table)? else { return Ok(Vec::new()) };
        let entries = table.entries()?.into_iter();
        Ok(entries
            .filter_map(|(key, flow)| FlowKey::decode(&key).zip(Flow::decode(&flow)))
            .collect())
    }

    /// What is known of a flow.
    pub fn flow(&self, table: u32, key: &FlowKey) -> Result<Option<Flow>, MapError> {
        let Some(table) = self.table(table)? else { return Ok(None) };
        Ok(table.get(&key.encode())?.and_then(|flow| Flow::decode(&flow)))
    }

    /// Attempts that were refused.
    pub fn denials(&self) -> Result<Vec<(FlowKey, Denied)>, MapError> {
        let entries = self.denials.entries()?.into_iter();
        Ok(entries
            .filter_map(|(key, denied)| FlowKey::decode(&key).zip(Denied::decode(&denied)))
            .collect())
    }

    /// Forgets a refused attempt; the next one is an event again.
    pub fn remove_denied(&self, key: &FlowKey) -> Result<(), MapError> {
        self.denials.remove(&key.encode()).map(drop)
    }

    /// Makes the tables that are not there yet.
    #[cfg(feature = "loader")]
    pub(super) fn put_tables(&self, entries: u32) -> Result<(), MapError> {
        for index in 0..TABLES {
            if self.flows.get(&index.to_ne_bytes())?.is_none() {
                use std::os::fd::AsRawFd as _;
                let table = sys::map::forgetful(44, 56, entries);
                let table = table.map_err(self.flows.fail("make a table"))?;
                self.flows.put(&index.to_ne_bytes(), &table.as_raw_fd().to_ne_bytes())?;
            }
        }
        Ok(())
    }

    fn put_counters(&self, id: PodId) -> Result<(), MapError> {
        let zero = vec![0; Counters::SIZE * self.cpus];
        let key = pod_key(id).to_ne_bytes();
        match sys::map::put(self.counters.fd.as_fd(), &key, &zero, NO_EXIST) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map_err(self.counters.fail("write")),
        }
    }

    /// Makes what counts for no pod.
    pub fn put_strays(&self) -> Result<(), MapError> {
        self.put_counters(0)
    }

    /// What was counted for a pod on all CPUs; pod 0 has what belongs to no pod.
    pub fn counters(&self, id: PodId) -> Result<Option<Counters>, MapError> {
        let mut bytes = vec![0; Counters::SIZE * self.cpus];
        let key = pod_key(id).to_ne_bytes();
        let found = sys::map::get(self.counters.fd.as_fd(), &key, &mut bytes);
        if !found.map_err(self.counters.fail("read"))? {
            return Ok(None);
        }
        let mut sum = Counters::default();
        for bytes in bytes.as_chunks().0 {
            sum.add(bytes);
        }
        Ok(Some(sum))
    }

    /// What pods that are gone had counted, by tenant.
    pub fn totals(&self) -> Result<HashMap<Tenant, Counters>, MapError> {
        let entries = self.totals.entries()?.into_iter().map(|(key, bytes)| {
            let mut counters = Counters::default();
            counters.add(&bytes);
            (u32::from_ne_bytes(key), counters)
        });
        Ok(entries.collect())
    }
}

/// The table for a new pod of a tenant, from how many pods have each, and whether any of those is another
/// tenant's: an empty one, unless the tenant has its share of tables for itself; else one of its own; else the one
/// with the fewest pods.
fn table(tables: &[(bool, u32); TABLES as usize]) -> u32 {
    /// As many tables as a tenant gets while others may come.
    const SHARE: usize = TABLES as usize / 8;
    let own = tables.iter().filter(|(strangers, count)| *count > 0 && !strangers).count();
    let rank = |(strangers, count): (bool, u32)| match (count, strangers) {
        (0, _) => (if own < SHARE { 0 } else { 2 }, 0),
        (_, false) => (1, count),
        (_, true) => (3, count),
    };
    let tables = (0..TABLES).zip(tables);
    tables.min_by_key(|(_, table)| rank(**table)).map_or(0, |(number, _)| number)
}

/// Key of `names`.
fn name_key(name: &str) -> Result<[u8; NAME], MapError> {
    let wrong = || MapError {
        name: "names",
        step: "number a name",
        source: io::Error::other(format!("{name:?} is not a name of at most {} bytes", NAME - 1)),
    };
    // The key ends with the name's first 0.
    if name.is_empty() || name.len() >= NAME || name.contains('\0') {
        return Err(wrong());
    }
    let mut key = [0; NAME];
    key[..name.len()].copy_from_slice(name.as_bytes());
    Ok(key)
}

/// Whether an address is known on one link only, so that it names nobody.
pub(super) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// How many values an element of a per-CPU map has: one for each CPU that there could be.
fn possible_cpus() -> io::Result<usize> {
    let path = "/sys/devices/system/cpu/possible";
    let text = fs::read_to_string(path)?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|last| last.parse::<usize>().ok());
    last.map(|last| last + 1).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{path}: {:?}", text.trim()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What [`table`] is told, for this tenant.
    fn seen(tables: &[(Tenant, u32)], tenant: Tenant) -> [(bool, u32); TABLES as usize] {
        let mut all = [(false, 0); TABLES as usize];
        for (owner, table) in tables {
            let (strangers, count) = &mut all[*table as usize];
            *strangers |= *owner != tenant;
            *count += 1;
        }
        all
    }

    #[test]
    fn no_tenant_takes_all_tables() {
        let mut pods = Vec::new();
        for _ in 0..200 {
            pods.push((1, table(&seen(&pods, 1))));
        }
        for tenant in 2..58 {
            let own = table(&seen(&pods, tenant));
            assert!(!pods.iter().any(|(_, table)| *table == own), "{tenant} shares {own}");
            pods.push((tenant, own));
        }
        // As many as there are tables: the next shares with whoever has the fewest pods.
        let shared = table(&seen(&pods, 99));
        assert_eq!(pods.iter().filter(|(_, table)| *table == shared).count(), 1);
    }

    #[test]
    fn names_are_told_apart() {
        for name in ["", "\0", "red\0x", &"x".repeat(256)] {
            assert!(name_key(name).is_err(), "{name:?}");
        }
        assert!(name_key(&"x".repeat(255)).is_ok());
    }
}

//! Pods of this node: their numbers, addresses and limits, and the node's own addresses beside them.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;

use super::super::abi::{
    Limit, Local, Pod, PodId, TABLES, Tenant, address_key, address_of, local_address, local_key,
    pod_key,
};
use super::{Lock, MapError, Maps, NO_EXIST};
use crate::sys;

impl Maps {
    /// Makes a pod with these addresses, which are known as its own from now on, its counters at zero; `false`
    /// if somebody else has taken the number meanwhile. Needs no lock.
    ///
    /// Its entry in `pods` comes first and goes last: while it is there the number is taken, and what a
    /// killed process left of the rest is found by it.
    pub fn add_pod(&self, id: PodId, pod: &Pod, own: &[IpAddr]) -> Result<bool, MapError> {
        let key = pod_key(id).to_ne_bytes();
        match sys::map::put(self.pods.fd()?, &key, &pod.encode(own), NO_EXIST) {
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

    /// A pod.
    pub fn pod(&self, id: PodId) -> Result<Option<Pod>, MapError> {
        let pod = self.pods.get(&pod_key(id).to_ne_bytes())?;
        Ok(pod.map(|bytes| Pod::decode(&bytes)))
    }

    /// The addresses that a pod has.
    pub fn addresses(&self, id: PodId) -> Result<Vec<IpAddr>, MapError> {
        let all = self.addresses.entries()?.into_iter().map(|(key, _)| address_of(&key));
        Ok(all.filter(|(pod, _)| *pod == id).map(|(_, address)| address).collect())
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

    /// Limits a pod's packets. Its entry in `pods` says whether it is limited at all.
    pub fn put_limit(&self, id: PodId, limit: Limit) -> Result<(), MapError> {
        self.limits.put(&pod_key(id).to_ne_bytes(), &limit.encode())
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
        for address in addresses {
            let key = local_key(*address);
            match sys::map::put(self.locals.fd()?, &key, &node, NO_EXIST) {
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

/// Whether an address is known on one link only, so that it names nobody.
pub(in super::super) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
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
}

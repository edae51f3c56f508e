//! What programs write down: flows, refused attempts, counters.

use std::collections::HashMap;
use std::io;

use super::super::abi::{Counters, Denied, Flow, FlowKey, PodId, Tenant, pod_key};
use super::{MapError, Maps, NO_EXIST};
use crate::map::{Map, Source};
use crate::sys;

impl Maps {
    pub(super) fn table(&self, table: u32) -> Result<Option<Map<44, 56>>, MapError> {
        let Some(id) = self.flows.get(&table.to_ne_bytes())? else { return Ok(None) };
        let fd = sys::map::by_id(u32::from_ne_bytes(id));
        let fd = fd.map_err(self.flows.fail("open a table"))?;
        Ok(Some(Map::of("flows", Source::Open(fd))))
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
    pub(in super::super) fn put_tables(&self, entries: u32) -> Result<(), MapError> {
        for index in 0..super::super::abi::TABLES {
            if self.flows.get(&index.to_ne_bytes())?.is_none() {
                use std::os::fd::AsRawFd as _;
                let table = sys::map::forgetful(44, 56, entries);
                let table = table.map_err(self.flows.fail("make a table"))?;
                self.flows.put(&index.to_ne_bytes(), &table.as_raw_fd().to_ne_bytes())?;
            }
        }
        Ok(())
    }

    pub(super) fn put_counters(&self, id: PodId) -> Result<(), MapError> {
        let zero = vec![0; Counters::SIZE * self.cpus];
        let key = pod_key(id).to_ne_bytes();
        match sys::map::put(self.counters.fd()?, &key, &zero, NO_EXIST) {
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
        let found = sys::map::get(self.counters.fd()?, &key, &mut bytes);
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

    /// Adds what a pod that goes has counted to its tenant's.
    pub(super) fn add_to_total(&self, tenant: Tenant, counted: Counters) -> Result<(), MapError> {
        if counted == Counters::default() {
            return Ok(());
        }
        let key = tenant.to_ne_bytes();
        let mut sum = Counters::default();
        sum.add(&counted.encode());
        if let Some(before) = self.totals.get(&key)? {
            sum.add(&before);
        }
        self.totals.put(&key, &sum.encode())
    }
}

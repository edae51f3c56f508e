//! What only tests do: write down and forget what programs write, and take away what is never taken away alone.

use super::super::abi::{Flow, FlowKey, FragmentKey, PodId, pod_key};
use super::{MapError, Maps};

impl Maps {
    /// Forgets a limit; a pod whose entry says that it has one may send nothing then.
    pub(in super::super) fn remove_limit(&self, id: PodId) -> Result<(), MapError> {
        self.limits.remove(&pod_key(id).to_ne_bytes()).map(drop)
    }

    /// Writes down a flow.
    pub(in super::super) fn put_flow(
        &self,
        table: u32,
        key: &FlowKey,
        flow: &Flow,
    ) -> Result<(), MapError> {
        let Some(table) = self.table(table)? else { return Ok(()) };
        table.put(&key.encode(), &flow.encode())
    }

    /// Forgets a flow.
    pub(in super::super) fn remove_flow(&self, table: u32, key: &FlowKey) -> Result<(), MapError> {
        let Some(table) = self.table(table)? else { return Ok(()) };
        table.remove(&key.encode()).map(drop)
    }

    /// Writes down when a first fragment was let through.
    pub(in super::super) fn put_fragment(
        &self,
        table: u32,
        key: &FragmentKey,
        flow: &Flow,
    ) -> Result<(), MapError> {
        let Some(table) = self.table(table)? else { return Ok(()) };
        table.put(&key.encode(), &flow.encode())
    }

    /// Forgets a first fragment.
    pub(in super::super) fn remove_fragment(
        &self,
        table: u32,
        key: &FragmentKey,
    ) -> Result<(), MapError> {
        let Some(table) = self.table(table)? else { return Ok(()) };
        table.remove(&key.encode()).map(drop)
    }
}

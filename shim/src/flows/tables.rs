//! The maps as the book of flows reads them: a trait, so that tests need neither a kernel nor root.

use std::collections::HashMap;

use joey_ebpf::policy::abi::{Denied, Flow, FlowKey, Pod, PodId};
use joey_ebpf::policy::maps::{MapError, Maps};

/// What is read of flows.
pub trait Tables {
    /// All pods.
    fn pods(&self) -> Result<HashMap<PodId, Pod>, MapError>;
    /// The flows of one table. Those that change meanwhile may be missing or be there twice.
    fn flows(&self, table: u32) -> Result<Vec<(FlowKey, Flow)>, MapError>;
    /// One flow.
    fn flow(&self, table: u32, key: &FlowKey) -> Result<Option<Flow>, MapError>;
    /// Attempts that were refused.
    fn denials(&self) -> Result<Vec<(FlowKey, Denied)>, MapError>;
    /// Forgets one, so that the next is told of again.
    fn remove_denied(&self, key: &FlowKey) -> Result<(), MapError>;
}

impl Tables for Maps {
    fn pods(&self) -> Result<HashMap<PodId, Pod>, MapError> {
        Self::pods(self)
    }

    fn flows(&self, table: u32) -> Result<Vec<(FlowKey, Flow)>, MapError> {
        Self::flows(self, table)
    }

    fn flow(&self, table: u32, key: &FlowKey) -> Result<Option<Flow>, MapError> {
        Self::flow(self, table, key)
    }

    fn denials(&self) -> Result<Vec<(FlowKey, Denied)>, MapError> {
        Self::denials(self)
    }

    fn remove_denied(&self, key: &FlowKey) -> Result<(), MapError> {
        Self::remove_denied(self, key)
    }
}

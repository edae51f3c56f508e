//! Policy as data: from the operator's documents and the identity table to entries of the policy's maps.
//!
//! ```text
//! files ──▶ document ──▶ node, network_policy ─┐
//!                                              ├─▶ compile ──▶ apply ──▶ maps, and state on disk
//! kubectl, socket ──▶ feed ──▶ entry ──────────┘      └──────▶ explain
//! ```
//!
//! Everything before `apply` is pure. A policy is compiled whole, so no entry depends on what was there before,
//! and what is refused is refused before anything was written. `docs/policy.md` says what documents mean.

pub mod apply;
pub mod change;
pub mod compile;
pub mod document;
pub mod entry;
pub mod error;
pub mod explain;
pub mod feed;
pub mod state;
pub mod tenant;
pub mod versions;

pub(crate) mod cidr;
mod network_policy;
mod node;
mod ports;
mod selector;

pub use change::{Change, Request};
pub use entry::{Entry, Namespace};

#[cfg(test)]
mod tests;

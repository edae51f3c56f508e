//! Policy as data: from the operator's documents and the identity table to entries of the policy's maps.
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

mod cidr;
mod network_policy;
mod node;
mod ports;
mod selector;

pub use change::{Change, Request};
pub use entry::{Entry, Namespace};

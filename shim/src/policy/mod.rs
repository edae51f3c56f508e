//! Policy as data: from the operator's documents and the identity table to entries of the policy's maps.

pub mod change;
pub mod document;
pub mod entry;
pub mod tenant;

pub use change::{Change, Request};
pub use entry::{Entry, Namespace};

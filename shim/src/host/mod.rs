//! Resources of the node, one module each.

pub mod cgroup;
pub mod jail;
pub mod net;

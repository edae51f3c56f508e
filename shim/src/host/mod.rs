//! Resources of the node, one module each.

pub(crate) mod block;
pub mod cgroup;
pub mod jail;
pub(crate) mod loopback;
pub(crate) mod mounts;
pub mod net;
pub mod oom;
pub(crate) mod patience;

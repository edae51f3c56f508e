//! Resources of the node, one module each.

pub(crate) mod block;
pub mod cgroup;
pub(crate) mod cpus;
pub mod jail;
pub(crate) mod loopback;
pub(crate) mod mounts;
pub mod net;
pub mod oom;
pub(crate) mod patience;

/// A pod's host name: what it asks for, else the node's, as with runc and as containerd's `HOSTNAME` has it.
pub(crate) fn pod_name(asked: Option<String>) -> String {
    asked.filter(|name| !name.is_empty()).unwrap_or_else(|| {
        let node = nix::unistd::gethostname().unwrap_or_default();
        node.to_string_lossy().into_owned()
    })
}

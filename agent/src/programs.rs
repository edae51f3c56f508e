//! The eBPF programs that look at containers' sockets: attached once, to the cgroup that all containers are below and
//! to the network namespace they share, before the machine is saved as a template. The agent itself is outside.
//!
//! A pod's start writes maps and nothing else; without entries the programs leave everything alone.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use joey_ebpf::guest::GuestError;
use joey_ebpf::guest::mesh::Mesh;

/// The network namespace of the agent's only thread.
const NETNS: &str = "/proc/self/ns/net";

/// Why there are no programs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramsError {
    /// What they are to be attached to cannot be opened.
    #[error("{path}: {source}")]
    Open {
        /// What.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel does not take them.
    #[error("the mesh's programs: {0}")]
    Mesh(GuestError),
}

/// The programs that are attached.
#[derive(Debug)]
pub(crate) struct Programs {
    /// Sidecar and observe modes.
    pub(crate) mesh: Mesh,
}

impl Programs {
    /// Loads and attaches them to the cgroup `cgroups` and the agent's network namespace.
    pub(crate) fn attach(cgroups: &Path) -> Result<Self, ProgramsError> {
        let open = |path: &Path| {
            File::open(path).map_err(|source| ProgramsError::Open { path: path.into(), source })
        };
        let (cgroup, netns) = (open(cgroups)?, open(Path::new(NETNS))?);
        let mesh = Mesh::attach(cgroup.as_fd(), netns.as_fd()).map_err(ProgramsError::Mesh)?;
        Ok(Self { mesh })
    }
}

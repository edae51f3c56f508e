//! Attaching the policy's programs to a pod's devices.
//!
//! The filter's classid tells the program which pod it judges for. The kernel hands on 16 bits of it,
//! which is why a [`PodId`] has as many. (An interface's index would not tell: every pod has a network
//! namespace of its own, and most of them the same index in it.)

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::abi::PodId;
use super::maps::directory;
use crate::attach::{Hook, run};
use crate::netlink::Message;
use crate::sys;

const NAME: &str = "joey-policy";

/// A program of `bpf/policy.bpf.c`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Judges what enters the tap.
    FromVm,
    /// Judges what enters the pod's interface.
    ToVm,
    /// The same for a pod in a mesh, whose connections are the proxy's in its network namespace.
    MeshFromVm,
    /// The same, and its DNS queries, too.
    MeshDnsFromVm,
    /// [`Program::ToVm`] for a pod in a mesh.
    MeshToVm,
    /// Judges what the proxy sends out of the pod's interface.
    MeshOut,
    /// Lets the proxy's connections out of the tap.
    MeshIn,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::FromVm,
        Self::ToVm,
        Self::MeshFromVm,
        Self::MeshDnsFromVm,
        Self::MeshToVm,
        Self::MeshOut,
        Self::MeshIn,
    ];

    /// Its function.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::FromVm => "from_vm",
            Self::ToVm => "to_vm",
            Self::MeshFromVm => "mesh_from_vm",
            Self::MeshDnsFromVm => "mesh_dns_from_vm",
            Self::MeshToVm => "mesh_to_vm",
            Self::MeshOut => "mesh_out",
            Self::MeshIn => "mesh_in",
        }
    }

    /// Where it is pinned. As with the wire, the name holds the object's digest.
    pub(super) fn pinned_path(self, bpf_dir: &Path) -> PathBuf {
        directory(bpf_dir).join(format!("{}-{}", self.name(), env!("JOEY_POLICY_DIGEST")))
    }

    fn open(self, bpf_dir: &Path) -> io::Result<OwnedFd> {
        sys::open_pin(&self.pinned_path(bpf_dir))
    }
}

/// The programs of a pod.
#[derive(Debug)]
pub struct Programs {
    from_vm: OwnedFd,
    to_vm: OwnedFd,
    /// For a mesh: what leaves the pod's interface, and the tap.
    leaving: Option<(OwnedFd, OwnedFd)>,
}

impl Programs {
    /// Opens those that judge; `NotFound` when this version's were not loaded on this node yet.
    ///
    /// # Errors
    /// That, or what else the kernel says.
    pub fn open(bpf_dir: &Path) -> io::Result<Self> {
        let open = |program: Program| program.open(bpf_dir);
        Ok(Self { from_vm: open(Program::FromVm)?, to_vm: open(Program::ToVm)?, leaving: None })
    }

    /// The same for a pod in a mesh; with `dns`, the proxy has its DNS queries.
    ///
    /// # Errors
    /// As [`Programs::open`].
    pub fn open_meshed(bpf_dir: &Path, dns: bool) -> io::Result<Self> {
        let open = |program: Program| program.open(bpf_dir);
        Ok(Self {
            from_vm: open(if dns { Program::MeshDnsFromVm } else { Program::MeshFromVm })?,
            to_vm: open(Program::MeshToVm)?,
            leaving: Some((open(Program::MeshOut)?, open(Program::MeshIn)?)),
        })
    }

    /// The requests that have them judge on the interface `index` of `pod` and its tap; to be sent as one batch after
    /// [`crate::attach::carry`]. They have the wire's place among filters, and [`crate::attach::detach`] takes
    /// them off.
    #[must_use]
    pub fn attach(&self, index: u32, pod: PodId) -> Vec<Message> {
        let tap = crate::attach::partner(index);
        let mut all = vec![
            attach(tap, Hook::Enters, self.from_vm.as_fd(), pod),
            attach(index, Hook::Enters, self.to_vm.as_fd(), pod),
        ];
        if let Some((out, inside)) = &self.leaving {
            all.push(attach(index, Hook::Leaves, out.as_fd(), pod));
            all.push(attach(tap, Hook::Leaves, inside.as_fd(), pod));
        }
        all
    }
}

pub(super) fn attach(index: u32, hook: Hook, program: BorrowedFd<'_>, pod: PodId) -> Message {
    let step = format!("attach the policy of pod {pod} to interface {index}");
    run(step, index, hook, program, NAME, Some(pod.into()))
}

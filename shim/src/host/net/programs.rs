//! The pinned programs, and how they are put on a pod's devices.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;

use joey_ebpf::netlink::{NetlinkError, Socket};
use joey_ebpf::policy::abi::PodId;
use joey_ebpf::{attach, policy, route};

use super::NetError;
use super::tap::{MTU, silence};
use crate::config::Config;
use crate::mesh::{Mesh, Mode};

/// The pinned programs that join a pod's two devices.
#[derive(Debug)]
pub(super) enum Programs {
    /// One for both, which lets everything pass.
    Wire(OwnedFd),
    /// Those that judge.
    Policy(policy::attach::Programs),
}

impl Programs {
    /// Opens them; Joey's tool loads them when this node has not got them yet.
    pub(super) fn open(config: &Config, mesh: Mesh) -> Result<Self, NetError> {
        let dir = &config.bpf_dir;
        let fail = |reason: String| NetError::Program { dir: dir.clone(), reason };
        let ambient = mesh.mode == Mode::Ambient;
        let open = || match config.isolation {
            true if ambient => {
                policy::attach::Programs::open_meshed(dir, mesh.dns).map(Self::Policy)
            }
            true => policy::attach::Programs::open(dir).map(Self::Policy),
            false => attach::open(dir).map(Self::Wire),
        };
        if ambient && !config.isolation {
            return Err(fail(format!(
                "{} = \"ambient\" needs isolation, which is off in the configuration",
                crate::mesh::MODE
            )));
        }
        match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other.map_err(|error| fail(error.to_string())),
        }
        let joey = config.joey().map_err(|error| fail(format!("find the tool `joey`: {error}")))?;
        let mut command = Command::new(&joey);
        if let Some(file) = &config.file {
            command.arg("--config").arg(file);
        }
        let output = command.args(["ebpf", "load", "--json"]).output();
        let command = format!("{} ebpf load", joey.display());
        let output = output.map_err(|error| fail(format!("run `{command}`: {error}")))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            return Err(fail(format!("`{command}` failed ({}): {}", output.status, words.trim())));
        }
        open().map_err(|error| {
            fail(format!(
                "not there after `{command}`, which may read another configuration: {error}"
            ))
        })
    }

    /// Puts them on a pod's interface and its tap, by one call: a thread that went back in between would queue
    /// anew for the kernel's lock on network devices, behind all pods that start or end.
    pub(super) fn join(
        &self,
        place: &mut Socket,
        index: u32,
        mtu: u32,
        id: PodId,
    ) -> Result<(), NetlinkError> {
        let devices = [attach::partner(index), index];
        let [tap, _] = devices;
        let size = route::link("set the tap's MTU", libc::RTM_NEWLINK, tap, false);
        let size = (mtu != MTU).then(|| size.number(route::LINK_MTU, mtu));
        // The interface's comes last: that one waits until no packet is under way, which each device's first
        // filter would do otherwise.
        let carry = devices.map(attach::carry);
        let attach = match self {
            Self::Wire(program) => devices.map(|device| attach::attach(device, program)).into(),
            Self::Policy(programs) => programs.attach(index, id),
        };
        place.batch([silence(tap)].into_iter().chain(size).chain(carry).chain(attach))
    }
}

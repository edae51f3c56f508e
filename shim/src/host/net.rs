//! The wire between a pod's network interface and its VM, and what the node's policy lets pass on it.
//!
//! CNI made an interface in the pod's network namespace; the VM has a tap there. Pinned eBPF programs
//! on both send what enters one out of the other, so the host's stack is not involved and the guest
//! owns the interface's addresses. `docs/network.md` follows a packet.
//!
//! Invariants: the namespace is entered only by short-lived threads of this module. The tap's index is
//! derived from the interface's (`joey_ebpf::attach::partner`). The tap is not persistent: it dies with
//! its last descriptor, the VMM's. It is down, and nothing passes, until the guest has its identity
//! ([`Wire::open`]), and the programs are attached before that and before a VMM that is started for the pod
//! gets it. What is left in the end are filters that drop, which [`Wire::unplug`] removes knowing nothing
//! but the namespace, and the pod's place in the policy (`admission.rs`).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use joey_ebpf::netlink::{NetlinkError, Socket};
use joey_ebpf::policy::abi::PodId;
use joey_ebpf::{attach, policy, route, shape};
use joey_protocol::api::Network;
use nix::sched::{CloneFlags, setns, unshare};

use crate::config::Config;
use crate::mesh::{Mesh, Mode};
use crate::net_limits::NetLimits;
use crate::sandbox::record::PodNetwork;
use crate::sys;

pub use admission::{AdmissionError, Applicant, own_addresses};
pub use mesh::MeshNetError;

mod admission;
mod mesh;
mod read;
#[cfg(test)]
mod tests;

/// Name of the tap in the pod's namespace.
const TAP: &str = "joey0";
/// What the VM's device is called by hardware when the pod has no interface.
const NO_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];

/// Why the VM is not on the pod's network, or why something of it is left.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The namespace cannot be entered.
    #[error("network namespace {netns}: {step}: {source}")]
    Namespace {
        /// Its path.
        netns: PathBuf,
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// CNI made something that the guest cannot have.
    #[error("network namespace {netns}: {reason}")]
    Unsupported {
        /// Its path.
        netns: PathBuf,
        /// What, and what to do.
        reason: String,
    },
    /// The kernel refused.
    #[error("network namespace {netns}: {source}")]
    Netlink {
        /// Its path.
        netns: PathBuf,
        /// What.
        source: NetlinkError,
    },
    /// The tap could not be made.
    #[error("network namespace {netns}: tap {TAP}: {step}: {source}")]
    Tap {
        /// The namespace.
        netns: PathBuf,
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The policy has no place for the pod.
    #[error("network namespace {netns}: {source}")]
    Admission {
        /// Its path.
        netns: PathBuf,
        /// Why.
        source: AdmissionError,
    },
    /// The namespace cannot be made one for a mesh's proxy, or given back.
    #[error("network namespace {netns}, for a mesh's proxy: {source}")]
    Mesh {
        /// Its path.
        netns: PathBuf,
        /// Why.
        source: MeshNetError,
    },
    /// The programs are not on the node and could not be brought there.
    #[error("the packet programs below {dir}: {reason}")]
    Program {
        /// Where they should be pinned.
        dir: PathBuf,
        /// Why it is not.
        reason: String,
    },
}

/// A plugged wire, as long as the tap's descriptor lives here or elsewhere.
#[derive(Debug)]
pub struct Wire {
    netns: PathBuf,
    tap: OwnedFd,
    /// Index of the tap, unless it leads nowhere.
    index: Option<u32>,
    mac: [u8; 6],
    network: Network,
    judged: Option<(Instant, Duration)>,
    /// The pod's addresses, if a mesh's proxy is to reach it by them.
    meshed: Vec<IpAddr>,
}

/// A tap that a VM has before its pod is known, in a namespace of its own that goes with it.
#[derive(Debug)]
pub struct ParkedTap {
    tap: OwnedFd,
    /// Speaks to the kernel inside that namespace, and keeps it.
    place: Socket,
    index: u32,
}

impl ParkedTap {
    /// Makes the namespace and the tap.
    pub fn make() -> Result<Self, NetError> {
        let nowhere = Path::new("of a waiting VM");
        let fail = move |step| {
            move |source| NetError::Namespace { netns: nowhere.to_owned(), step, source }
        };
        let make = move || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|error| fail("make")(error.into()))?;
            let place = Socket::open()
                .map_err(|source| NetError::Netlink { netns: nowhere.to_owned(), source })?;
            let tap = make_tap(nowhere, None)?;
            let index = nix::net::if_::if_nametoindex(TAP)
                .map_err(|error| fail("look up its tap")(error.into()))?;
            Ok(Self { tap, place, index })
        };
        // Only the thread changes its namespace, and it ends here.
        std::thread::spawn(make)
            .join()
            .unwrap_or_else(|_| Err(fail("make")(io::Error::other("the thread panicked"))))
    }

    /// A descriptor of the tap, for the VMM.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.tap.try_clone()
    }

    /// Moves the tap into the pod's namespace `file`, in which the calling thread is.
    fn enter(mut self, netns: &Path, file: &File, index: Option<u32>) -> Result<OwnedFd, NetError> {
        let descriptor = u32::try_from(file.as_raw_fd()).unwrap_or(u32::MAX);
        let link = route::link("move the tap here", libc::RTM_NEWLINK, self.index, false)
            .number(route::LINK_NETNS_FD, descriptor);
        let link = index.into_iter().fold(link, |it, new| it.number(route::LINK_NEW_INDEX, new));
        self.place
            .request(link)
            .map_err(|source| NetError::Netlink { netns: netns.to_owned(), source })?;
        silence_tap().map_err(|source| NetError::Tap {
            netns: netns.to_owned(),
            step: "disable IPv6 on the host's side",
            source,
        })?;
        Ok(self.tap)
    }
}

impl Wire {
    /// Makes the tap, or takes the one that a waiting VM has, and joins it to the pod's interface, under the
    /// policy unless `isolation` is off; `record` writes down the place in it that is about to be taken. A
    /// pod that has no interface gets a tap that leads nowhere, and an empty [`Network`]. Whatever an
    /// earlier attempt left is replaced.
    pub fn plug(
        netns: &Path,
        config: &Config,
        parked: Option<ParkedTap>,
        applicant: &Applicant,
        record: impl FnMut(&PodNetwork) -> io::Result<()> + Send,
    ) -> Result<Self, NetError> {
        if is_host_netns(netns) {
            let reason = "this is the host's own network, which a pod with a VM cannot share";
            return Err(NetError::Unsupported {
                netns: netns.to_owned(),
                reason: reason.to_owned(),
            });
        }
        let mesh = applicant.mesh;
        let programs = Programs::open(config, mesh)?;
        let meshed = mesh.mode == Mode::Ambient;
        let admission = |source| NetError::Admission { netns: netns.to_owned(), source };
        let begun = Instant::now();
        let node = match programs {
            Programs::Wire(_) => Vec::new(),
            Programs::Policy(_) => own_addresses().map_err(admission)?,
        };
        let before = begun.elapsed();
        inside(netns, |place, file| {
            let netlink = |source| NetError::Netlink { netns: netns.to_owned(), source };
            let pod = read::pod(place, netns)?;
            if let Some(old) = pod.tap {
                let delete = route::link("remove an old tap", libc::RTM_DELLINK, old, false);
                place.request(delete).map_err(netlink)?;
            }
            let index = pod.interface.as_ref().map(|i| attach::partner(i.index));
            let tap = match parked {
                None => make_tap(netns, index)?,
                Some(parked) => parked.enter(netns, file, index)?,
            };
            let netns = netns.to_owned();
            let Some(interface) = pod.interface else {
                let (network, mac) = (Network::new(), NO_MAC);
                let meshed = Vec::new();
                return Ok(Self { netns, tap, index, mac, network, judged: None, meshed });
            };
            let begun = Instant::now();
            let id = match programs {
                Programs::Wire(_) => 0,
                Programs::Policy(_) => {
                    let (dir, own) = (&config.bpf_dir, read::own(&pod.network));
                    admission::admit(dir, applicant, interface.mac, own, &node, record)
                        .map_err(|source| NetError::Admission { netns: netns.clone(), source })?
                }
            };
            if let Err(error) = programs.join(place, interface.index, interface.mtu, id) {
                // The first error is the one to tell.
                let _ = attach::detach(place, interface.index);
                return Err(netlink(error));
            }
            let judged = Some((begun, before + begun.elapsed()));
            let addresses = if meshed { read::own(&pod.network) } else { Vec::new() };
            if meshed {
                let step = "have it carry a proxy's packets";
                let tap = |source| NetError::Tap { netns: netns.clone(), step, source };
                mesh::ready_tap(mesh.dns).map_err(tap)?;
                let name = pod.network.interfaces.first().map_or("", |it| it.name.as_str());
                mesh::take(place, name, &addresses)
                    .map_err(|source| NetError::Mesh { netns: netns.clone(), source })?;
            }
            let (mac, network) = (interface.mac, pod.network);
            Ok(Self { netns, tap, index, mac, network, judged, meshed: addresses })
        })
    }

    /// Lets frames pass, from now on: to be called once the guest is the pod's.
    pub fn open(&self) -> Result<(), NetError> {
        let Some(index) = self.index else { return Ok(()) };
        inside(&self.netns, |place, _| {
            let up = route::link("set the tap up", libc::RTM_NEWLINK, index, true);
            let lead = mesh::lead(index, self.mac, &self.meshed);
            place
                .batch(std::iter::once(up).chain(lead))
                .map_err(|source| NetError::Netlink { netns: self.netns.clone(), source })
        })
    }

    /// Limits what passes, from now on. `place` is the pod's in the policy, without which packets cannot be
    /// limited.
    pub fn limit(
        netns: &Path,
        place: Option<&PodNetwork>,
        limits: &NetLimits,
    ) -> Result<(), NetError> {
        if limits.limits_packets() && place.is_none() {
            return Err(NetError::Unsupported {
                netns: netns.to_owned(),
                reason: "packets are limited by the node's policy, which does not have this pod: \
                         isolation is off, or it has no network"
                    .to_owned(),
            });
        }
        if let Some(place) = place {
            admission::limit_packets(place, limits)
                .map_err(|source| NetError::Admission { netns: netns.to_owned(), source })?;
        }
        inside(netns, |place, _| {
            let netlink = |source| NetError::Netlink { netns: netns.to_owned(), source };
            let links = read::links(place, netns)?;
            let Some(tap) = links.iter().find(|link| link.name == TAP) else { return Ok(()) };
            let interface = attach::partner(tap.index);
            if links.iter().any(|link| link.index == interface) {
                shape::shape(place, interface, limits.egress_bits).map_err(netlink)?;
            }
            shape::shape(place, tap.index, limits.ingress_bits).map_err(netlink)
        })
    }

    /// Gives the pod's place in the policy back. Fine when it has none.
    pub fn dismiss(place: &PodNetwork) -> Result<(), AdmissionError> {
        admission::dismiss(place)
    }

    /// A descriptor of the tap, for the VMM.
    pub fn tap_fd(&self) -> io::Result<OwnedFd> {
        self.tap.try_clone()
    }

    /// The hardware address the guest must use: the pod's interface's.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// The pod's network as the guest is to set it up.
    #[must_use]
    pub fn network(&self) -> Network {
        self.network.clone()
    }

    /// When the pod's place in the policy and its programs were put there, and how long that took: the part of
    /// [`Wire::plug`] that is not making the tap. `None` where there is nothing to judge.
    #[must_use]
    pub fn judged(&self) -> Option<(Instant, Duration)> {
        self.judged
    }

    /// Takes everything of Joey's out of the namespace. Fine when there is nothing, or no namespace.
    pub fn unplug(netns: &Path) -> Result<(), NetError> {
        if is_host_netns(netns) {
            return Ok(());
        }
        let result = inside(netns, |place, _| {
            let netlink = |source| NetError::Netlink { netns: netns.to_owned(), source };
            for link in read::links(place, netns)? {
                let result = if link.name == TAP {
                    let delete =
                        route::link("remove the tap", libc::RTM_DELLINK, link.index, false);
                    place.request(delete)
                } else {
                    attach::detach(place, link.index)
                        .and_then(|()| shape::unshape(place, link.index))
                };
                match result {
                    // Gone between the listing and now.
                    Err(error) if error.errno() == Some(libc::ENODEV) => {}
                    other => other.map_err(netlink)?,
                }
            }
            let mesh = |source| NetError::Mesh { netns: netns.to_owned(), source };
            mesh::give_back(place).map_err(mesh)
        });
        match result {
            Err(NetError::Namespace { source, .. }) if is_gone(&source) => Ok(()),
            other => other,
        }
    }
}

/// Whether the path is the namespace of the host: a pod with `hostNetwork`.
#[must_use]
pub fn is_host_netns(path: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|data| (data.dev(), data.ino())).ok();
    let wanted = identity(path);
    ["/proc/1/ns/net", "/proc/self/ns/net"]
        .iter()
        .any(|host| wanted.is_some() && identity(Path::new(host)) == wanted)
}

/// No file, or one on which the namespace is no longer mounted (`setns` says EINVAL then).
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::EINVAL)
}

/// Runs `work` in a thread of its own inside the namespace, so that no other thread is ever there.
fn inside<T: Send>(
    netns: &Path,
    work: impl FnOnce(&mut Socket, &File) -> Result<T, NetError> + Send,
) -> Result<T, NetError> {
    let fail = |step| move |source| NetError::Namespace { netns: netns.to_owned(), step, source };
    let file = File::open(netns).map_err(fail("open"))?;
    std::thread::scope(|scope| {
        let entered =
            std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
                setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
                    .map_err(|error| fail("enter")(error.into()))?;
                let mut socket = Socket::open()
                    .map_err(|source| NetError::Netlink { netns: netns.to_owned(), source })?;
                work(&mut socket, &file)
            });
        entered
            .map_err(fail("start a thread"))?
            .join()
            .unwrap_or_else(|_| Err(fail("work inside")(io::Error::other("the thread panicked"))))
    })
}

/// Makes the tap, silent: the host's own stack must never speak on it.
fn make_tap(netns: &Path, index: Option<u32>) -> Result<OwnedFd, NetError> {
    let fail = |step| move |source| NetError::Tap { netns: netns.to_owned(), step, source };
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(fail("open /dev/net/tun"))?;
    if let Some(index) = index {
        sys::set_tap_index(tun.as_fd(), index).map_err(fail("choose its index"))?;
    }
    sys::make_tap(tun.as_fd(), TAP).map_err(fail("create"))?;
    silence_tap().map_err(fail("disable IPv6 on the host's side"))?;
    Ok(tun.into())
}

/// Keeps the host's own IPv6 off the tap of the thread's namespace.
fn silence_tap() -> io::Result<()> {
    match fs::write(format!("/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6"), "1") {
        // A host without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The pinned programs that join a pod's two devices.
#[derive(Debug)]
enum Programs {
    /// One for both, which lets everything pass.
    Wire(OwnedFd),
    /// Those that judge.
    Policy(policy::attach::Programs),
}

impl Programs {
    /// Opens them; Joey's tool loads them when this node has not got them yet.
    fn open(config: &Config, mesh: Mesh) -> Result<Self, NetError> {
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

    /// Puts them on a pod's interface and its tap.
    fn join(
        &self,
        place: &mut Socket,
        index: u32,
        mtu: u32,
        id: PodId,
    ) -> Result<(), NetlinkError> {
        let tap = attach::partner(index);
        let size = route::link("set the tap's MTU", libc::RTM_NEWLINK, tap, false);
        place.request(size.number(route::LINK_MTU, mtu))?;
        for device in [tap, index] {
            attach::carry(place, device)?;
        }
        place.batch(match self {
            Self::Wire(program) => {
                [tap, index].map(|device| attach::attach(device, program)).into()
            }
            Self::Policy(programs) => programs.attach(index, id),
        })
    }
}

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

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use joey_ebpf::netlink::{NetlinkError, Socket};
use joey_ebpf::{attach, route, shape};
use joey_protocol::api::Network;
use nix::sched::{CloneFlags, setns};
use nix::time::{ClockId, clock_gettime};

use crate::config::Config;
use crate::mesh::Mode;
use crate::net_limits::NetLimits;
use crate::sandbox::record::PodNetwork;
use crate::sys;
use programs::Programs;
use tap::{TAP, make_tap};

pub use admission::{AdmissionError, Applicant};
pub use mesh::MeshNetError;
pub use node::{Keeper, own_addresses};
pub use strays::{Strays, shims};
pub use tap::ParkedTap;

mod admission;
mod mesh;
mod node;
mod programs;
mod read;
mod strays;
mod tap;
#[cfg(test)]
mod tests;

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
    judged: Option<Judged>,
    /// The pod's addresses, if a mesh's proxy is to reach it by them.
    meshed: Vec<IpAddr>,
}

/// What putting a pod under the policy took: its place there, and the programs on its devices. The part of
/// [`Wire::plug`] that is not making the tap.
#[derive(Debug, Clone, Copy)]
pub struct Judged {
    /// When it began.
    pub begun: Instant,
    /// How long it took.
    pub took: Duration,
    /// How long its thread had a processor meanwhile.
    pub processor: Duration,
}

/// The beginning of a [`Judged`].
struct Begun(Instant, Duration);

impl Begun {
    fn now() -> Self {
        Self(Instant::now(), processor_time())
    }

    fn judged(&self) -> Judged {
        let Self(begun, processor) = *self;
        let processor = processor_time().saturating_sub(processor);
        Judged { begun, took: begun.elapsed(), processor }
    }
}

/// How long the calling thread has had a processor.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
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
        let begun = Begun::now();
        let node = match programs {
            Programs::Policy(_) if !node::are_kept(&config.bpf_dir) => {
                own_addresses().map_err(admission)?
            }
            _ => Vec::new(),
        };
        let before = begun.judged();
        inside(netns, |place, file| {
            // The thread computes for less than a millisecond, and while it has the kernel's lock on network
            // devices and no processor, all other pods of the node wait. A kernel that gives its group no time
            // for this refuses: then it takes longer.
            let _ = sys::hurry();
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
            let Some(mut interface) = pod.interface else {
                let (network, mac) = (Network::new(), NO_MAC);
                let meshed = Vec::new();
                return Ok(Self { netns, tap, index, mac, network, judged: None, meshed });
            };
            let begun = Begun::now();
            let id = match programs {
                Programs::Wire(_) => 0,
                Programs::Policy(_) => {
                    let (dir, own) = (&config.bpf_dir, read::own(&pod.network));
                    interface.other_end = interface.other_end.filter(|_| config.direct);
                    admission::admit(dir, applicant, &interface, own, &node, record)
                        .map_err(|source| NetError::Admission { netns: netns.clone(), source })?
                }
            };
            if let Err(error) = programs.join(place, interface.index, interface.mtu, id) {
                // The first error is the one to tell.
                let _ = attach::detach(place, interface.index);
                return Err(netlink(error));
            }
            let mut judged = begun.judged();
            judged.took += before.took;
            judged.processor += before.processor;
            let judged = Some(judged);
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
        inside(netns, |socket, _| {
            let netlink = |source| NetError::Netlink { netns: netns.to_owned(), source };
            let links = read::links(socket, netns)?;
            let Some(tap) = links.iter().find(|link| link.name == TAP) else { return Ok(()) };
            shape::shape(socket, tap.index, limits.ingress_bits).map_err(netlink)?;
            let interface = attach::partner(tap.index);
            if !links.iter().any(|link| link.index == interface) {
                return Ok(());
            }
            shape::shape(socket, interface, limits.egress_bits).map_err(netlink)?;
            // Only now, so that no frame goes past what shapes it.
            let links = read::links(socket, netns)?;
            let interface = links.iter().find(|link| link.index == interface);
            let Some((place, interface)) = place.zip(interface) else { return Ok(()) };
            let other_end = read::other_end(socket, interface).map_err(netlink)?;
            admission::set_direct(place, other_end.is_some())
                .map_err(|source| NetError::Admission { netns: netns.to_owned(), source })
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

    /// What putting the pod under the policy took. `None` where there is nothing to judge.
    #[must_use]
    pub fn judged(&self) -> Option<Judged> {
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

//! A node of network namespaces: a router, pods with an interface made as CNI would, each joined by the shim's
//! own code to a fake VM ([`vm`]), and a host beyond the router.
//!
//! ```text
//!   VM 1 ── tap joey0 ═ eth0 (pod 1) ── host1 ┐
//!   VM 2 ── tap joey0 ═ eth0 (pod 2) ── host2 ┤ node, routes ── out ── eth0 (peer)
//! ```
//!
//! It has a BPF file system and names of its own, so several can be at once, beside a real node; all of it goes
//! with the value. It stands for what the shim, the programs and the kernel do; the guest is not emulated.

pub mod group;
pub mod netns;
pub mod traffic;
pub mod vm;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};
use joey_ebpf::policy::Reason;
use joey_ebpf::policy::abi::{Counters, Identity, NODE, Ports, Prefix, Rule, Scope, Side, Tenant};
use joey_ebpf::policy::maps::{Lock, Maps};
use joey_shim::config::Config;
use joey_shim::host::net::{Applicant, Wire};
use joey_shim::mesh::Mesh;
use joey_shim::net_limits::NetLimits;
use joey_shim::sandbox::record::PodNetwork;
use tempfile::TempDir;

use self::group::Group;
use self::netns::{NetNs, run};
use self::vm::Vm;
use crate::sys;

/// The peer's addresses.
pub const PEER: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 2);
/// See [`PEER`].
pub const PEER6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0xffff, 0, 0, 0, 0, 0, 2);
/// What every pod knows as its router, as with CNI's plugin ptp.
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 9, 255, 1);
const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0xffff, 1);
/// The peer's tenant.
const OUTSIDE: &str = "outside";

/// How a pod's interface and its VM's tap are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Join {
    /// By Joey, under the node's policy.
    Policy,
    /// By Joey with `isolation = false`: every packet passes.
    Wire,
    /// As Kata's model `tcfilter` does: a filter on each that matches everything and redirects it.
    Mirred,
}

/// The node.
#[derive(Debug)]
pub struct Lab {
    tag: String,
    /// The router.
    pub node: NetNs,
    /// A host beyond it.
    pub peer: NetNs,
    bpf: TempDir,
    state: TempDir,
}

impl Lab {
    /// Makes the node, without pods. Root only.
    pub fn new() -> Result<Self> {
        static LABS: AtomicU32 = AtomicU32::new(0);
        let tag = format!("jl{}x{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let bpf = TempDir::new()?;
        run(Command::new("mount").args(["-t", "bpf", "bpf"]).arg(bpf.path()))?;
        let node = NetNs::add(format!("{tag}n"))?;
        let peer = NetNs::add(format!("{tag}x"))?;
        let lab = Self { tag, node, peer, bpf, state: TempDir::new()? };
        // A state of its own: no policy was applied there.
        let (bpf, state) = (lab.bpf_dir(), lab.state.path());
        std::fs::write(lab.file(), format!("bpf_dir = {bpf:?}\nstate_dir = {state:?}\n"))?;
        for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            lab.node.sysctl(key, "1")?;
        }
        steady(&lab.peer);
        let (peer, far) = (lab.peer.name(), [PEER.to_string(), PEER6.to_string()]);
        lab.node.ip(&[
            &format!("link add out type veth peer name eth0 netns {peer}"),
            // What the peer gets is then what is on a wire, so that its device counts frames.
            "link set out gso_max_segs 1 up",
            "addr add 10.200.0.1/24 dev out",
            "addr add fd09:ffff::1/64 dev out nodad",
        ])?;
        lab.peer.ip(&[
            &format!("addr add {}/24 dev eth0", far[0]),
            &format!("addr add {}/64 dev eth0 nodad", far[1]),
            "link set eth0 up",
            "route add default via 10.200.0.1",
            "route add ::/0 via fd09:ffff::1",
        ])?;
        Ok(lab)
    }

    fn file(&self) -> PathBuf {
        self.state.path().join("config.toml")
    }

    fn bpf_dir(&self) -> PathBuf {
        self.bpf.path().join("joey")
    }

    /// The shim's configuration for a pod that is joined like this.
    #[must_use]
    pub fn config(&self, join: Join) -> Config {
        Config {
            bpf_dir: self.bpf_dir(),
            state_dir: self.state.path().to_owned(),
            isolation: join == Join::Policy,
            joey: Some(crate::paths::joey()),
            file: Some(self.file()),
            ..Config::default()
        }
    }

    /// Makes a pod's namespace and interface; `number` is its own, from 1 to 199.
    pub fn pod(&self, number: u8) -> Result<Pod> {
        let pod = NetNs::add(format!("{}p{number}", self.tag))?;
        let guest = NetNs::add(format!("{}g{number}", self.tag))?;
        self.node.ip(&[
            format!("link add host{number} type veth peer name eth0 netns {}", pod.name()),
            format!("addr add {ROUTER}/32 dev host{number}"),
            format!("addr add {ROUTER6}/128 dev host{number} nodad"),
            format!("link set host{number} up"),
            format!("route add 10.9.0.{number}/32 dev host{number}"),
            format!("route add fd09::{number}/128 dev host{number}"),
        ])?;
        pod.ip(&network(number))?;
        let group = Group::add(&format!("{}p{number}", self.tag))?;
        let (vm, wire, place, mesh) = (None, None, None, Mesh::default());
        Ok(Pod { number, netns: pod, guest, vm, wire, place, mesh, group })
    }

    /// Puts the pod on its wire, as its shim would.
    pub fn plug(&self, pod: &mut Pod, join: Join) -> Result<()> {
        let tap = match join {
            Join::Mirred => pod.redirect()?,
            Join::Policy | Join::Wire => {
                let wire = self.wire(pod, &self.config(join))?;
                wire.open()?;
                let tap = wire.tap_fd()?;
                pod.wire = Some(wire);
                tap
            }
        };
        pod.boot(tap)
    }

    /// The shim's part of it: until [`Wire::open`] nothing passes.
    pub fn wire(&self, pod: &mut Pod, config: &Config) -> Result<Wire> {
        let name = format!("pod{}", pod.number);
        let who =
            Applicant { tenant: name.clone(), pod: Some((name.clone(), name)), mesh: pod.mesh };
        let (netns, mut place) = (pod.netns.path(), None);
        let record = |taken: &PodNetwork| {
            place = Some(taken.clone());
            Ok(())
        };
        // The node's own addresses are those of the namespace that the shim is in.
        let wire = self.node.inside(|| Ok(Wire::plug(&netns, config, None, &who, record)?));
        pod.place = place;
        wire
    }

    /// What was counted of a pod.
    pub fn counted(&self, pod: &Pod) -> Result<Counters> {
        let id = pod.place.as_ref().context("the pod has no place")?.id;
        Maps::open(&self.bpf_dir())?.counters(id)?.context("the pod has no counters")
    }

    /// How many packets that a side of a pod has sent were dropped for a reason.
    pub fn dropped(&self, pod: &Pod, side: Side, reason: Reason) -> Result<u64> {
        Ok(self.counted(pod)?.dropped(side, reason))
    }

    /// Has the node's policy let the peer and these pods open anything to each other, pods between each other
    /// not; the node may open anything on them, as by default.
    pub fn allow(&self, pods: &[&Pod]) -> Result<()> {
        self.permit(pods, false)
    }

    /// The same, and pods between each other.
    pub fn allow_all(&self, pods: &[&Pod]) -> Result<()> {
        self.permit(pods, true)
    }

    fn permit(&self, pods: &[&Pod], all: bool) -> Result<()> {
        let maps = Maps::open(&self.bpf_dir())?;
        let lock = Lock::take(&self.bpf_dir())?;
        let epoch = maps.active()?.epoch + 1;
        let outside = maps.number_of(&lock, OUTSIDE)?;
        for (address, bits) in [(PEER.into(), 24), (PEER6.into(), 64)] {
            let identity = Identity { tenant: outside, ..Identity::default() };
            maps.put_identity(epoch, Prefix { address, bits }, identity)?;
        }
        let number = |pod: &&Pod| maps.number_of(&lock, &format!("pod{}", pod.number));
        let numbers: Vec<Tenant> = pods.iter().map(number).collect::<Result<_, _>>()?;
        let mut scopes = vec![Scope::Service { class: NODE, opener: Side::Peer }];
        for own in &numbers {
            let others = numbers.iter().filter(|other| all && *other != own);
            for (from, to) in [(*own, outside), (outside, *own)] {
                scopes.push(Scope::Tenants { from, to });
            }
            scopes.extend(others.map(|other| Scope::Tenants { from: *own, to: *other }));
        }
        for scope in scopes {
            maps.put_rule(epoch, &Rule { scope, ports: Ports::Any })?;
        }
        maps.activate(&lock, epoch)?;
        Ok(maps.keep_only(&lock, epoch)?)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg("-l").arg(self.bpf.path()));
    }
}

/// Has streams be those of most Linux hosts, whatever this one prefers; fine where it has no others.
fn steady(netns: &NetNs) {
    let _ = netns.sysctl("ipv4/tcp_congestion_control", "cubic");
}

/// What sets up a pod's interface, in its namespace or in its VM.
fn network(number: u8) -> [String; 7] {
    [
        "link set eth0 up".to_owned(),
        format!("addr add 10.9.0.{number}/32 dev eth0"),
        format!("addr add fd09::{number}/128 dev eth0 nodad"),
        format!("route add {ROUTER}/32 dev eth0"),
        format!("route add {ROUTER6}/128 dev eth0"),
        format!("route add default via {ROUTER}"),
        format!("route add ::/0 via {ROUTER6}"),
    ]
}

/// A pod and its VM.
#[derive(Debug)]
pub struct Pod {
    number: u8,
    vm: Option<Vm>,
    wire: Option<Wire>,
    place: Option<PodNetwork>,
    /// How it is in a mesh, from when it is plugged.
    pub mesh: Mesh,
    /// Its namespace on the node.
    pub netns: NetNs,
    /// What its VM sees.
    pub guest: NetNs,
    /// In which its VM runs.
    pub group: Group,
}

impl Pod {
    /// Its address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        Ipv4Addr::new(10, 9, 0, self.number).into()
    }

    /// Its IPv6 address.
    #[must_use]
    pub fn address6(&self) -> IpAddr {
        Ipv6Addr::new(
            0xfd09,
            0,
            0,
            0,
            0,
            0,
            0,
            u16::from_str_radix(&self.number.to_string(), 16).unwrap_or(0),
        )
        .into()
    }

    /// The running VM.
    pub fn vm(&self) -> Result<&Vm> {
        self.vm.as_ref().context("the pod was not plugged")
    }

    /// Its place in the node's policy.
    #[must_use]
    pub fn place(&self) -> Option<&PodNetwork> {
        self.place.as_ref()
    }

    /// Limits it, as `joey limit` has the shim do.
    pub fn limit(&self, limits: &NetLimits) -> Result<()> {
        Ok(Wire::limit(&self.netns.path(), self.place(), limits)?)
    }

    /// Takes the VM away, and all that the shim has made.
    pub fn unplug(&mut self) -> Result<()> {
        self.vm = None;
        self.wire = None;
        Wire::unplug(&self.netns.path())?;
        match self.place.take() {
            Some(place) => Ok(Wire::dismiss(&place)?),
            None => Ok(()),
        }
    }

    fn redirect(&self) -> Result<OwnedFd> {
        const TAP: &str = "tap0_kata";
        let tap = self.netns.inside(|| Ok(sys::make_tap(TAP)?))?;
        self.netns.sysctl(&format!("ipv6/conf/{TAP}/disable_ipv6"), "1")?;
        self.netns.ip(&[format!("link set {TAP} up")])?;
        let join = |from: &str, to: &str| {
            [
                format!("qdisc add dev {from} ingress"),
                format!(
                    "filter add dev {from} parent ffff: protocol all u32 match u8 0 0 action mirred egress \
                     redirect dev {to}"
                ),
            ]
        };
        self.netns.tc(&[join("eth0", TAP), join(TAP, "eth0")].concat())?;
        Ok(tap)
    }

    /// Starts the fake VM with the interface's own addresses.
    fn boot(&mut self, tap: OwnedFd) -> Result<()> {
        let vm = Vm::start(&self.guest, tap, self.group.door())?;
        let own =
            run(Command::new("ip").args(["-n", self.netns.name(), "-o", "link", "show", "eth0"]))?;
        let mac = own.split_once("link/ether ").and_then(|(_, rest)| rest.split(' ').next());
        let mac = mac.with_context(|| format!("no hardware address in {own:?}"))?;
        self.guest.ip(&[format!("link set eth0 address {mac}")])?;
        self.guest.ip(&network(self.number))?;
        steady(&self.guest);
        self.vm = Some(vm);
        Ok(())
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.unplug();
    }
}

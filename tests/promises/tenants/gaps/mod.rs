//! There is no moment at which what is not allowed passes: not before a pod's policy is there, not after, and not
//! because somebody was killed. Pods send all the time, over both families; listeners count what arrives.

mod kills;
mod wire;

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_tests::pod::{self, Container, Pod};
use k8s_cri::v1::{ContainerConfig, ContainerState};

pub use self::kills::{at_each_step, by_kills};
pub use self::wire::on_the_wire;
use super::{Context, Peer, Policy, only_joey};
use crate::context::{refused, same};
use crate::volumes::probed;

/// Addresses of the node, one of each family: at the first two nothing is allowed, at the others everything.
const FORBIDDEN: [&str; 2] = ["10.77.0.1", "fd77::1"];
const ALLOWED: [&str; 2] = ["10.88.0.1", "fd88::1"];
const PORT: u16 = 9999;

/// Sends to these addresses, from its first instruction until its end, and tells what it gets.
fn sender(addresses: impl IntoIterator<Item = IpAddr>) -> ContainerConfig {
    let mut words = ["/probe", "exchange", &PORT.to_string()].map(str::to_owned).to_vec();
    let targets = addresses.into_iter().map(|ip| std::net::SocketAddr::from((ip, PORT)));
    words.extend(targets.map(|target| target.to_string()));
    probed(pod::container("sender", &words.iter().map(String::as_str).collect::<Vec<_>>()))
}

/// To all of these addresses of the node.
fn to_the_node() -> ContainerConfig {
    sender(FORBIDDEN.iter().chain(&ALLOWED).filter_map(|address| address.parse().ok()))
}

/// A pod without a VM, whose packets nobody judges as they leave, that sends to the pods that come after it.
struct Flood<'n> {
    pod: Pod<'n>,
    sender: Container<'n>,
}

impl<'n> Flood<'n> {
    /// To the addresses that the next so many pods get.
    fn run(ctx: &Context<'n>, pods: u8) -> Result<Self> {
        let pod = Pod::run(ctx.node, "runc", "blue")?;
        let mut next = Vec::new();
        for own in pod.addresses()? {
            for more in 1..=pods {
                next.push(match own.parse()? {
                    IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() + u32::from(more)).into(),
                    IpAddr::V6(ip) => {
                        IpAddr::from(Ipv6Addr::from_bits(ip.to_bits() + u128::from(more)))
                    }
                });
            }
        }
        let sender = pod.start(&sender(next))?;
        Ok(Self { pod, sender })
    }

    /// Tells it the hardware address of the pod in a namespace, whose VM does not answer yet.
    fn aim(&self, ctx: &Context<'_>, netns: &str) -> Result<()> {
        const AIM: &str = r#"set -e
pod=${1##*/}
own=$(for each in $(ls /run/netns); do
    ip -n $each -o addr | grep -q "inet $2/" && echo $each
done || true)
mac=$(ip -n $pod -o link show eth0 | sed 's,.*link/ether \([^ ]*\).*,\1,')
for address in $(ip -n $pod -o addr show eth0 scope global | sed 's,.*inet6* \([^/]*\)/.*,\1,'); do
    ip -n $own neigh replace $address lladdr $mac dev eth0 nud permanent
done"#;
        let own = self.pod.addresses()?.swap_remove(0);
        let aimed = ctx.inside("sh", &["-c", AIM, "aim", netns, &own])?;
        ensure!(aimed.status.success(), "aim at {netns}: {aimed:?}");
        Ok(())
    }

    fn end(self) -> Result<()> {
        let state = self.sender.status()?.state();
        same("what floods goes on", state, ContainerState::ContainerRunning)?;
        self.pod.remove()
    }
}

/// Checks that a sender was told nothing by another tenant.
fn heard_nothing(sender: &Container<'_>) -> Result<()> {
    let (heard, errors) = sender.logs()?;
    let (heard, errors) = (String::from_utf8_lossy(&heard), String::from_utf8_lossy(&errors));
    ensure!(heard.is_empty(), "heard from another tenant: {heard:?} {errors:?}");
    Ok(())
}

/// What has arrived at the node, by family.
#[derive(Default)]
struct Arrived {
    forbidden: [AtomicU64; 2],
    allowed: [AtomicU64; 2],
    over: AtomicBool,
}

impl Arrived {
    fn allowed(&self) -> [u64; 2] {
        [0, 1].map(|family: usize| self.allowed[family].load(Ordering::Relaxed))
    }

    /// Waits until more of what is allowed has arrived over both families: the pods do send.
    fn more(&self) -> Result<()> {
        let (before, end) = (self.allowed(), Instant::now() + pod::SOON);
        while self.allowed().iter().zip(before).any(|(now, before)| *now == before) {
            let now = self.allowed();
            ensure!(Instant::now() < end, "no more arrives (IPv4, IPv6): {before:?}, then {now:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// The addresses at which nothing is allowed, on the node until this is dropped.
struct Forbidden<'a, 'n>(&'a Context<'n>);

impl<'a, 'n> Forbidden<'a, 'n> {
    fn add(ctx: &'a Context<'n>) -> Result<Self> {
        let added = Self(ctx);
        for address in FORBIDDEN {
            let output = ctx.inside("ip", &["addr", "add", address, "dev", "lo"])?;
            ensure!(output.status.success(), "ip addr add {address}: {output:?}");
        }
        Ok(added)
    }
}

impl Drop for Forbidden<'_, '_> {
    fn drop(&mut self) {
        for address in FORBIDDEN {
            let _ = self.0.inside("ip", &["addr", "del", address, "dev", "lo"]);
        }
    }
}

/// Listens at an address of the node's, as soon as it is one.
fn listen(ctx: &Context<'_>, address: &str) -> Result<UdpSocket> {
    let end = Instant::now() + pod::SOON;
    loop {
        match ctx.node.in_network(|| UdpSocket::bind((address, PORT)))? {
            // The bridge's is looked for on the link first when the bridge has got its first pod.
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => {
                let socket = other.with_context(|| format!("listen at {address}"))?;
                socket.set_read_timeout(Some(Duration::from_millis(100)))?;
                return Ok(socket);
            }
        }
    }
}

/// Listens at all addresses while `work` runs; fails if anything reached those that are forbidden. There must be a
/// pod: without one the bridge has no address of IPv6.
fn watched(ctx: &Context<'_>, work: impl FnOnce(&Arrived) -> Result<()>) -> Result<()> {
    let _forbidden = Forbidden::add(ctx)?;
    let arrived = Arrived::default();
    let mut sockets = Vec::new();
    for (addresses, counts) in [(FORBIDDEN, &arrived.forbidden), (ALLOWED, &arrived.allowed)] {
        for (address, count) in addresses.into_iter().zip(counts) {
            sockets.push((listen(ctx, address)?, count));
        }
    }
    std::thread::scope(|scope| {
        for (socket, count) in &sockets {
            scope.spawn(|| {
                while !arrived.over.load(Ordering::Relaxed) {
                    if socket.recv(&mut [0; 64]).is_ok() {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let result = work(&arrived);
        arrived.over.store(true, Ordering::Relaxed);
        result
    })?;
    let [forbidden, allowed] =
        [arrived.forbidden, arrived.allowed].map(|counts| counts.map(AtomicU64::into_inner));
    ensure!(
        forbidden == [0, 0],
        "datagrams passed that may not (IPv4, IPv6): {forbidden:?}, beside {allowed:?} that may"
    );
    Ok(())
}

/// From a pod's first instruction, one that found a machine waiting and one that did not; and to it.
pub fn at_the_start(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let flood = Flood::run(ctx, 8)?;
    watched(ctx, |arrived| {
        let mut pods = Vec::new();
        for number in 0..4 {
            let pod = ctx.pod(&format!("sender{number}"))?;
            let container = pod.start(&to_the_node())?;
            pods.push((pod, container));
        }
        arrived.more()?;
        arrived.more()?;
        for (pod, container) in pods {
            heard_nothing(&container)?;
            pod.remove()?;
        }
        Ok(())
    })?;
    flood.end()
}

/// What a boot leaves: the maps are gone, what was applied is on the disk. No pod starts before it is in force
/// again, whoever is killed on the way, and one that cannot be keeps pods from starting until it is mended.
pub fn after_a_boot(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let policy = Policy::new(ctx);
    let allow = "  allow:\n  - {from: red, to: blue, ports: [80/tcp]}\n";
    policy.apply(allow)?;
    ctx.node.kill_network()?;
    forget_maps(ctx)?;
    let identities = ctx.node.dir().join("joey/network/identities.json");
    let before = std::fs::read(&identities).ok();
    std::fs::write(&identities, "{")?;
    refused("a pod without a policy", ctx.pod("early"), "cannot be put in force")?;
    policy.apply(allow)?;
    if let Some(before) = before {
        std::fs::write(&identities, before)?;
    }
    let works = || -> Result<()> {
        let (red, blue) = (Peer::run(ctx, "red", "red")?, Peer::run(ctx, "blue", "blue")?);
        red.expect(&blue, 80, true)?;
        red.expect(&blue, 81, false)?;
        blue.expect(&red, 80, false)?;
        red.remove()?;
        blue.remove()
    };
    works()?;
    forget_maps(ctx)?;
    for milliseconds in 0..20 {
        let mut command = Command::new(joey_tests::paths::joey());
        command.args(["ebpf", "load"]).env("JOEY_CONFIG", ctx.node.dir().join("joey.toml"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = ctx.node.spawn_inside(command)?;
        std::thread::sleep(Duration::from_millis(milliseconds * 12));
        let _ = child.kill();
        child.wait()?;
    }
    works()?;
    ctx.node.start_network()
}

/// Takes the pins of the policy's maps and programs away, as a boot does.
fn forget_maps(ctx: &Context<'_>) -> Result<()> {
    let forgotten = ctx.inside("sh", &["-c", "rm -r /sys/fs/bpf/joey/policy-*"])?;
    ensure!(forgotten.status.success(), "the maps are still pinned: {forgotten:?}");
    Ok(())
}

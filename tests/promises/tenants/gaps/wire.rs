//! A machine that has its tap before the pod has a place in the policy, and keeps it when all of the pod is gone: it
//! writes datagrams to the tap all the time, and another tenant sends to the pod's addresses.
//!
//! The node is one of network namespaces ([`joey_tests::lab`]), so that the machine's side can be held. A shim that
//! is killed at a step is one that does not go on from there.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_shim::host::net::{ParkedTap, Wire};
use joey_tests::frames::{datagram, udp_port};
use joey_tests::lab::{Join, Lab, PEER, PEER6, Pod};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::PORT;
use crate::context::Context;

/// How long things stay as they are after each step.
const A_WHILE: Duration = Duration::from_millis(150);
/// What a VMM writes and reads before each frame: `struct virtio_net_hdr`, nothing left undone.
const HEADER: usize = 10;

/// Threads that go on until this is dropped, and what came of them, by family.
#[derive(Default)]
struct Traffic {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Traffic {
    fn go_on(&mut self, mut step: impl FnMut() + Send + 'static) {
        let over = self.over.clone();
        self.threads.push(std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                step();
                std::thread::sleep(Duration::from_millis(1));
            }
        }));
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Datagrams that arrived, by family: at the other tenant from the machine, and at the machine.
#[derive(Default)]
struct Arrived {
    out: [AtomicU64; 2],
    into: [AtomicU64; 2],
}

impl Arrived {
    fn seen(&self) -> [u64; 4] {
        let [[a, b], [c, d]] = [&self.out, &self.into]
            .map(|way| [0, 1].map(|n: usize| way[n].load(Ordering::Relaxed)));
        [a, b, c, d]
    }
}

/// The other tenant, and what it sends to.
struct Scene {
    arrived: Arc<Arrived>,
    pod: Pod,
    lab: Lab,
    traffic: Traffic,
}

impl Scene {
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let pod = lab.pod(1)?;
        // The machine answers nobody who asks for its hardware address.
        let mac = pod.mac()?.map(|byte| format!("{byte:02x}")).join(":");
        let known = [pod.address(), pod.address6()]
            .map(|ip| format!("neigh replace {ip} lladdr {mac} dev host1 nud permanent"));
        lab.node.ip(&known)?;
        let (arrived, mut traffic) = (Arc::new(Arrived::default()), Traffic::default());
        let ends: [(IpAddr, IpAddr); 2] =
            [(PEER.into(), pod.address()), (PEER6.into(), pod.address6())];
        for (family, (peer, own)) in ends.into_iter().enumerate() {
            let socket = lab.peer.inside(|| Ok(UdpSocket::bind((peer, PORT))?))?;
            socket.set_nonblocking(true)?;
            let arrived = arrived.clone();
            traffic.go_on(move || {
                // Unreachable, refused: all the same.
                let _ = socket.send_to(b"datagram", (own, PORT));
                while socket.recv(&mut [0; 64]).is_ok() {
                    arrived.out[family].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Ok(Self { arrived, pod, lab, traffic })
    }

    /// A machine that has a tap and uses it from now on.
    fn machine(&mut self) -> Result<ParkedTap> {
        let parked = ParkedTap::make()?;
        let tap = File::from(nonblocking(parked.descriptor()?)?);
        let macs = (self.pod.mac()?, self.lab.router_mac(&self.pod)?);
        let frames = [(self.pod.address(), PEER.into()), (self.pod.address6(), PEER6.into())]
            .map(|(from, to)| [vec![0; HEADER], datagram(macs, from, to, PORT)].concat());
        let arrived = self.arrived.clone();
        self.traffic.go_on(move || {
            let mut tap = &tap;
            for frame in &frames {
                // Down, or gone: all the same.
                let _ = tap.write(frame);
            }
            let mut buffer = [0; 2048];
            while let Ok(length) = tap.read(&mut buffer) {
                let frame = buffer.get(HEADER..length).unwrap_or_default();
                if udp_port(frame) == Some(PORT) {
                    arrived.into[usize::from(frame[12] != 8)].fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(parked)
    }

    /// Nothing arrives for a while.
    fn nothing(&self, step: &str) -> Result<()> {
        let before = self.arrived.seen();
        std::thread::sleep(A_WHILE);
        let now = self.arrived.seen();
        ensure!(
            now == before,
            "{step}: from the VM (IPv4, IPv6) and to it: {before:?}, then {now:?}"
        );
        Ok(())
    }

    /// Something arrives, over both families, both ways: otherwise nothing would be seen at all.
    fn something(&self) -> Result<()> {
        let (before, end) = (self.arrived.seen(), Instant::now() + Duration::from_secs(10));
        while self.arrived.seen().iter().zip(before).any(|(now, before)| *now <= before + 3) {
            let now = self.arrived.seen();
            ensure!(Instant::now() < end, "allowed, and not all arrives: {before:?}, then {now:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Plugs, as the pod's shim does, one that is killed before it takes the place if `killed`.
    fn plug(&mut self, parked: ParkedTap, killed: bool) -> Result<Wire> {
        let (arrived, config) = (self.arrived.clone(), self.lab.config(Join::Policy));
        let before = arrived.seen();
        let wire = self.lab.wire_with(&mut self.pod, &config, Some(parked), |_| {
            std::thread::sleep(A_WHILE);
            match killed {
                true => Err(io::Error::other("killed")),
                false => Ok(()),
            }
        });
        ensure!(
            arrived.seen() == before,
            "before it has a place: {before:?}, {:?}",
            arrived.seen()
        );
        wire
    }
}

fn nonblocking(tap: OwnedFd) -> Result<OwnedFd> {
    let flags = OFlag::from_bits_truncate(fcntl(&tap, FcntlArg::F_GETFL)?);
    fcntl(&tap, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(tap)
}

/// Step by step, forwards and back, with a shim killed after each: nothing passes but while the pod's wire is open
/// and its policy allows it.
pub fn on_the_wire(_ctx: &Context<'_>) -> Result<()> {
    let mut scene = Scene::new()?;
    scene.nothing("no machine")?;
    let parked = scene.machine()?;
    scene.nothing("a machine that waits")?;
    let killed = scene.plug(parked, true).err().context("it was not killed")?;
    ensure!(format!("{killed:#}").contains("killed"), "{killed:#}");
    scene.nothing("killed before it has a place, its machine not")?;
    let parked = scene.machine()?;
    drop(scene.plug(parked, false)?);
    scene.nothing("killed before the wire is open, its machine not")?;
    // The next start finds a tap, filters and a place.
    let left = scene.pod.place().cloned().context("no place")?;
    let parked = scene.machine()?;
    let wire = scene.plug(parked, false)?;
    scene.nothing("joined, not open")?;
    wire.open()?;
    scene.nothing("open, and nothing is allowed")?;
    scene.lab.allow(&[&scene.pod])?;
    scene.something()?;
    scene.lab.allow(&[])?;
    // What was on its way is there.
    std::thread::sleep(A_WHILE);
    scene.nothing("not allowed any more")?;
    scene.lab.allow(&[&scene.pod])?;
    scene.something()?;
    // The shim is killed, its machine not: the pod goes on as it is allowed to, and no further.
    drop(wire);
    scene.lab.allow(&[])?;
    std::thread::sleep(A_WHILE);
    scene.nothing("without a shim, not allowed any more")?;
    scene.lab.allow(&[&scene.pod])?;
    scene.something()?;
    // What `delete` does, killed after each step: allowed still, and no wire or no place.
    Wire::unplug(&scene.pod.netns.path())?;
    std::thread::sleep(A_WHILE);
    scene.nothing("unplugged, with a place")?;
    let place = scene.pod.place().cloned().context("no place")?;
    for place in [left, place] {
        Wire::dismiss(&place)?;
    }
    scene.nothing("without a place")?;
    // Another start, whose place goes first: its wire is left.
    let parked = scene.machine()?;
    let wire = scene.plug(parked, false)?;
    wire.open()?;
    scene.something()?;
    Wire::dismiss(scene.pod.place().context("no place")?)?;
    std::thread::sleep(A_WHILE);
    scene.nothing("open, without a place")?;
    Ok(())
}

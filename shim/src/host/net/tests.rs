//! In namespaces of their own, as root: a node with a router, a pod with an interface made as CNI
//! would, and a guest that is another namespace, whose tap is joined to the wire's in user space.

#![allow(clippy::print_stdout)]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use joey_ebpf::policy::maps::Maps;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;

static LABS: AtomicU32 = AtomicU32::new(0);

fn try_run(command: &str) -> Result<String, String> {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{command}: {}", String::from_utf8_lossy(&output.stderr)))
    }
}

fn run(command: &str) -> String {
    try_run(command).unwrap()
}

fn plug(netns: &Path, config: &Config) -> Result<Wire, NetError> {
    Wire::plug(netns, config, None, &Applicant::default(), |_| Ok(()))
}

/// Namespaces `<tag>n` (node), `<tag>p` (pod), `<tag>g` (guest), and a BPF file system.
struct Lab {
    tag: String,
    bpf: tempfile::TempDir,
    config: Config,
}

impl Lab {
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() || !Path::new("/dev/net/tun").exists() {
            // Not by a macro, whose output a harness keeps for itself when a test passes.
            let why = "\nSKIPPED the pod's wire: needs root and /dev/net/tun\n";
            let _ = io::Write::write_all(&mut io::stdout(), why.as_bytes());
            return None;
        }
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let tag = format!("jy{}x{number}", std::process::id());
        let bpf = tempfile::tempdir().unwrap();
        run(&format!("mount -t bpf bpf {}", bpf.path().display()));
        let bpf_dir = bpf.path().join("joey");
        let config = Config { bpf_dir, isolation: false, ..Config::default() };
        joey_ebpf::loader::load(&config.bpf_dir, || Ok(())).unwrap();
        for role in ["n", "p", "g"] {
            run(&format!("ip netns add {tag}{role}"));
        }
        Some(Self { tag, bpf, config })
    }

    /// An interface for the pod with both families, the node as its router.
    fn with_interface() -> Option<Self> {
        let lab = Self::new()?;
        let pod = lab.name("p");
        lab.ip(
            "n",
            &format!("link add host0 mtu 1450 type veth peer name eth0 mtu 1450 netns {pod}"),
        );
        lab.ip("n", "addr add 10.9.0.1/24 dev host0");
        lab.ip("n", "addr add fd09::1/64 dev host0 nodad");
        lab.ip("n", "link set host0 up");
        lab.ip("p", "addr add 10.9.0.2/24 brd + dev eth0");
        lab.ip("p", "addr add fd09::2/64 dev eth0 nodad");
        lab.ip("p", "link set eth0 up");
        lab.ip("p", "route add default via 10.9.0.1 metric 7");
        lab.ip("p", "-6 route add default via fd09::1");
        lab.ip("p", "neigh add 10.9.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
        Some(lab)
    }

    fn name(&self, role: &str) -> String {
        format!("{}{role}", self.tag)
    }

    fn path(&self, role: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}", self.name(role)))
    }

    fn ip(&self, role: &str, arguments: &str) -> String {
        run(&format!("ip -n {} {arguments}", self.name(role)))
    }

    fn plug(&self) -> Result<Wire, NetError> {
        let wire = plug(&self.path("p"), &self.config)?;
        assert!(!self.ip("p", "-o link show").contains("joey0: <BROADCAST,MULTICAST,UP"));
        wire.open().map(|()| wire)
    }

    /// What Joey has in the pod's namespace.
    fn left(&self) -> String {
        let pod = self.name("p");
        let mut left = run(&format!("tc -n {pod} qdisc show dev eth0"));
        left.retain(|c| c != '\n');
        let filters = try_run(&format!("tc -n {pod} filter show dev eth0 ingress"));
        let links = self.ip("p", "-o link show");
        format!(
            "{}{}{}",
            left.replace("qdisc noqueue 0: root refcnt 2 ", ""),
            filters.unwrap_or_default(),
            if links.contains(TAP) { TAP } else { "" }
        )
    }

    fn inside<T: Send>(&self, role: &str, work: impl FnOnce() -> T + Send) -> T {
        inside(&self.path(role), |_, _| Ok(work())).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for role in ["n", "p", "g"] {
            let _ = try_run(&format!("ip netns del {}", self.name(role)));
        }
        let _ = try_run(&format!("umount {}", self.bpf.path().display()));
    }
}

/// Joins the wire to a tap in the guest's namespace, which gets the pod's network; ends with the
/// returned descriptor's partner.
fn start_guest(lab: &Lab, wire: &Wire) -> OwnedFd {
    let tap = wire.tap_fd().unwrap();
    let own = lab.inside("g", || make_tap(&lab.path("g"), None).unwrap());
    let mac = wire.mac().map(|byte| format!("{byte:02x}")).join(":");
    let network = wire.network();
    let interface = &network.interfaces[0];
    lab.ip("g", &format!("link set {TAP} address {mac} mtu {} name eth0", interface.mtu));
    run(&format!("ip netns exec {} sysctl -qw net.ipv6.conf.eth0.disable_ipv6=0", lab.name("g")));
    lab.ip("g", "link set eth0 up");
    lab.ip("g", "addr add 10.9.0.2/24 dev eth0");
    lab.ip("g", "addr add fd09::2/64 dev eth0 nodad");
    let (stop, end) = nix::unistd::pipe().unwrap();
    thread::spawn(move || {
        let (mut a, mut b) = (File::from(tap), File::from(own));
        let mut buffer = vec![0; 70_000];
        loop {
            let wait = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut fds = [wait(a.as_fd()), wait(b.as_fd()), wait(stop.as_fd())];
            poll(&mut fds, PollTimeout::NONE).unwrap();
            let ready = fds.map(|fd| fd.any().unwrap_or(true));
            if ready[2] {
                return;
            }
            for (ready, forward) in [(ready[0], true), (ready[1], false)] {
                let (from, to) = if forward { (&mut a, &mut b) } else { (&mut b, &mut a) };
                if ready {
                    let Ok(length) = from.read(&mut buffer) else { return };
                    let _ = to.write(&buffer[..length]);
                }
            }
        }
    });
    end
}

fn v4(last: u8) -> SocketAddr {
    (Ipv4Addr::new(10, 9, 0, last), 7000).into()
}

/// Sends a mebibyte there and back.
fn echo(lab: &Lab, server: &str, client: &str, address: SocketAddr) {
    let listener = lab.inside(server, || TcpListener::bind(address).unwrap());
    let echoing = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
    });
    let sent: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
    let limit = Duration::from_secs(5);
    let mut stream = lab.inside(client, || TcpStream::connect_timeout(&address, limit)).unwrap();
    stream.write_all(&sent).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    assert!(back == sent, "{address}: {} bytes came back", back.len());
    echoing.join().unwrap();
}

#[test]
fn frames_pass_both_ways_and_nothing_is_left() {
    let Some(lab) = Lab::with_interface() else { return };
    let before = lab.left();
    let wire = lab.plug().unwrap();
    let guest = start_guest(&lab, &wire);
    let v6 = |last| SocketAddr::from((Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, last), 7000));
    for (server, client, address) in
        [("n", "g", v4(1)), ("g", "n", v4(2)), ("n", "g", v6(1)), ("g", "n", v6(2))]
    {
        echo(&lab, server, client, address);
    }
    Wire::unplug(&lab.path("p")).unwrap();
    assert_eq!(lab.left(), before);
    Wire::unplug(&lab.path("p")).unwrap();
    drop((guest, wire));
}

#[test]
fn the_guest_is_told_what_cni_made() {
    let Some(lab) = Lab::with_interface() else { return };
    let wire = lab.plug().unwrap();
    let network = wire.network();
    let [interface] = network.interfaces.as_slice() else { panic!("{network:?}") };
    assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1450));
    assert_eq!(interface.mac, wire.mac());
    let addresses: Vec<_> = interface.addresses.iter().map(|a| (a.ip.len(), a.prefix)).collect();
    assert_eq!(addresses, [(4, 24), (16, 64)]);
    assert_eq!(interface.addresses[0].broadcast, [10, 9, 0, 255]);
    let default = |ipv6| {
        let mut all = network.routes.iter();
        all.find(|r| r.ipv6 == ipv6 && r.destination.is_empty()).unwrap()
    };
    assert_eq!((default(false).gateway.as_slice(), default(false).metric), (&[10, 9, 0, 1][..], 7));
    assert_eq!(default(true).gateway.len(), 16);
    assert_eq!(network.routes.len(), 4, "{:?}", network.routes);
    assert_eq!(network.neighbours.len(), 1);
}

#[test]
fn a_crash_leaves_nothing_that_hinders() {
    let Some(lab) = Lab::with_interface() else { return };
    let before = lab.left();
    // The shim died, its VMM still has the tap.
    let orphan = lab.plug().unwrap();
    let wire = lab.plug().unwrap();
    let guest = start_guest(&lab, &wire);
    echo(&lab, "g", "n", v4(2));
    drop(orphan);
    echo(&lab, "g", "n", v4(2));
    drop((guest, wire));
    thread::sleep(Duration::from_millis(50));
    // Both are gone: only filters are left, which drop.
    let limit = Duration::from_millis(500);
    let error = lab.inside("n", || TcpStream::connect_timeout(&v4(2), limit)).unwrap_err();
    assert_eq!(
        error.kind(),
        io::ErrorKind::TimedOut,
        "the host's stack must not answer for the pod"
    );
    Wire::unplug(&lab.path("p")).unwrap();
    assert_eq!(lab.left(), before);
    run(&format!("ip netns del {}", lab.name("p")));
    Wire::unplug(&lab.path("p")).unwrap();
}

#[test]
fn interfaces_that_a_guest_cannot_have_are_refused() {
    let Some(lab) = Lab::with_interface() else { return };
    lab.ip("p", "link add net1 type veth peer name far1");
    lab.ip("p", "addr add 10.10.0.2/24 dev net1");
    let error = lab.plug().unwrap_err().to_string();
    assert!(error.contains("eth0, net1"), "{error}");
    assert!(matches!(
        plug(Path::new("/proc/self/ns/net"), &lab.config),
        Err(NetError::Unsupported { .. })
    ));
    assert!(is_host_netns(Path::new("/proc/self/ns/net")) && !is_host_netns(&lab.path("p")));
}

#[test]
fn a_node_that_cannot_load_says_so() {
    let Some(mut lab) = Lab::new() else { return };
    lab.config.bpf_dir = lab.bpf.path().join("other");
    for (joey, words) in [
        ("/nonexistent/joey", "run `/nonexistent/joey ebpf load`"),
        ("/bin/false", "`/bin/false ebpf load` failed (exit status: 1)"),
        ("/bin/true", "may read another configuration"),
    ] {
        lab.config.joey = Some(joey.into());
        let error = lab.plug().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_pod_without_interface_gets_a_tap_to_nowhere() {
    let Some(lab) = Lab::new() else { return };
    let wire = lab.plug().unwrap();
    assert!(wire.network().interfaces.is_empty());
    assert!(wire.tap_fd().unwrap().as_raw_fd() > 2);
    Wire::unplug(&lab.path("p")).unwrap();
}

#[test]
fn an_interface_of_any_index_works() {
    let Some(lab) = Lab::new() else { return };
    let pod = lab.name("p");
    lab.ip("p", "link add eth0 index 70007 type veth peer name host0");
    lab.ip("p", &format!("link set host0 netns {}", lab.name("n")));
    lab.ip("n", "addr add 10.9.0.1/24 dev host0");
    lab.ip("n", "link set host0 up");
    lab.ip("p", "addr add 10.9.0.2/24 dev eth0");
    lab.ip("p", "link set eth0 up");
    let wire = lab.plug().unwrap_or_else(|error| panic!("{pod}: {error}"));
    let _guest = start_guest(&lab, &wire);
    echo(&lab, "n", "g", v4(1));
}

#[test]
fn plugging_is_quick() {
    let Some(lab) = Lab::with_interface() else { return };
    let mut plugs = Vec::new();
    let mut unplugs = Vec::new();
    for _ in 0..50 {
        let start = Instant::now();
        let wire = lab.plug().unwrap();
        plugs.push(start.elapsed());
        drop(wire);
        let start = Instant::now();
        Wire::unplug(&lab.path("p")).unwrap();
        unplugs.push(start.elapsed());
    }
    for (what, times) in [("plug", &mut plugs), ("unplug", &mut unplugs)] {
        times.sort();
        println!("{what}: p50 {:?}, p99 {:?}", times[25], times[49]);
    }
}

/// Joey's qdisc of a device of the pod's, as `tc` words it; empty if it has none.
fn limit_of(lab: &Lab, device: &str) -> String {
    let shown = run(&format!("tc -n {} qdisc show dev {device}", lab.name("p")));
    let own = shown.lines().find_map(|line| line.strip_prefix("qdisc tbf 6a79: root refcnt "));
    own.map_or(String::new(), |line| line[2..].split(" burst").next().unwrap().to_owned())
}

fn limits(egress_bits: u64, ingress_bits: u64) -> NetLimits {
    NetLimits { egress_bits, ingress_bits, ..NetLimits::default() }
}

#[test]
fn limits_can_be_set_changed_and_taken_off() {
    let Some(lab) = Lab::with_interface() else { return };
    let before = lab.left();
    let wire = lab.plug().unwrap();
    let guest = start_guest(&lab, &wire);
    let netns = lab.path("p");
    let steps = [
        (limits(10_000_000, 20_000_000), ["rate 10Mbit", "rate 20Mbit"]),
        // One way only; what the other had goes.
        (limits(50_000_000, 0), ["rate 50Mbit", ""]),
        (limits(0, 1_000_000_000), ["", "rate 1Gbit"]),
        // The least and more than 32 bits of bytes can say.
        (limits(1000, 100_000_000_000), ["rate 1Kbit", "rate 100Gbit"]),
        (NetLimits::default(), ["", ""]),
        (NetLimits::default(), ["", ""]),
        (limits(100_000_000, 100_000_000), ["rate 100Mbit", "rate 100Mbit"]),
    ];
    for (limits, expected) in steps {
        Wire::limit(&netns, None, &limits).unwrap();
        assert_eq!(["eth0", TAP].map(|device| limit_of(&lab, device)), expected, "{limits:?}");
    }
    echo(&lab, "g", "n", v4(2));
    echo(&lab, "n", "g", v4(1));
    Wire::unplug(&netns).unwrap();
    assert_eq!(lab.left(), before, "unplugging takes the limits off too");
    drop((guest, wire));
}

#[test]
fn limits_that_cannot_be_followed_say_so() {
    let Some(lab) = Lab::with_interface() else { return };
    let packets = NetLimits { egress_packets: 1000, ..NetLimits::default() };
    let error = Wire::limit(&lab.path("p"), None, &packets).unwrap_err().to_string();
    assert!(error.contains("isolation is off"), "{error}");
    // No VM is there yet, or no more: nothing to limit.
    Wire::limit(&lab.path("p"), None, &limits(1_000_000, 0)).unwrap();
    assert_eq!(limit_of(&lab, "eth0"), "");
}

#[test]
fn packets_are_limited_where_the_policy_has_the_pod() {
    let Some(mut lab) = Lab::with_interface() else { return };
    lab.config.isolation = true;
    let (before, netns, mut place) = (lab.left(), lab.path("p"), None);
    let who = Applicant { tenant: "blue".to_owned(), pod: None, ..Applicant::default() };
    let record = |taken: &PodNetwork| {
        place = Some(taken.clone());
        Ok(())
    };
    let wire = Wire::plug(&netns, &lab.config, None, &who, record).unwrap();
    let place = place.unwrap();
    let maps = Maps::open(&lab.config.bpf_dir).unwrap();
    let limited = || maps.pod(place.id).unwrap().map(|pod| pod.limited);
    assert_eq!(limited(), Some(false));
    // One way packets, the other way bits.
    let both = NetLimits { ingress_packets: 5, ..limits(1_000_000, 0) };
    for (limits, packets, bits) in [
        (both, true, "rate 1Mbit"),
        (limits(2_000_000, 0), false, "rate 2Mbit"),
        (both, true, "rate 1Mbit"),
    ] {
        Wire::limit(&netns, Some(&place), &limits).unwrap();
        assert_eq!(limited(), Some(packets), "{limits:?}");
        assert_eq!(limit_of(&lab, "eth0"), bits);
        assert_eq!(limit_of(&lab, TAP), "");
    }
    drop(wire);
    Wire::unplug(&netns).unwrap();
    Wire::dismiss(&place).unwrap();
    assert_eq!((limited(), lab.left()), (None, before));
    // The place is gone, and limiting does not take it again.
    Wire::limit(&netns, Some(&place), &both).unwrap();
    assert_eq!(limited(), None);
}

#[test]
fn a_limit_of_others_is_not_taken_off() {
    let Some(lab) = Lab::with_interface() else { return };
    let wire = lab.plug().unwrap();
    let (netns, pod) = (lab.path("p"), lab.name("p"));
    run(&format!("tc -n {pod} qdisc add dev eth0 root handle 1: tbf rate 1mbit burst 8k limit 9k"));
    Wire::limit(&netns, None, &NetLimits::default()).unwrap();
    Wire::unplug(&netns).unwrap();
    assert!(run(&format!("tc -n {pod} qdisc show dev eth0")).contains("qdisc tbf 1: root"));
    drop(wire);
}

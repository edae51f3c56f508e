//! Connections of this very process, in a network namespace and a cgroup of their own.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use super::*;

const TCP: u16 = 6;
const UDP: u16 = 17;

fn endpoint(at: SocketAddr) -> Vec<u8> {
    let address = match at.ip() {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    [&address.octets()[..], &at.port().to_le_bytes()].concat()
}

fn key(at: &str, protocol: u16) -> Vec<u8> {
    [endpoint(at.parse().unwrap()), protocol.to_le_bytes().to_vec()].concat()
}

fn front(first: u32, count: u32, affinity: u32, id: u32) -> Vec<u8> {
    [first, count, affinity, id].map(u32::to_le_bytes).concat()
}

fn elements(all: &[SocketAddr]) -> Vec<u8> {
    let mut all = all.to_vec();
    all.sort();
    all.into_iter().flat_map(|at| [endpoint(at), vec![0; 6]].concat()).collect()
}

/// Two listeners of TCP and two of UDP, of one family.
struct Servers {
    tcp: [TcpListener; 2],
    udp: [UdpSocket; 2],
}

impl Servers {
    fn new(address: &str) -> Self {
        let at = SocketAddr::new(address.parse().unwrap(), 0);
        let udp = [(); 2].map(|()| UdpSocket::bind(at).unwrap());
        for socket in &udp {
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        }
        Self { tcp: [(); 2].map(|()| TcpListener::bind(at).unwrap()), udp }
    }

    fn tcp(&self) -> [SocketAddr; 2] {
        self.tcp.each_ref().map(|it| it.local_addr().unwrap())
    }

    fn udp(&self) -> [SocketAddr; 2] {
        self.udp.each_ref().map(|it| it.local_addr().unwrap())
    }
}

/// Connects; which of the two was reached, without what one is told of the peer.
fn reached(servers: &Servers, service: &str) -> (usize, SocketAddr) {
    let at: SocketAddr = service.parse().unwrap();
    let near = TcpStream::connect(at).unwrap();
    let index = servers.tcp.iter().position(|listener| {
        listener.set_nonblocking(true).unwrap();
        listener.accept().is_ok_and(|(_, from)| from == near.local_addr().unwrap())
    });
    (index.unwrap(), near.peer_addr().unwrap())
}

fn tcp(services: &mut Services, servers: &Servers, service: &str) {
    services.begin(8, 16).unwrap();
    services.put_backends(0, &elements(&servers.tcp())).unwrap();
    services.put_fronts(&key(service, TCP), &front(0, 2, 0, 1)).unwrap();
    assert!(
        TcpStream::connect_timeout(&service.parse().unwrap(), Duration::from_millis(50)).is_err()
    );
    services.commit().unwrap();
    let all: Vec<_> = (0..64).map(|_| reached(servers, service)).collect();
    assert!(all.iter().all(|(_, peer)| *peer == service.parse().unwrap()), "{all:?}");
    let firsts = all.iter().filter(|(index, _)| *index == 0).count();
    assert!((10..54).contains(&firsts), "{firsts} of 64 at the first of two");
    // With affinity all at one, which goes, and then all at the other.
    services.put_fronts(&key(service, TCP), &front(0, 2, 60, 1)).unwrap();
    let kept: Vec<_> = (0..16).map(|_| reached(servers, service).0).collect();
    assert!(kept.iter().all(|index| *index == kept[0]), "{kept:?}");
    let other = servers.tcp()[1 - kept[0]];
    services.put_backends(2, &elements(&[other])).unwrap();
    services.put_fronts(&key(service, TCP), &front(2, 1, 60, 1)).unwrap();
    assert!((0..8).all(|_| reached(servers, service).0 == 1 - kept[0]));
    // Both again: the one that it is at now stays.
    services.put_fronts(&key(service, TCP), &front(0, 2, 60, 1)).unwrap();
    assert!((0..8).all(|_| reached(servers, service).0 == 1 - kept[0]));
    services.put_fronts(&key(service, TCP), &front(0, 0, 0, 1)).unwrap();
    let refused = TcpStream::connect(service).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    services.remove_fronts(&key(service, TCP)).unwrap();
    assert!(
        TcpStream::connect_timeout(&service.parse().unwrap(), Duration::from_millis(50)).is_err()
    );
}

/// Asks by a socket, connected or not; which server has answered.
fn asked(socket: &UdpSocket, servers: &Servers, to: Option<&str>) -> Option<usize> {
    let mut buffer = [0; 16];
    match to {
        Some(to) => socket.send_to(b"?", to).unwrap(),
        None => socket.send(b"?").unwrap(),
    };
    let index = servers.udp.iter().position(|server| {
        server.set_nonblocking(true).unwrap();
        let asked = server.recv_from(&mut buffer);
        asked.is_ok_and(|(_, from)| server.send_to(b"!", from).is_ok())
    });
    let from = match to {
        Some(_) => socket.recv_from(&mut buffer).unwrap().1,
        None => {
            socket.recv(&mut buffer).unwrap();
            socket.peer_addr().unwrap()
        }
    };
    to.inspect(|to| assert_eq!(from, to.parse().unwrap()));
    index
}

fn udp(services: &mut Services, servers: &Servers, service: &str) {
    let any = if service.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    services.begin(8, 16).unwrap();
    services.put_backends(0, &elements(&servers.udp())).unwrap();
    services.put_fronts(&key(service, UDP), &front(0, 2, 0, 7)).unwrap();
    services.commit().unwrap();
    let one = |()| {
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    };
    let sockets = [(); 32].map(one);
    let mut at: Vec<_> =
        sockets.iter().map(|socket| asked(socket, servers, Some(service)).unwrap()).collect();
    let again: Vec<_> =
        sockets.iter().map(|socket| asked(socket, servers, Some(service)).unwrap()).collect();
    assert_eq!(at, again, "a socket stays where it is");
    at.sort_unstable();
    at.dedup();
    assert_eq!(at, [0, 1], "both are used");
    let connected = one(());
    connected.connect(service).unwrap();
    assert_eq!(connected.peer_addr().unwrap(), service.parse().unwrap());
    let first = asked(&connected, servers, None).unwrap();
    assert_eq!(asked(&connected, servers, Some(service)), Some(first));
    // One endpoint goes, and its sockets move with their next datagram.
    services.put_backends(4, &elements(&servers.udp()[1..])).unwrap();
    services.put_fronts(&key(service, UDP), &front(4, 1, 0, 7)).unwrap();
    assert!(sockets.iter().all(|socket| asked(socket, servers, Some(service)) == Some(1)));
    services.put_fronts(&key(service, UDP), &front(0, 0, 0, 7)).unwrap();
    let refused = sockets[0].send_to(b"?", service).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    // Connected elsewhere it is what it is.
    connected.connect(servers.udp()[0]).unwrap();
    assert_eq!(connected.peer_addr().unwrap(), servers.udp()[0]);
}

fn all(cgroup: &File) {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let run = |arguments: &[&str]| {
        assert!(std::process::Command::new("ip").args(arguments).status().unwrap().success());
    };
    run(&["link", "set", "lo", "up"]);
    run(&["route", "add", "blackhole", "10.96.0.0/16"]);
    run(&["-6", "route", "add", "blackhole", "fd96::/64"]);
    let netns = File::open("/proc/thread-self/ns/net").unwrap();
    let mut services = Services::attach(cgroup.as_fd(), netns.as_fd()).unwrap();
    for (own, service) in [("127.0.0.1", "10.96.0.1:443"), ("::1", "[fd96::1]:443")] {
        let servers = Servers::new(own);
        tcp(&mut services, &servers, service);
        udp(&mut services, &servers, service);
    }
    // As programs that speak IPv6 alone connect to IPv4.
    let servers = Servers::new("127.0.0.1");
    services.put_backends(8, &elements(&servers.tcp())).unwrap();
    services.put_fronts(&key("10.96.0.1:443", TCP), &front(8, 2, 0, 3)).unwrap();
    let near = TcpStream::connect("[::ffff:10.96.0.1]:443").unwrap();
    assert_eq!(near.peer_addr().unwrap(), "[::ffff:10.96.0.1]:443".parse().unwrap());
    services.clear().unwrap();
    assert!(!services.has_table());
    assert!(
        TcpStream::connect_timeout(&"10.96.0.1:443".parse().unwrap(), Duration::from_millis(50))
            .is_err()
    );
}

#[test]
fn connections_to_services_reach_their_endpoints() {
    if !nix::unistd::geteuid().is_root() {
        // Not by a macro, whose output a harness keeps for itself when a test passes.
        let why = "\nSKIPPED connections to services: needs root\n";
        let _ = io::stdout().write_all(why.as_bytes());
        return;
    }
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let root = mounts.lines().filter(|line| line.contains(" cgroup2 "));
    let root = root.filter_map(|line| line.split(' ').nth(1)).next().unwrap().to_owned();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned();
    let cgroup = format!("{root}/joey-services-{}", std::process::id());
    fs::create_dir(&cgroup).unwrap();
    let enter = |cgroup: &str| fs::write(format!("{cgroup}/cgroup.procs"), "0").unwrap();
    enter(&cgroup);
    let opened = File::open(&cgroup).unwrap();
    // The namespace ends with the thread.
    let done = std::thread::scope(|scope| scope.spawn(|| all(&opened)).join());
    enter(&format!("{root}{own}"));
    fs::remove_dir(&cgroup).unwrap();
    done.unwrap();
}

//! Ambient mode on namespaces and a fake VM: the same set-up and programs as a pod's, without a machine.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use joey_ebpf::policy::Reason;
use joey_ebpf::policy::abi::Side;
use joey_shim::mesh::{Mesh, Mode};
use joey_tests::lab::netns::NetNs;
use joey_tests::lab::{Join, Lab, PEER, PEER6, Pod};
use joey_tests::proxy::Proxy;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, setsockopt,
    socket, sockopt,
};
use tempfile::TempDir;

use crate::context::{Context, same};

/// How long what should come may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// A node with one meshed pod.
pub(super) struct Meshed {
    pub(super) lab: Lab,
    pub(super) pod: Pod,
    folder: TempDir,
}

impl Meshed {
    pub(super) fn new(dns: bool) -> Result<Self> {
        let lab = Lab::new()?;
        let mut pod = lab.pod(1)?;
        pod.mesh = Mesh { mode: Mode::Ambient, dns };
        lab.plug(&mut pod, Join::Policy)?;
        lab.allow(&[&pod])?;
        Ok(Self { lab, pod, folder: TempDir::new()? })
    }

    pub(super) fn proxy(&self, more: &[&str]) -> Result<Proxy> {
        self.proxy_of(&self.pod, more)
    }

    pub(super) fn proxy_of(&self, pod: &Pod, more: &[&str]) -> Result<Proxy> {
        let log = self.folder.path().join(pod.netns.name());
        Proxy::start(&pod.netns.path(), Some(&log), more)
    }

    pub(super) fn dropped(&self, side: Side, reason: Reason) -> Result<u64> {
        self.lab.dropped(&self.pod, side, reason)
    }

    /// Addresses of the host beyond the router, with the pod's of the same family.
    pub(super) fn pairs(&self) -> [(IpAddr, IpAddr); 2] {
        [(PEER.into(), self.pod.address()), (PEER6.into(), self.pod.address6())]
    }
}

/// A server that says who has connected, and sends back what it gets.
pub(super) fn echo(netns: &NetNs, address: SocketAddr) -> Result<SocketAddr> {
    let listener = netns.inside(|| Ok(TcpListener::bind(address)?))?;
    let own = listener.local_addr()?;
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || -> Result<()> {
                let peer = stream.peer_addr()?;
                stream.write_all(format!("{peer}\n").as_bytes())?;
                let mut piece = [0; 65536];
                loop {
                    match stream.read(&mut piece)? {
                        0 => return Ok(()),
                        length => stream.write_all(&piece[..length])?,
                    }
                }
            });
        }
    });
    Ok(own)
}

/// Connects, waiting no longer than this.
pub(super) fn open(netns: &NetNs, to: SocketAddr, patience: Duration) -> Result<TcpStream> {
    let connected = netns.inside(|| Ok(TcpStream::connect_timeout(&to, patience)?));
    let stream = connected.with_context(|| format!("connect from {} to {to}", netns.name()))?;
    stream.set_read_timeout(Some(patience))?;
    Ok(stream)
}

/// The line that [`echo`] begins with.
pub(super) fn greeted(stream: &mut TcpStream) -> Result<SocketAddr> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        ensure!(stream.read(&mut byte)? == 1, "the connection ended after {line:?}");
        line.push(byte[0]);
    }
    Ok(String::from_utf8(line)?.trim().parse()?)
}

/// Connects to [`echo`], and returns whom it saw and who connected, after some bytes have gone there and back.
pub(super) fn talk(netns: &NetNs, to: SocketAddr) -> Result<(IpAddr, SocketAddr)> {
    let mut stream = open(netns, to, PATIENCE)?;
    let who = greeted(&mut stream)?;
    let sent: Vec<u8> = (0..300_000_u32).map(|n| n as u8).collect();
    let (mut writer, mut back) = (stream.try_clone()?, vec![0; sent.len()]);
    thread::scope(|scope| {
        let writing = scope.spawn(|| writer.write_all(&sent));
        stream.read_exact(&mut back)?;
        writing.join().map_err(|_| anyhow!("panicked"))??;
        anyhow::Ok(())
    })?;
    ensure!(back == sent, "other bytes came back from {to}");
    Ok((who.ip(), stream.local_addr()?))
}

/// What the VM opens goes through the proxy, to where it was to go; it is counted once, as the pod's.
pub fn outbound(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(false)?;
    let proxy = meshed.proxy(&[])?;
    for (address, pod) in meshed.pairs() {
        let to = echo(&meshed.lab.peer, SocketAddr::new(address, 0))?;
        let before = meshed.lab.counted(&meshed.pod)?;
        let (who, own) = talk(&meshed.pod.guest, to)?;
        same("the server's peer", who, pod)?;
        let seen = proxy.wait("connection", |seen| seen.peer == Some(own))?;
        same("listener", seen.listener.as_str(), "outbound")?;
        same("original destination", seen.destination, Some(to))?;
        same("known by", seen.by.as_str(), "getsockname")?;
        let bytes = meshed.lab.counted(&meshed.pod)?.bytes;
        for side in [Side::Vm, Side::Peer] {
            let counted = bytes[side as usize] - before.bytes[side as usize];
            ensure!((300_000..400_000).contains(&counted), "{side:?}: {counted} bytes of 300,000");
        }
    }
    // The namespace's own sockets are nobody's to take, whatever their mark.
    let before = proxy.seen()?;
    for (address, pod) in meshed.pairs() {
        let to = echo(&meshed.lab.peer, SocketAddr::new(address, 0))?;
        same("the server's peer", talk(&meshed.pod.netns, to)?.0, pod)?;
    }
    same("what the proxy saw of it", proxy.seen()?, before)?;
    no_rules(&meshed.pod.netns)
}

/// Neither filter rules nor tracked connections.
fn no_rules(netns: &NetNs) -> Result<()> {
    let run = |program: &str, words: &[&str]| -> Result<String> {
        let output = netns.inside(|| Ok(Command::new(program).args(words).output()?))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    // Where there is no such program, there are no rules of its.
    for (program, words) in
        [("nft", &["list", "ruleset"][..]), ("iptables-save", &[]), ("ip6tables-save", &[])]
    {
        let rules = run(program, words).unwrap_or_default();
        ensure!(!rules.contains("-A ") && !rules.contains("chain"), "{program}: {rules}");
    }
    let tracked = netns.inside(|| {
        Ok(std::fs::read_to_string("/proc/thread-self/net/stat/nf_conntrack").unwrap_or_default())
    })?;
    // The first column is how many there are.
    let some = tracked.lines().skip(1).any(|line| !line.starts_with("00000000 "));
    ensure!(!some, "tracked connections: {tracked}");
    Ok(())
}

/// What others open to the pod comes through the proxy, from who opened it.
pub fn inbound(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(false)?;
    let proxy = meshed.proxy(&[])?;
    for (peer, address) in meshed.pairs() {
        let to = echo(&meshed.pod.guest, SocketAddr::new(address, 0))?;
        let (who, own) = talk(&meshed.lab.peer, to)?;
        same("the server's peer", who, peer)?;
        let seen = proxy.wait("connection", |seen| seen.peer == Some(own))?;
        same("listener", seen.listener.as_str(), "inbound")?;
        same("original destination", seen.destination, Some(to))?;
    }
    Ok(())
}

/// Between two meshed pods: from the one's proxy to the other's, at its port for those.
pub fn tunnel(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(false)?;
    let mut other = meshed.lab.pod(2)?;
    other.mesh = meshed.pod.mesh;
    meshed.lab.plug(&mut other, Join::Policy)?;
    meshed.lab.allow_all(&[&meshed.pod, &other])?;
    let (first, second) = (meshed.proxy(&["--tunnel"])?, meshed.proxy_of(&other, &[])?);
    for (own, address) in
        [(meshed.pod.address(), other.address()), (meshed.pod.address6(), other.address6())]
    {
        let to = echo(&other.guest, SocketAddr::new(address, 0))?;
        let (who, client) = talk(&meshed.pod.guest, to)?;
        same("the server's peer", who, own)?;
        first.wait("connection", |seen| seen.peer == Some(client))?;
        let seen = second.wait("tunnel", |seen| {
            seen.listener == "tunnel" && seen.peer.is_some_and(|peer| peer.ip() == own)
        })?;
        same("its port", seen.destination, Some(SocketAddr::new(address, 15008)))?;
    }
    Ok(())
}

/// A socket that sends datagrams back.
fn udp_echo(netns: &NetNs, address: IpAddr) -> Result<SocketAddr> {
    let socket = netns.inside(|| Ok(UdpSocket::bind((address, 0))?))?;
    let own = socket.local_addr()?;
    thread::spawn(move || {
        let mut piece = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut piece) {
            let _ = socket.send_to(&piece[..length], from);
        }
    });
    Ok(own)
}

fn udp_talk(netns: &NetNs, own: IpAddr, to: SocketAddr) -> Result<()> {
    let socket = netns.inside(|| Ok(UdpSocket::bind((own, 0))?))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut answer = [0; 16];
    for _ in 0..3 {
        socket.send_to(b"datagram", to)?;
        match socket.recv_from(&mut answer) {
            Ok((8, from)) if from == to => return Ok(()),
            Ok(other) => anyhow::bail!("{to} answers by {other:?}"),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("no answer from {to}")
}

/// Asks for an echo by ICMP.
fn ping(from: &NetNs, to: IpAddr) -> Result<()> {
    from.sysctl("ipv4/ping_group_range", "0 0")?;
    let (family, proto, asks, answers) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8, 0),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129),
    };
    let own =
        from.inside(|| Ok(socket(family, SockType::Datagram, SockFlag::empty(), Some(proto))?))?;
    // All that is needed of it are calls that do not ask what it carries.
    let own = UdpSocket::from(own);
    own.set_read_timeout(Some(Duration::from_secs(2)))?;
    connect(own.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(to, 0)))?;
    let mut answer = [0; 64];
    own.send(&[asks, 0, 0, 0, 0, 0, 0, 1])?;
    let length = own.recv(&mut answer).with_context(|| format!("ping {to}"))?;
    ensure!(length == 8 && answer[0] == answers, "{to} answers {answer:?}");
    Ok(())
}

/// Without any proxy: datagrams, pings and the node's own connections need none. And what the proxy sends by datagrams
/// is answered to it.
pub fn past_the_proxy(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(false)?;
    let (lab, pod) = (&meshed.lab, &meshed.pod);
    for (peer, own) in meshed.pairs() {
        udp_talk(&pod.guest, own, udp_echo(&lab.peer, peer)?)?;
        udp_talk(&lab.peer, peer, udp_echo(&pod.guest, own)?)?;
        ping(&pod.guest, peer)?;
        ping(&lab.peer, own)?;
        // As a kubelet asks whether a container is well.
        let to = echo(&pod.guest, SocketAddr::new(own, 0))?;
        talk(&lab.node, to)?;
        // A proxy's own resolver asks others.
        udp_talk(&pod.netns, own, udp_echo(&lab.peer, peer)?)?;
    }
    same("connections without a proxy", meshed.dropped(Side::Peer, Reason::Proxy)?, 0)
}

/// A query for the address of `a.b`, and what a resolver says.
fn query(exchange: impl FnOnce(&[u8]) -> Result<Vec<u8>>) -> Result<()> {
    let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\x01b\0\0\x01\0\x01";
    let answer = exchange(query)?;
    ensure!(answer.starts_with(b"\x12\x34") && answer.ends_with(&[192, 0, 2, 53]), "{answer:?}");
    Ok(())
}

/// Whom the VM asks for names. They are not there.
const RESOLVERS: [&str; 2] = ["10.96.0.10", "fd96::a"];

fn ask_by_udp(guest: &NetNs, resolver: IpAddr) -> Result<()> {
    let any = if resolver.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = guest.inside(|| Ok(UdpSocket::bind(any)?))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    // Connected: an answer from anybody else would not be taken.
    socket.connect((resolver, 53))?;
    query(|question| {
        socket.send(question)?;
        let mut answer = vec![0; 512];
        let length = socket.recv(&mut answer)?;
        Ok(answer[..length].to_vec())
    })
}

fn ask_by_tcp(guest: &NetNs, resolver: IpAddr) -> Result<()> {
    let mut stream = open(guest, (resolver, 53).into(), PATIENCE)?;
    query(|question| {
        stream.write_all(&[&[0, question.len() as u8], question].concat())?;
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut answer = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    })
}

/// The proxy answers, by UDP and by TCP.
pub(super) fn resolves(guest: &NetNs) -> Result<()> {
    for resolver in RESOLVERS {
        let resolver = resolver.parse()?;
        ask_by_udp(guest, resolver).with_context(|| format!("ask {resolver} by UDP"))?;
        ask_by_tcp(guest, resolver).with_context(|| format!("ask {resolver} by TCP"))?;
    }
    Ok(())
}

/// Queries are answered by the proxy as if by whom the VM asks; and by nobody if the proxy is not there.
pub fn dns(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(true)?;
    let guest = &meshed.pod.guest;
    for resolver in RESOLVERS {
        ensure!(ask_by_udp(guest, resolver.parse()?).is_err(), "an answer of nobody");
    }
    ensure!(meshed.dropped(Side::Vm, Reason::Proxy)? > 0, "not counted");
    let proxy = meshed.proxy(&["--resolve", "192.0.2.53"])?;
    resolves(guest)?;
    for by in ["udp", "tcp"] {
        let count = proxy.seen()?.iter().filter(|seen| seen.by == by).count();
        ensure!(count >= 2, "{count} queries by {by}: {:?}", proxy.seen()?);
    }
    // Others' connections are still the proxy's.
    for (address, _) in meshed.pairs() {
        talk(guest, echo(&meshed.lab.peer, SocketAddr::new(address, 0))?)?;
    }
    Ok(())
}

/// A connection from this very port.
fn from_port(netns: &NetNs, port: u16, to: SocketAddr) -> Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let any = if to.is_ipv4() { "0.0.0.0" } else { "::" }.parse::<IpAddr>()?;
    let own = netns.inside(|| Ok(socket(family, SockType::Stream, SockFlag::empty(), None)?))?;
    setsockopt(&own, sockopt::ReuseAddr, &true)?;
    let time = nix::sys::time::TimeVal::new(5, 0);
    setsockopt(&own, sockopt::SendTimeout, &time)?;
    setsockopt(&own, sockopt::ReceiveTimeout, &time)?;
    bind(own.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any, port)))?;
    connect(own.as_fd().as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(own.into())
}

/// A port that the VM uses anew while the proxy still waits for late segments of the connection before.
pub fn ports_come_again(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(false)?;
    let _proxy = meshed.proxy(&[])?;
    for (address, _) in meshed.pairs() {
        // It closes first, so the proxy does towards the VM.
        let listener = meshed.lab.peer.inside(|| Ok(TcpListener::bind((address, 0))?))?;
        let to = listener.local_addr()?;
        thread::spawn(move || listener.incoming().for_each(drop));
        for round in 0..5 {
            let begun = Instant::now();
            let mut stream = from_port(&meshed.pod.guest, 40_000, to)
                .with_context(|| format!("{to}, round {round}"))?;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest)?;
            drop(stream);
            let took = begun.elapsed();
            ensure!(took < Duration::from_secs(2), "{to}, round {round}: {took:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// One connection after the other, from four at once.
pub fn many(_: &Context<'_>) -> Result<()> {
    const EACH: usize = 25_000;
    let meshed = Meshed::new(false)?;
    let proxy = Proxy::start(&meshed.pod.netns.path(), None, &[])?;
    let served = Arc::new(AtomicBool::new(true));
    let result = thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let meshed = &meshed;
                let listener = meshed.lab.peer.inside(|| Ok(TcpListener::bind((PEER, 0))?))?;
                let to = listener.local_addr()?;
                let served = served.clone();
                thread::spawn(move || {
                    for mut stream in listener.incoming().map_while(Result::ok) {
                        let _ = stream.write_all(b"x");
                        if !served.load(Ordering::Relaxed) {
                            return;
                        }
                    }
                });
                anyhow::Ok(scope.spawn(move || {
                    meshed.pod.guest.inside(|| {
                        for number in 0..EACH {
                            let one = || -> Result<()> {
                                let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
                                stream.set_read_timeout(Some(PATIENCE))?;
                                stream.read_exact(&mut [0])?;
                                Ok(())
                            };
                            one().with_context(|| format!("connection {number} to {to}"))?;
                        }
                        Ok(())
                    })
                }))
            })
            .collect::<Result<_>>()?;
        workers.into_iter().try_for_each(|it| it.join().map_err(|_| anyhow!("panicked"))?)
    });
    served.store(false, Ordering::Relaxed);
    result?;
    drop(proxy);
    Ok(())
}

/// All of a namespace that CNI could look at.
pub(super) fn state(netns: &NetNs) -> Result<String> {
    let mut text = String::new();
    for words in [
        &["-d", "address", "show"][..],
        &["rule"],
        &["-6", "rule"],
        &["-d", "route", "show", "table", "all"],
        &["-d", "-6", "route", "show", "table", "all"],
        &["neighbour", "show", "nud", "permanent"],
    ] {
        let output = netns.inside(|| Ok(Command::new("ip").args(words).output()?))?;
        text += &String::from_utf8_lossy(&output.stdout);
    }
    for device in ["eth0", "joey0"] {
        for what in ["qdisc", "filter"] {
            let output = netns.inside(|| {
                let mut tc = Command::new("tc");
                Ok(tc.args([what, "show", "dev", device]).output()?)
            })?;
            text += &String::from_utf8_lossy(&output.stdout);
        }
    }
    let settings =
        ["ipv4/tcp_max_tw_buckets", "ipv4/conf/all/rp_filter", "ipv4/conf/eth0/forwarding"];
    for key in settings {
        text += &netns.inside(|| Ok(std::fs::read_to_string(format!("/proc/sys/net/{key}"))?))?;
    }
    // Times that pass, and the link's own addresses, which the kernel takes its time for.
    Ok(text
        .lines()
        .filter(|line| !line.contains("valid_lft") && !line.contains("fe80::"))
        .collect::<Vec<_>>()
        .join("\n"))
}

/// The namespace is in the end as it was before.
pub fn given_back(_: &Context<'_>) -> Result<()> {
    let lab = Lab::new()?;
    let mut pod = lab.pod(1)?;
    let before = state(&pod.netns)?;
    pod.mesh = Mesh { mode: Mode::Ambient, dns: true };
    for _ in 0..2 {
        lab.plug(&mut pod, Join::Policy)?;
        // A start that is repeated finds what the first has left.
        drop(lab.wire(&mut pod, &lab.config(Join::Policy))?);
        ensure!(state(&pod.netns)? != before, "nothing was changed");
        pod.unplug()?;
        let after = state(&pod.netns)?;
        let other = |one: &str, of: &str| -> Vec<String> {
            one.lines()
                .filter(|line| !of.lines().any(|it| it == *line))
                .map(str::to_owned)
                .collect()
        };
        ensure!(
            after == before,
            "gone: {:?}, more: {:?}",
            other(&before, &after),
            other(&after, &before)
        );
    }
    pod.unplug()
}

//! Nothing passes that the proxy does not carry.

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_ebpf::policy::Reason;
use joey_ebpf::policy::abi::Side;
use joey_shim::mesh::{Mesh, Mode};
use joey_shim::net_limits::NetLimits;
use joey_tests::lab::traffic::Load;
use joey_tests::lab::{Join, Lab, PEER};
use nix::sys::socket::{setsockopt, sockopt};

use super::lab::{Meshed, echo, greeted, open, talk};
use crate::context::{Context, refused};

/// How long what should not come is waited for.
const BRIEFLY: Duration = Duration::from_millis(700);

/// Refused: not connected, or ended without a word.
fn nothing(stream: Result<TcpStream>) -> bool {
    match stream {
        Err(_) => true,
        Ok(mut stream) => {
            let _ = stream.set_read_timeout(Some(BRIEFLY));
            greeted(&mut stream).is_err()
        }
    }
}

/// Neither way, until there is a proxy; and it is counted why.
pub fn no_proxy(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(false)?;
    let (pod, peer) = (&meshed.pod, &meshed.lab.peer);
    let mut ways = Vec::new();
    for (address, own) in meshed.pairs() {
        ways.push((&pod.guest, echo(peer, SocketAddr::new(address, 0))?));
        ways.push((peer, echo(&pod.guest, SocketAddr::new(own, 0))?));
    }
    for (from, to) in &ways {
        ensure!(nothing(open(from, *to, BRIEFLY)), "{to} was reached");
    }
    for side in [Side::Vm, Side::Peer] {
        let count = meshed.dropped(side, Reason::Proxy)?;
        ensure!(count >= 2, "{count} segments of {side:?} were counted");
    }
    let proxy = meshed.proxy(&[])?;
    for (from, to) in &ways {
        talk(from, *to)?;
    }
    drop(proxy);
    for (from, to) in &ways {
        ensure!(nothing(open(from, *to, BRIEFLY)), "{to} was reached without the proxy");
    }
    Ok(())
}

/// Streams end with the proxy, new ones are nothing, and all is well with the next.
pub fn killed_under_load(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(false)?;
    let (lab, pod) = (&meshed.lab, &meshed.pod);
    let (there, here) = (
        echo(&lab.peer, SocketAddr::new(PEER.into(), 0))?,
        echo(&pod.guest, SocketAddr::new(pod.address(), 0))?,
    );
    for round in 0..3 {
        let proxy = meshed.proxy(&[])?;
        talk(&pod.guest, there).with_context(|| format!("round {round}"))?;
        talk(&lab.peer, here).with_context(|| format!("round {round}"))?;
        let mut held = open(&pod.guest, there, BRIEFLY)?;
        greeted(&mut held)?;
        let loads = [
            Load::tcp(&pod.guest, &lab.peer, PEER.into(), 2)?,
            Load::tcp(&lab.peer, &pod.guest, pod.address(), 2)?,
        ];
        thread::sleep(Duration::from_millis(200));
        ensure!(loads.iter().all(|load| load.received() > 0), "no load");
        drop(proxy);
        held.set_read_timeout(Some(Duration::from_secs(2)))?;
        let ended = held.read(&mut [0]);
        ensure!(
            ended.as_ref().is_ok_and(|length| *length == 0)
                || ended
                    .as_ref()
                    .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset),
            "a connection of the killed proxy: {ended:?}"
        );
        thread::sleep(Duration::from_millis(100));
        let received = loads.each_ref().map(Load::received);
        thread::sleep(Duration::from_millis(200));
        let later = loads.each_ref().map(Load::received);
        ensure!(received == later, "bytes went on without the proxy: {received:?}, {later:?}");
        ensure!(nothing(open(&pod.guest, there, BRIEFLY)), "{there} was reached");
        ensure!(nothing(open(&lab.peer, here, BRIEFLY)), "{here} was reached");
    }
    Ok(())
}

/// The proxy's ports are not for others, nor for the pod; a mark that the VM gives is nothing; and what would be the
/// proxy's own address is refused.
pub fn nobodys_ports(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(true)?;
    let (lab, pod) = (&meshed.lab, &meshed.pod);
    let proxy = meshed.proxy(&["--resolve", "192.0.2.53"])?;
    for (peer, own) in meshed.pairs() {
        for port in [15001, 15006, 15053] {
            let to = SocketAddr::new(own, port);
            ensure!(open(&lab.peer, to, BRIEFLY).is_err(), "{to} was reached from outside");
            // As the proxy's own, or nobody's: it refuses both.
            let to = SocketAddr::new(peer, port);
            ensure!(nothing(open(&pod.guest, to, BRIEFLY)), "{to} was reached by the pod");
        }
        let to = echo(&lab.peer, SocketAddr::new(peer, 0))?;
        let marked = pod.guest.inside(|| {
            let family = match peer {
                IpAddr::V4(_) => nix::sys::socket::AddressFamily::Inet,
                IpAddr::V6(_) => nix::sys::socket::AddressFamily::Inet6,
            };
            let flags = nix::sys::socket::SockFlag::empty();
            let own =
                nix::sys::socket::socket(family, nix::sys::socket::SockType::Stream, flags, None)?;
            setsockopt(&own, sockopt::Mark, &0x539)?;
            let to = nix::sys::socket::SockaddrStorage::from(to);
            nix::sys::socket::connect(std::os::fd::AsRawFd::as_raw_fd(&own.as_fd()), &to)?;
            Ok(TcpStream::from(own))
        })?;
        let own = marked.local_addr()?;
        proxy.wait("marked connection", |seen| {
            seen.peer == Some(own) && seen.destination == Some(to)
        })?;
    }
    let counted = meshed.dropped(Side::Peer, Reason::ProxyPort)?;
    ensure!(counted >= 6, "{counted} segments for the proxy's ports were counted");
    // The VM's routes send loopback addresses out, which its kernel would not do by itself.
    pod.guest.sysctl("ipv4/conf/all/route_localnet", "1")?;
    pod.guest.ip(&[
        "route del table local local 127.0.0.0/8 dev lo",
        "route add 127.0.0.0/8 via 10.9.255.1",
    ])?;
    let to = SocketAddr::new(Ipv4Addr::new(127, 0, 0, 1).into(), 15053);
    ensure!(open(&pod.guest, to, BRIEFLY).is_err(), "{to} was reached");
    Ok(())
}

/// The proxy's connections are the pod's: another tenant's pod is not reached by it.
pub fn tenants(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(false)?;
    let mut other = meshed.lab.pod(2)?;
    meshed.lab.plug(&mut other, Join::Policy)?;
    meshed.lab.allow(&[&meshed.pod, &other])?;
    let _proxy = meshed.proxy(&[])?;
    for address in [other.address(), other.address6()] {
        let to = echo(&other.guest, SocketAddr::new(address, 0))?;
        talk(&meshed.lab.peer, to)?;
        ensure!(nothing(open(&meshed.pod.guest, to, BRIEFLY)), "{to} was reached");
    }
    let count = meshed.dropped(Side::Vm, Reason::Tenant)?;
    ensure!(count >= 2, "{count} segments across tenants were counted");
    Ok(())
}

/// Whoever takes the rules away stops everything: nothing is forwarded past the proxy.
pub fn without_rules(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(false)?;
    let (lab, pod) = (&meshed.lab, &meshed.pod);
    let _proxy = meshed.proxy(&[])?;
    let mut ways = Vec::new();
    for (address, own) in meshed.pairs() {
        let there = echo(&lab.peer, SocketAddr::new(address, 0))?;
        ways.push((&pod.guest, there));
        ways.push((&lab.peer, echo(&pod.guest, SocketAddr::new(own, 0))?));
    }
    for (from, to) in &ways {
        talk(from, *to)?;
    }
    let mut held =
        ways.iter().map(|(from, to)| open(from, *to, BRIEFLY)).collect::<Result<Vec<_>>>()?;
    for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        pod.netns.sysctl(key, "1")?;
    }
    for family in ["-4", "-6"] {
        for table in ["27257", "27258"] {
            let end = Instant::now() + Duration::from_secs(2);
            while pod.netns.inside(|| {
                let words = [family, "rule", "del", "table", table];
                Ok(Command::new("ip").args(words).output()?.status.success())
            })? {
                ensure!(Instant::now() < end, "rules do not end");
            }
        }
    }
    for (from, to) in &ways {
        ensure!(nothing(open(from, *to, BRIEFLY)), "{to} was reached");
    }
    for stream in &mut held {
        let _ = stream.set_read_timeout(Some(BRIEFLY));
        // What was on its way may have come; nothing more does.
        let _ = greeted(stream);
    }
    ensure!(meshed.dropped(Side::Vm, Reason::NoFlow)? > 0, "nothing was counted");
    Ok(())
}

/// With `isolation = false` nobody judges, and nobody could give the proxy anything.
pub fn needs_isolation(_: &Context<'_>) -> Result<()> {
    let lab = Lab::new()?;
    let mut pod = lab.pod(1)?;
    pod.mesh = Mesh { mode: Mode::Ambient, dns: false };
    let wire = lab.wire(&mut pod, &lab.config(Join::Wire));
    refused("a meshed pod without isolation", wire, "needs isolation")
}

/// The pod's limit of packets holds for what the proxy sends for it.
pub fn limits(_: &Context<'_>) -> Result<()> {
    const A_SECOND: u64 = 500;
    let meshed = Meshed::new(false)?;
    let _proxy = meshed.proxy(&[])?;
    let limits = NetLimits { egress_packets: A_SECOND, ..NetLimits::default() };
    meshed.pod.limit(&limits)?;
    let before = meshed.lab.counted(&meshed.pod)?.packets[Side::Vm as usize];
    let begun = Instant::now();
    let load = Load::tcp(&meshed.pod.guest, &meshed.lab.peer, PEER.into(), 4)?;
    thread::sleep(Duration::from_secs(2));
    let sent = meshed.lab.counted(&meshed.pod)?.packets[Side::Vm as usize] - before;
    let most = begun.elapsed().as_secs_f64() * A_SECOND as f64 * 1.1 + 50.0;
    ensure!(sent as f64 <= most, "{sent} packets; at most {most} may have been sent");
    ensure!(load.received() > 0, "nothing has arrived");
    ensure!(meshed.dropped(Side::Vm, Reason::Rate)? > 0, "nothing was limited");
    Ok(())
}

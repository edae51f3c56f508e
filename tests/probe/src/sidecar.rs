//! A sidecar as Envoy is one: it asks where a redirected connection was to go and carries on from there. And those
//! whose connections it gets.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::socket::{getsockopt, sockopt};

/// Where a connection was to go, by SO_ORIGINAL_DST.
fn original(stream: &TcpStream) -> Result<SocketAddr> {
    if let Ok(name) = getsockopt(stream, sockopt::OriginalDst) {
        let ip = Ipv4Addr::from_bits(u32::from_be(name.sin_addr.s_addr));
        return Ok((ip, u16::from_be(name.sin_port)).into());
    }
    let name = getsockopt(stream, sockopt::Ip6tOriginalDst).context("SO_ORIGINAL_DST")?;
    let ip = Ipv6Addr::from(name.sin6_addr.s6_addr);
    Ok((ip, u16::from_be(name.sin6_port)).into())
}

/// Without the clothes of IPv6.
fn plain(address: SocketAddr) -> SocketAddr {
    (address.ip().to_canonical(), address.port()).into()
}

fn carry(near: &TcpStream, far: &TcpStream) -> io::Result<()> {
    let one_way = |mut from: &TcpStream, mut to: &TcpStream| {
        let copied = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
        copied
    };
    thread::scope(|scope| {
        scope.spawn(|| one_way(near, far));
        one_way(far, near)
    })?;
    Ok(())
}

/// Carries one connection on; what it was is said.
fn serve(near: &TcpStream, inbound: bool, quiet: bool) -> Result<()> {
    near.set_nodelay(true)?;
    let (peer, own) = (plain(near.peer_addr()?), plain(near.local_addr()?));
    let to = original(near)?;
    if !quiet {
        let way = if inbound { "inbound" } else { "outbound" };
        println!("{way} from {peer} at {own} for {to};");
    }
    let next = match (inbound, to.ip()) {
        (false, _) => to,
        // To the application, not to itself once more.
        (true, IpAddr::V4(_)) => (Ipv4Addr::LOCALHOST, to.port()).into(),
        (true, IpAddr::V6(_)) => (Ipv6Addr::LOCALHOST, to.port()).into(),
    };
    let far = TcpStream::connect_timeout(&next, Duration::from_secs(5))
        .with_context(|| format!("connect to {next}"))?;
    far.set_nodelay(true)?;
    Ok(carry(near, &far)?)
}

/// Listens where a sidecar does, on both families, for ever.
pub fn run(outbound: &str, inbound: &str, quiet: bool) -> Result<()> {
    let listen = |port: &str| -> Result<TcpListener> {
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port.parse()?))
            .with_context(|| format!("listen at {port}"))
    };
    let listeners = [(listen(outbound)?, false), (listen(inbound)?, true)];
    println!("sidecar is up");
    thread::scope(|scope| {
        for (listener, inbound) in listeners {
            let listener = Arc::new(listener);
            scope.spawn(move || {
                for near in listener.incoming().flatten() {
                    thread::spawn(move || {
                        if let Err(error) = serve(&near, inbound, quiet) {
                            println!("lost: {error:#}");
                        }
                    });
                }
            });
        }
    });
    Ok(())
}

/// Connects, and prints who the other end is said to be and what it says until it ends.
pub fn dial(to: &str) -> Result<()> {
    let to: SocketAddr = to.parse()?;
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))
        .map_err(|error| anyhow::anyhow!("connect: {error} ({:?})", error.kind()))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    println!("peer {}", stream.peer_addr()?);
    stream.shutdown(Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    println!("said {said:?}");
    Ok(())
}

/// Answers every connection to a port, at an address, with who it says it is from, for ever.
pub fn answer(at: &str) -> Result<()> {
    let listener = TcpListener::bind(at.parse::<SocketAddr>()?).context("listen")?;
    println!("answers");
    for mut stream in listener.incoming().flatten() {
        let from = plain(stream.peer_addr()?);
        let _ = stream.write_all(format!("pod to {from}").as_bytes());
    }
    Ok(())
}

/// Connects so often, one after another, each until the other end has ended it; prints how many did not and the
/// microseconds that connecting took: the median, and the 99th of a hundred.
pub fn flood(to: &str, count: &str) -> Result<()> {
    let (to, count): (SocketAddr, usize) = (to.parse()?, count.parse()?);
    let mut took = Vec::with_capacity(count);
    let mut failed = 0;
    let begun = Instant::now();
    for _ in 0..count {
        let start = Instant::now();
        match TcpStream::connect(to) {
            Ok(mut stream) => {
                took.push(start.elapsed().as_micros());
                let mut said = Vec::new();
                let _ = stream.shutdown(Shutdown::Write);
                if stream.read_to_end(&mut said).is_err() || said.is_empty() {
                    failed += 1;
                }
            }
            Err(_) => failed += 1,
        }
    }
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    took.sort_unstable();
    let at = |part: usize| took.get(took.len() * part / 100).copied().unwrap_or(0);
    println!("failed {failed} p50 {} p99 {} rate {rate:.0}", at(50), at(99));
    Ok(())
}

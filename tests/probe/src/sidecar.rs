//! A sidecar as Envoy is one: it asks where a redirected connection was to go and carries on from there. And those
//! whose connections it gets.

use std::io::{self, Read as _, Write as _};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket,
};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
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

/// What it does with connections.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Carries them on, and says what they were.
    Tells,
    /// Carries them on.
    Carries,
    /// Answers itself.
    Answers,
}

fn serve(mut near: &TcpStream, inbound: bool, manner: Manner) -> Result<()> {
    near.set_nodelay(true)?;
    let to = original(near)?;
    match manner {
        Manner::Answers => return Ok(near.write_all(format!("proxy for {to}").as_bytes())?),
        Manner::Carries => {}
        Manner::Tells => {
            let (peer, own) = (plain(near.peer_addr()?), plain(near.local_addr()?));
            let way = if inbound { "inbound" } else { "outbound" };
            println!("{way} from {peer} at {own} for {to};");
        }
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
pub fn run(manner: &str, outbound: &str, inbound: &str) -> Result<()> {
    let manner = match manner {
        "tells" => Manner::Tells,
        "carries" => Manner::Carries,
        "answers" => Manner::Answers,
        _ => bail!("{manner:?} is tells, carries or answers"),
    };
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
                    let serve = move || {
                        if let Err(error) = serve(&near, inbound, manner) {
                            println!("lost: {error:#}");
                        }
                    };
                    match manner {
                        Manner::Answers => serve(),
                        Manner::Tells | Manner::Carries => drop(thread::spawn(serve)),
                    }
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
    stream.write_all(b"who")?;
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
        let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
        let _ = stream.read(&mut [0; 16]);
        let _ = stream.write_all(format!("pod to {from}").as_bytes());
    }
    Ok(())
}

/// Connects so often, one after another, each until the other end has ended it. Prints how many failed, how many the
/// node itself has answered, the microseconds that connecting took (median, and 99th of a hundred), the median until
/// the answer, and how many there were in a second.
pub fn connections(to: &str, count: &str) -> Result<()> {
    let (to, count): (SocketAddr, usize) = (to.parse()?, count.parse()?);
    let (mut took, mut answered) = (Vec::with_capacity(count), Vec::with_capacity(count));
    let (mut failed, mut direct) = (0, 0);
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
                answered.push(start.elapsed().as_micros());
                direct += usize::from(said.starts_with(b"node"));
            }
            Err(_) => failed += 1,
        }
    }
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    let at = |times: &mut Vec<u128>, part: usize| {
        times.sort_unstable();
        times.get(times.len() * part / 100).copied().unwrap_or(0)
    };
    let (p50, p99, until) = (at(&mut took, 50), at(&mut took, 99), at(&mut answered, 50));
    println!("failed {failed} direct {direct} p50 {p50} p99 {p99} answered {until} rate {rate:.0}");
    Ok(())
}

/// Sends every datagram back, for ever.
pub fn echo(at: &str) -> Result<()> {
    let socket = UdpSocket::bind(at.parse::<SocketAddr>()?).context("bind")?;
    println!("echoes");
    let mut buffer = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut buffer)?;
        socket.send_to(&buffer[..length], from)?;
    }
}

/// Sends a datagram, over a socket that is connected and over one that is not, and prints from whom the answers are.
pub fn query(to: &str) -> Result<()> {
    let to: SocketAddr = to.parse()?;
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    for connected in [true, false] {
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        if connected {
            socket.connect(to)?;
            println!("peer {}", socket.peer_addr()?);
            socket.send(b"who")?;
        } else {
            socket.send_to(b"who", to)?;
        }
        let mut buffer = [0; 16];
        match socket.recv_from(&mut buffer) {
            Ok((_, from)) => println!("answer from {from}"),
            Err(error) => println!("no answer: {:?}", error.kind()),
        }
    }
    Ok(())
}

/// Sends a datagram to each of the first so many ports of an address, and does not listen.
pub fn spray(to: &str, count: &str) -> Result<()> {
    let (to, count): (IpAddr, u16) = (to.parse()?, count.parse()?);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    for port in 1..=count {
        // Refused or not: all the same.
        let _ = socket.send_to(b"x", (to, port));
    }
    println!("sprayed");
    Ok(())
}

//! Clients and servers of services: who answers, and whom one is told of.

use std::net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

pub(crate) fn run(words: &[&str]) -> Result<()> {
    match words {
        ["answer", port, name] => answer(port, name),
        ["question", to] => question(to, false),
        ["question", to, "connected"] => question(to, true),
        ["connect", to, times] => connect(to, times),
        ["until", to, end] => until(to, end),
        _ => bail!("{words:?}"),
    }
}

/// Answers each datagram with a name.
fn answer(port: &str, name: &str) -> Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port.parse()?)).context("bind")?;
    println!("answers");
    loop {
        let (_, from) = socket.recv_from(&mut [0; 16])?;
        // Who asked may be gone.
        let _ = socket.send_to(name.as_bytes(), from);
    }
}

/// Asks by one socket for each line that comes in; prints its number, what is answered, and by whom.
fn question(to: &str, connected: bool) -> Result<()> {
    let to: SocketAddr = to.parse()?;
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).context("bind")?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    if connected {
        socket.connect(to).context("connect")?;
    }
    for (number, line) in (1..).zip(std::io::stdin().lines()) {
        let line = line?;
        let sent = match connected {
            true => socket.send(line.as_bytes()),
            false => socket.send_to(line.as_bytes(), to),
        };
        let mut buffer = [0; 64];
        let heard = sent.and_then(|_| socket.recv_from(&mut buffer));
        match heard {
            Ok((length, from)) => {
                println!("{number}: {} from {from}", String::from_utf8_lossy(&buffer[..length]));
            }
            Err(error) => println!("{number}: {:?}", error.kind()),
        }
    }
    Ok(())
}

/// Connects so many times; prints who the peer is said to be, and the microseconds that each took.
fn connect(to: &str, times: &str) -> Result<()> {
    let to: SocketAddr = to.parse()?;
    for _ in 0..times.parse::<u32>()? {
        let begun = Instant::now();
        match TcpStream::connect_timeout(&to, Duration::from_secs(2)) {
            Ok(stream) => {
                let took = begun.elapsed();
                println!("{} {}", stream.peer_addr()?, took.as_micros());
            }
            Err(error) => println!("{:?} {}", error.kind(), begun.elapsed().as_micros()),
        }
    }
    Ok(())
}

/// For each line that comes in, connects until that ends as is said: `Connected`, or a kind of error. Prints the
/// line's number then.
fn until(to: &str, end: &str) -> Result<()> {
    let to: SocketAddr = to.parse()?;
    println!("ready");
    for (number, line) in (1..).zip(std::io::stdin().lines()) {
        line?;
        loop {
            let outcome = TcpStream::connect_timeout(&to, Duration::from_secs(2));
            let outcome =
                outcome.map_or_else(|error| format!("{:?}", error.kind()), |_| "Connected".into());
            if outcome == end {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        println!("{number}: {end}");
    }
    Ok(())
}

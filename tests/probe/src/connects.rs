//! Connections to a server that greets with a byte: how long each takes, and how many are made in a second.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

fn one(to: SocketAddr) -> Result<(Duration, Duration)> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
    let connected = begun.elapsed();
    stream.read_exact(&mut [0]).with_context(|| format!("read from {to}"))?;
    Ok((connected, begun.elapsed()))
}

/// Greets all who connect with a byte, for ever.
pub fn greet(at: &str) -> Result<()> {
    let listener = TcpListener::bind(at.parse::<SocketAddr>()?).context("listen")?;
    println!("greets");
    for mut stream in listener.incoming().flatten() {
        let _ = stream.write_all(b"x");
    }
    Ok(())
}

/// Prints of each the microseconds until it is made, and until the byte is there.
pub fn times(to: &str, count: &str) -> Result<()> {
    let to = to.parse()?;
    for _ in 0..count.parse()? {
        let (connected, greeted) = one(to)?;
        println!("{} {}", connected.as_micros(), greeted.as_micros());
    }
    Ok(())
}

/// Prints how many are made in a second by as many threads, each making `count`.
pub fn rate(to: &str, count: &str, threads: &str) -> Result<()> {
    let (to, count, threads): (_, u32, u32) = (to.parse()?, count.parse()?, threads.parse()?);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads)
            .map(|_| scope.spawn(move || (0..count).try_for_each(|_| one(to).map(drop))))
            .collect();
        all.into_iter().try_for_each(|it| it.join().map_err(|_| anyhow!("panicked"))?)
    })?;
    println!("{:.1}", f64::from(count * threads) / begun.elapsed().as_secs_f64());
    Ok(())
}

//! What a container of a test does that busybox cannot: locks, mappings, sockets, datagrams, connections, inotify, reads that are timed.
//!
//! `cargo xtask test` links it statically, so that any image can run it.
#![allow(clippy::print_stdout)]

mod connects;
mod services;
mod sidecar;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, UdpSocket};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory as _};

fn open(path: &str) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).with_context(|| format!("open {path}"))
}

/// Takes a file's lock (`flock`) if nobody has it; holds it until the file `until` is there.
fn lock(path: &str, until: Option<&str>) -> Result<()> {
    let file = open(path)?;
    match file.try_lock() {
        Ok(()) => println!("locked"),
        // EWOULDBLOCK and nothing else.
        Err(TryLockError::WouldBlock) => println!("busy"),
        Err(TryLockError::Error(error)) => return Err(error).context("flock"),
    }
    while until.is_some_and(|until| !Path::new(until).exists()) {
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Reads a file through a shared mapping, then writes to its beginning through it.
fn map(path: &str, text: &str, sync: bool) -> Result<()> {
    let file = open(path)?;
    let length = usize::try_from(file.metadata()?.len())?;
    let copy = file.try_clone()?;
    let region = MmapRegion::<()>::from_file(FileOffset::new(file, 0), length).context("mmap")?;
    let mut before = vec![0; length];
    region.as_volatile_slice().copy_to(&mut before);
    println!("{}", String::from_utf8_lossy(&before));
    region.get_slice(0, text.len())?.copy_from(text.as_bytes());
    if sync {
        // What msync(MS_SYNC) does to the whole of a file.
        copy.sync_all().context("fsync")?;
        // The mapping is never undone: what is on the host by now, fsync has brought there.
        println!("synced");
        std::thread::sleep(Duration::from_secs(1000));
    }
    Ok(())
}

/// Sends datagrams to all targets, all the time, and prints who sends one to this port.
fn exchange(port: &str, targets: &[&str]) -> Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port.parse()?)).context("bind")?;
    socket.set_read_timeout(Some(Duration::from_millis(2)))?;
    let to = |target: &&str| -> Result<SocketAddr> {
        Ok(match target.parse()? {
            SocketAddr::V4(it) => (it.ip().to_ipv6_mapped(), it.port()).into(),
            v6 @ SocketAddr::V6(_) => v6,
        })
    };
    // A socket each: what waits for one's hardware address must not keep the others from being sent to.
    let sender = |target: &&str| -> Result<(UdpSocket, SocketAddr)> {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).context("bind")?;
        socket.set_nonblocking(true)?;
        Ok((socket, to(target)?))
    };
    let senders = targets.iter().map(sender).collect::<Result<Vec<_>>>()?;
    let mut buffer = [0; 16];
    loop {
        for (socket, target) in &senders {
            // Refused, unreachable, no route yet: all the same.
            let _ = socket.send_to(b"datagram", target);
        }
        if let Ok((_, from)) = socket.recv_from(&mut buffer) {
            println!("heard {from}");
        }
    }
}

/// Sends datagrams as fast as it can.
fn flood(to: &str, seconds: u64) -> Result<()> {
    let (end, socket) = (after(seconds), UdpSocket::bind("0.0.0.0:0").context("bind")?);
    while Instant::now() < end {
        for _ in 0..64 {
            // Refused or without room: as lost as on the way.
            let _ = socket.send_to(&[0; 18], to);
        }
    }
    Ok(())
}

/// Has datagrams arrive, and reads none.
fn sink(port: &str, seconds: u64) -> Result<()> {
    let _socket = UdpSocket::bind(("0.0.0.0", port.parse()?)).context("bind")?;
    std::thread::sleep(Duration::from_secs(seconds));
    Ok(())
}

/// Sends back what it gets.
fn echo(port: &str, seconds: u64) -> Result<()> {
    let (end, socket) = (after(seconds), UdpSocket::bind(("0.0.0.0", port.parse()?))?);
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut buffer = [0; 64];
    while Instant::now() < end {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&buffer[..length], from)?;
        }
    }
    Ok(())
}

/// Computes.
fn spin(seconds: u64) {
    let end = after(seconds);
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

fn after(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

/// Answers one question.
fn serve(path: &str) -> Result<()> {
    let listener = UnixListener::bind(path).context("bind")?;
    println!("listens");
    let (mut stream, _) = listener.accept().context("accept")?;
    let mut question = String::new();
    stream.read_to_string(&mut question)?;
    Ok(stream.write_all(format!("you said {question}").as_bytes())?)
}

fn ask(path: &str, question: &str) -> Result<()> {
    let mut stream = UnixStream::connect(path).context("connect")?;
    stream.write_all(question.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    println!("{answer}");
    Ok(())
}

/// Waits until each folder's `..data` has been moved into place and names what is in `..data/key` then.
fn watch(folders: &[String]) -> Result<()> {
    let inotify = Inotify::init(InitFlags::empty())?;
    let mut left = Vec::new();
    for folder in folders {
        let watched = inotify.add_watch(folder.as_str(), AddWatchFlags::IN_MOVED_TO)?;
        left.push((watched, folder));
    }
    println!("watches");
    while !left.is_empty() {
        for event in inotify.read_events()? {
            if event.name.is_none_or(|name| name != "..data") {
                continue;
            }
            if let Some(at) = left.iter().position(|(watched, _)| *watched == event.wd) {
                let (_, folder) = left.swap_remove(at);
                let text = fs::read_to_string(Path::new(folder).join("key"))?;
                println!("{folder}: {text}");
            }
        }
    }
    Ok(())
}

/// Reads a file or block device, from its beginning or in pieces of 4 KiB all over it, and prints the
/// milliseconds that took.
fn read(path: &str, random: bool) -> Result<()> {
    const PIECE: u64 = 4096;
    const PIECES: u64 = 2000;
    let mut file = File::open(path).with_context(|| format!("open {path}"))?;
    let pieces = file.seek(SeekFrom::End(0))? / PIECE;
    file.rewind()?;
    let begun = Instant::now();
    if random {
        // Fibonacci hashing: pieces all over the file, in no order.
        for n in 0..PIECES.min(pieces) {
            let at = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) % pieces * PIECE;
            file.read_exact_at(&mut [0; PIECE as usize], at)?;
        }
    } else {
        let mut buffer = vec![0; 1 << 20];
        while file.read(&mut buffer)? > 0 {}
    }
    println!("{:.3}", begun.elapsed().as_secs_f64() * 1000.0);
    Ok(())
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let texts: Vec<&str> = words.iter().map(String::as_str).collect();
    match texts.as_slice() {
        ["lock", path] => lock(path, None),
        ["lock", path, until] => lock(path, Some(until)),
        ["map", path, text] => map(path, text, false),
        ["map-sync", path, text] => map(path, text, true),
        ["read", path] => read(path, false),
        ["read-random", path] => read(path, true),
        ["serve", path] => serve(path),
        ["ask", path, question] => ask(path, question),
        ["greet", at] => connects::greet(at),
        ["connects", to, count] => connects::times(to, count),
        ["connect-rate", to, count, threads] => connects::rate(to, count, threads),
        ["exchange", port, ..] => exchange(port, &texts[2..]),
        ["flood", to, seconds] => flood(to, seconds.parse()?),
        ["sink", port, seconds] => sink(port, seconds.parse()?),
        ["echo", port, seconds] => echo(port, seconds.parse()?),
        ["spin", seconds] => {
            spin(seconds.parse()?);
            Ok(())
        }
        ["services", ..] => services::run(&texts[1..]),
        ["sidecar", manner, outbound, inbound] => sidecar::run(manner, outbound, inbound),
        ["echo", at] => sidecar::echo(at),
        ["spray", to, count] => sidecar::spray(to, count),
        ["query", to] => sidecar::query(to),
        ["dial", to] => sidecar::dial(to),
        ["answer", at] => sidecar::answer(at),
        ["connections", to, count] => sidecar::connections(to, count),
        ["watch", ..] => watch(words.get(1..).unwrap_or_default()),
        _ => bail!("{words:?}"),
    }
}

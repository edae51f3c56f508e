//! Traffic between two namespaces: streams that carry as much as they can, datagrams at a pace, and round trips.
//!
//! Loads run in threads of their own until they are dropped; who measures waits, and counts what passes meanwhile.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use super::group::Door;
use super::netns::NetNs;

/// What a stream reads and writes at once.
const PIECE: usize = 256 << 10;
/// How long a connection or an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a waiting thread looks whether it is over.
const LOOK: Duration = Duration::from_millis(50);
/// Between two bursts of paced datagrams.
const BEAT: Duration = Duration::from_millis(1);

/// Traffic that goes on until it is dropped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
    /// Where datagrams arrive that nobody reads.
    sink: Option<UdpSocket>,
    streams: Vec<TcpStream>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Load {
    fn new() -> Self {
        Self {
            stop: Arc::default(),
            received: Arc::default(),
            sent: Arc::default(),
            sink: None,
            streams: Vec::new(),
            threads: Vec::new(),
        }
    }

    /// As many streams as `flows`, each as fast as it can.
    pub fn tcp(from: &NetNs, to: &NetNs, address: IpAddr, flows: usize) -> Result<Self> {
        let mut load = Self::new();
        let listener = to.inside(|| Ok(TcpListener::bind((address, 0))?))?;
        let address = listener.local_addr()?;
        // All are there before the first one fills the way.
        let connected = (0..flows).map(|_| {
            let sender = from.inside(|| connect(address))?;
            Ok((sender, listener.accept()?.0))
        });
        let connected: Vec<(TcpStream, TcpStream)> = connected.collect::<Result<_>>()?;
        for (mut sender, mut receiver) in connected {
            load.streams.extend([sender.try_clone()?, receiver.try_clone()?]);
            let received = load.received.clone();
            load.threads.push(thread::spawn(move || {
                let mut piece = vec![0; PIECE];
                loop {
                    match receiver.read(&mut piece) {
                        Ok(0) | Err(_) => return Ok(()),
                        Ok(length) => received.fetch_add(length as u64, Ordering::Relaxed),
                    };
                }
            }));
            load.threads.push(thread::spawn(move || {
                let piece = vec![0; PIECE];
                while sender.write_all(&piece).is_ok() {}
                Ok(())
            }));
        }
        Ok(load)
    }

    /// Datagrams of `size` bytes from as many sockets as `flows`, `rate` a second in all; 0: as many as they can.
    pub fn udp(
        from: &NetNs,
        to: &NetNs,
        address: IpAddr,
        flows: usize,
        size: usize,
        rate: u64,
    ) -> Result<Self> {
        let mut load = Self::new();
        let sink = to.inside(|| Ok(UdpSocket::bind((address, 0))?))?;
        let address = sink.local_addr()?;
        sink.set_read_timeout(Some(LOOK))?;
        let senders: Vec<UdpSocket> =
            (0..flows).map(|_| from.inside(|| sender(address))).collect::<Result<_>>()?;
        let (stop, received) = (load.stop.clone(), load.received.clone());
        load.threads.push(thread::spawn(move || {
            let mut piece = vec![0; 65_536];
            while !stop.load(Ordering::Relaxed) {
                if let Ok(length) = sink.recv(&mut piece) {
                    received.fetch_add(length as u64, Ordering::Relaxed);
                }
            }
            Ok(())
        }));
        let stop = load.stop.clone();
        load.threads.push(thread::spawn(move || {
            let (datagram, begun, mut sent) = (vec![0; size], Instant::now(), 0);
            let mut next = senders.iter().cycle();
            while !stop.load(Ordering::Relaxed) {
                let due = match rate {
                    0 => sent + 64,
                    rate => (begun.elapsed().as_nanos() * u128::from(rate) / 1_000_000_000) as u64,
                };
                while sent < due {
                    // One that cannot be sent is as lost as one on the way.
                    let _ = next.next().map(|socket| socket.send(&datagram));
                    sent += 1;
                }
                if rate != 0 {
                    thread::sleep(BEAT);
                }
            }
            Ok(())
        }));
        Ok(load)
    }

    /// Datagrams of `size` bytes, as many as one thread of the group behind `door` can send. Nobody reads them: the
    /// receiver's kernel drops what its socket does not hold.
    pub fn flood(
        from: &NetNs,
        to: &NetNs,
        address: IpAddr,
        size: usize,
        door: Door,
    ) -> Result<Self> {
        let sink = to.inside(|| Ok(UdpSocket::bind((address, 0))?))?;
        let address = sink.local_addr()?;
        let mut load = Self::paced(from, address, size, 0, door)?;
        load.sink = Some(sink);
        Ok(load)
    }

    /// `rate` datagrams of `size` bytes a second, 0: as many as it can, from one thread of the group behind `door`
    /// that never rests.
    pub fn paced(from: &NetNs, to: SocketAddr, size: usize, rate: u64, door: Door) -> Result<Self> {
        let mut load = Self::new();
        let sender = from.inside(|| sender(to))?;
        let (stop, sent) = (load.stop.clone(), load.sent.clone());
        load.threads.push(thread::spawn(move || {
            door.enter();
            let (datagram, begun) = (vec![0; size], Instant::now());
            while !stop.load(Ordering::Relaxed) {
                let due = begun.elapsed().as_nanos() * u128::from(rate) / 1_000_000_000;
                if rate == 0 || u128::from(sent.load(Ordering::Relaxed)) < due {
                    // One that cannot be sent is as lost as one on the way.
                    let _ = sender.send(&datagram);
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        }));
        Ok(load)
    }

    /// A thread of the group behind `door` that computes, and sends nothing.
    #[must_use]
    pub fn busy(door: Door) -> Self {
        let mut load = Self::new();
        let stop = load.stop.clone();
        load.threads.push(thread::spawn(move || {
            door.enter();
            while !stop.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
            Ok(())
        }));
        load
    }

    /// Datagrams that a flood has sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes that arrived so far, without headers.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for stream in &self.streams {
            let _ = stream.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The first packets may be lost: neighbours are not known yet.
fn connect(address: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect_timeout(&address, PATIENCE).with_context(|| format!("connect to {address}"))
}

fn sender(to: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    Ok(socket)
}

/// How long datagrams take there and back.
#[derive(Debug, Default)]
pub struct RoundTrips {
    /// Of those that came back.
    pub times: Vec<Duration>,
    /// How many did not.
    pub lost: usize,
}

/// Sends a datagram of 64 bytes and waits for its echo, for as long as `window`, `pause` after each. The echo is in
/// the group behind `door`.
pub fn round_trips(
    from: &NetNs,
    to: &NetNs,
    address: IpAddr,
    door: &Door,
    window: Duration,
    pause: Duration,
) -> Result<RoundTrips> {
    let echo = to.inside(|| Ok(UdpSocket::bind((address, 0))?))?;
    echo.set_read_timeout(Some(LOOK))?;
    let address = echo.local_addr()?;
    let own = from.inside(|| sender(address))?;
    own.set_read_timeout(Some(PATIENCE))?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            door.enter();
            let mut datagram = [0; 64];
            while !stop.load(Ordering::Relaxed) {
                if let Ok((length, who)) = echo.recv_from(&mut datagram) {
                    let _ = echo.send_to(&datagram[..length], who);
                }
            }
        });
        let outcome = ping(&own, window, pause);
        stop.store(true, Ordering::Relaxed);
        outcome
    })
}

/// The same by a socket that is connected to somebody who sends back what he gets.
pub fn ping(own: &UdpSocket, window: Duration, pause: Duration) -> Result<RoundTrips> {
    let mut trips = RoundTrips::default();
    let mut answer = [0; 64];
    let end = Instant::now() + window;
    for number in 0_u64.. {
        if Instant::now() > end {
            break;
        }
        let mut datagram = [0; 64];
        datagram[..8].copy_from_slice(&number.to_be_bytes());
        let begun = Instant::now();
        own.send(&datagram)?;
        loop {
            match own.recv(&mut answer) {
                // Not the late echo of an earlier one.
                Ok(_) if answer == datagram => {
                    trips.times.push(begun.elapsed());
                    break;
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    trips.lost += 1;
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        thread::sleep(pause);
    }
    match trips.times.len() {
        0 => Err(anyhow!("no answer from {:?}", own.peer_addr()?)),
        _ => Ok(trips),
    }
}

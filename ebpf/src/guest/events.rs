//! What the mesh's programs tell of connections: `struct event` in `bpf/mesh_observe.h`, from their ring buffer.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use aya::maps::{Map as AnyMap, MapData, RingBuf};

use super::GuestError;
use crate::map::{Map, MapError};

/// Length of `struct event`.
const EVENT: usize = 112;
/// Longest name of a command.
pub const COMMAND: usize = 16;

/// What happened to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It was made; of UDP: a socket has a partner that it had not before.
    Opened = 1,
    /// It could not be made.
    Failed,
    /// Both sides have ended it.
    Closed,
    /// One side has broken it off, or is not heard of any more.
    Reset,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When, in nanoseconds of the monotonic clock.
    pub time: u64,
    /// The socket's number: the same at the connection's beginning and end.
    pub socket: u64,
    /// Payload sent, at the end of a TCP connection.
    pub sent: u64,
    /// Payload received.
    pub received: u64,
    /// The cgroup, one below that of all containers.
    pub cgroup: u64,
    /// The process, by the number that the agent knows.
    pub process: u32,
    /// Its user.
    pub user: u32,
    /// Its command, without the zeros behind it.
    pub command: Vec<u8>,
    /// This end; port 0 where it is not known yet.
    pub local: SocketAddr,
    /// The other.
    pub remote: SocketAddr,
    /// What happened.
    pub what: What,
    /// Whether the other end has opened it.
    pub inbound: bool,
    /// IP's number of the protocol: 6 or 17.
    pub protocol: u8,
}

/// The ring buffer.
pub struct Events {
    ring: RingBuf<MapData>,
    fd: OwnedFd,
    lost: Map<4, 8>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("fd", &self.ring.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Events {
    pub(super) fn new(ring: Map<0, 0>, lost: Map<4, 8>) -> Result<Self, GuestError> {
        let fail = |source| GuestError::Map { name: "events".to_owned(), source };
        let own = || ring.fd().map_err(|error| error.source)?.try_clone_to_owned();
        let (fd, own) = (own().map_err(fail)?, own().map_err(fail)?);
        let ring = MapData::from_fd(own).and_then(|map| RingBuf::try_from(AnyMap::RingBuf(map)));
        let ring = ring.map_err(|error| fail(io::Error::other(error)))?;
        Ok(Self { ring, fd, lost })
    }

    /// A descriptor to wait with: readable when there is an event.
    ///
    /// # Errors
    /// There are too many descriptors.
    pub fn pollable(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// The next event, if there is one.
    pub fn take(&mut self) -> Option<Event> {
        loop {
            let item = self.ring.next()?;
            // The programs write no others.
            if let Some(event) = decode(&item) {
                return Some(event);
            }
        }
    }

    /// Events that were lost, in all.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn lost(&self) -> Result<u64, MapError> {
        Ok(self.lost.get(&[0; 4])?.map_or(0, u64::from_ne_bytes))
    }
}

fn decode(bytes: &[u8]) -> Option<Event> {
    let bytes: &[u8; EVENT] = bytes.try_into().ok()?;
    let long = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap_or_default());
    let endpoint = |at: usize| {
        let ip: [u8; 16] = bytes[at..at + 16].try_into().unwrap_or_default();
        let port = u16::from_ne_bytes(bytes[at + 16..at + 18].try_into().unwrap_or_default());
        SocketAddr::new(IpAddr::from(Ipv6Addr::from(ip)).to_canonical(), port)
    };
    let command = &bytes[48..48 + COMMAND];
    let end = command.iter().position(|byte| *byte == 0).unwrap_or(COMMAND);
    Some(Event {
        time: long(0),
        socket: long(8),
        sent: long(16),
        received: long(24),
        cgroup: long(32),
        process: word(40),
        user: word(44),
        command: command[..end].to_vec(),
        local: endpoint(64),
        remote: endpoint(84),
        what: match bytes[104] {
            1 => What::Opened,
            2 => What::Failed,
            3 => What::Closed,
            4 => What::Reset,
            _ => return None,
        },
        inbound: bytes[105] == 2,
        protocol: bytes[106],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_as_the_programs_write_them() {
        let mut bytes = [0; EVENT];
        bytes[..8].copy_from_slice(&5_u64.to_ne_bytes());
        bytes[40..44].copy_from_slice(&77_u32.to_ne_bytes());
        bytes[48..52].copy_from_slice(b"curl");
        bytes[74..80].copy_from_slice(&[0xff, 0xff, 10, 0, 0, 2]);
        bytes[80..82].copy_from_slice(&4000_u16.to_ne_bytes());
        bytes[84] = 0xfd;
        bytes[104..107].copy_from_slice(&[4, 1, 6]);
        let event = decode(&bytes).unwrap();
        assert_eq!((event.time, event.process, event.command.as_slice()), (5, 77, &b"curl"[..]));
        assert_eq!(event.local, "10.0.0.2:4000".parse().unwrap());
        assert_eq!(event.remote, "[fd00::]:0".parse().unwrap());
        assert_eq!((event.what, event.inbound, event.protocol), (What::Reset, false, 6));
        assert_eq!(decode(&bytes[1..]), None);
        bytes[104] = 9;
        assert_eq!(decode(&bytes), None);
    }
}

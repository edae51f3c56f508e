//! A guest's table of services, in the bytes of its maps: what the host writes down and the agent puts into them.
//!
//! A table is `fronts`, a hash of virtual addresses, and `backends`, an array of endpoints; a front names a range
//! of the array. The host decides what goes where, so that the guest copies and no more. Addresses are 16 bytes, an
//! IPv4 one as `::ffff:a.b.c.d`; numbers, ports too, are little endian, which is how every processor that Joey's
//! guests run on has them. `ebpf/bpf/services_guest.h` is the same layout.

use std::net::{IpAddr, Ipv6Addr};

/// Bytes of a key of `fronts`.
pub const KEY: usize = 20;
/// Bytes of a value of `fronts`.
pub const FRONT: usize = 16;
/// Bytes of an element of `backends`.
pub const BACKEND: usize = 24;
/// Most fronts that a guest's table holds.
pub const MAX_FRONTS: u32 = 65_536;
/// Most endpoints that it holds, those of each front counted.
pub const MAX_BACKENDS: u32 = 131_072;
/// Most bytes of parts in one `UpdateServices` message.
pub const MAX_PARTS: usize = 1024 * 1024;
/// Most elements of one part: so that every part fits a message.
pub const MAX_ELEMENTS: usize = 16_384;

/// A port of a service at one of its virtual addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The virtual address.
    pub address: IpAddr,
    /// The port there.
    pub port: u16,
    /// The transport protocol's number in IP.
    pub protocol: u8,
}

/// Where its endpoints are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Front {
    /// The first of them in `backends`.
    pub first: u32,
    /// How many there are; with none a connection is refused.
    pub count: u32,
    /// How long a client is kept at one endpoint after it was last there, in seconds; 0: not at all.
    pub affinity: u32,
    /// Number of the front, by which its clients' endpoints are remembered.
    pub id: u32,
}

/// An endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn unmapped(bytes: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(bytes).to_canonical()
}

/// `N` bytes of an array that has them.
fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut taken = [0; N];
    taken.copy_from_slice(&bytes[at..at + N]);
    taken
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(take(bytes, at))
}

impl Key {
    /// As the map has it.
    #[must_use]
    pub fn encode(self) -> [u8; KEY] {
        let mut bytes = [0; KEY];
        bytes[..16].copy_from_slice(&mapped(self.address));
        bytes[16..18].copy_from_slice(&self.port.to_le_bytes());
        bytes[18] = self.protocol;
        bytes
    }

    /// The way back.
    #[must_use]
    pub fn decode(bytes: &[u8; KEY]) -> Self {
        let port = u16::from_le_bytes(take(bytes, 16));
        Self { address: unmapped(take(bytes, 0)), port, protocol: bytes[18] }
    }
}

impl Front {
    /// As the map has it.
    #[must_use]
    pub fn encode(self) -> [u8; FRONT] {
        let mut bytes = [0; FRONT];
        let fields = [self.first, self.count, self.affinity, self.id];
        for (to, field) in bytes.chunks_exact_mut(4).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// The way back.
    #[must_use]
    pub fn decode(bytes: &[u8; FRONT]) -> Self {
        let [first, count, affinity, id] = [0, 4, 8, 12].map(|at| number(bytes, at));
        Self { first, count, affinity, id }
    }
}

impl Backend {
    /// As the map has it. Never all zeros, which is an element that was not written yet.
    #[must_use]
    pub fn encode(self) -> [u8; BACKEND] {
        let mut bytes = [0; BACKEND];
        bytes[..16].copy_from_slice(&mapped(self.address));
        bytes[16..18].copy_from_slice(&self.port.to_le_bytes());
        bytes
    }

    /// The way back.
    #[must_use]
    pub fn decode(bytes: &[u8; BACKEND]) -> Self {
        let port = u16::from_le_bytes(take(bytes, 16));
        Self { address: unmapped(take(bytes, 0)), port }
    }
}

/// A step of a change, as bytes of the maps. The order of parts is the order in which they take effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part<'a> {
    /// Endpoints that no front names yet.
    Backends {
        /// Index of the first.
        first: u32,
        /// All of them.
        elements: &'a [u8],
    },
    /// Fronts, new or in place of others with their keys.
    Put {
        /// All keys.
        keys: &'a [u8],
        /// All values.
        fronts: &'a [u8],
    },
    /// Keys of fronts that are no more.
    Remove {
        /// All keys.
        keys: &'a [u8],
    },
}

/// Kind, first element and number of elements lead each part.
const HEAD: usize = 12;
const BACKENDS: u32 = 1;
const PUT: u32 = 2;
const REMOVE: u32 = 3;

/// Bytes that are no parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("services: no whole part at byte {at} of {length}")]
pub struct BadParts {
    /// Where.
    pub at: usize,
    /// How many bytes there are.
    pub length: usize,
}

impl<'a> Part<'a> {
    /// Writes it behind others.
    pub fn encode(&self, to: &mut Vec<u8>) {
        let (kind, first, count) = match *self {
            Self::Backends { first, elements } => (BACKENDS, first, elements.len() / BACKEND),
            Self::Put { keys, .. } => (PUT, 0, keys.len() / KEY),
            Self::Remove { keys } => (REMOVE, 0, keys.len() / KEY),
        };
        // A part has at most MAX_ELEMENTS.
        for number in [kind, first, count as u32] {
            to.extend(number.to_le_bytes());
        }
        match *self {
            Self::Backends { elements, .. } => to.extend_from_slice(elements),
            Self::Put { keys, fronts } => {
                to.extend_from_slice(keys);
                to.extend_from_slice(fronts);
            }
            Self::Remove { keys } => to.extend_from_slice(keys),
        }
    }

    /// The part that bytes begin with, and how many bytes it takes; `None` if it is not whole.
    fn first_of(bytes: &'a [u8]) -> Option<(Self, usize)> {
        let head = bytes.get(..HEAD)?;
        let [kind, first, count] = [0, 4, 8].map(|at| number(head, at));
        let count = usize::try_from(count).ok().filter(|count| *count <= MAX_ELEMENTS)?;
        let body = |from: usize, size: usize| bytes.get(HEAD + from..HEAD + from + count * size);
        match kind {
            BACKENDS => {
                let elements = body(0, BACKEND)?;
                Some((Self::Backends { first, elements }, HEAD + elements.len()))
            }
            PUT => {
                let keys = body(0, KEY)?;
                let fronts = body(keys.len(), FRONT)?;
                Some((Self::Put { keys, fronts }, HEAD + keys.len() + fronts.len()))
            }
            REMOVE => {
                let keys = body(0, KEY)?;
                Some((Self::Remove { keys }, HEAD + keys.len()))
            }
            _ => None,
        }
    }
}

/// The parts that bytes are made of, each with its own bytes.
///
/// After an error there are no more.
pub fn parts(bytes: &[u8]) -> impl Iterator<Item = Result<(Part<'_>, &[u8]), BadParts>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = bytes.get(at..).filter(|rest| !rest.is_empty())?;
        match Part::first_of(rest) {
            Some((part, length)) => {
                at += length;
                Some(Ok((part, &rest[..length])))
            }
            None => {
                let error = BadParts { at, length: bytes.len() };
                at = bytes.len();
                Some(Err(error))
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for address in ["10.96.0.10", "fd00::a"] {
            let address = address.parse().unwrap();
            let key = Key { address, port: 53, protocol: 17 };
            assert_eq!(Key::decode(&key.encode()), key);
            let backend = Backend { address, port: 5353 };
            assert_eq!(Backend::decode(&backend.encode()), backend);
            assert_ne!(backend.encode(), [0; BACKEND]);
        }
        let front = Front { first: 7, count: 3, affinity: 10_800, id: 9 };
        assert_eq!(Front::decode(&front.encode()), front);
        assert_eq!(
            Key { address: [10, 0, 0, 1].into(), port: 80, protocol: 6 }.encode()[10..18],
            [0xff, 0xff, 10, 0, 0, 1, 80, 0]
        );
    }

    #[test]
    fn parts_are_whole_or_refused() {
        let (elements, keys, fronts) = ([1; 2 * BACKEND], [2; 3 * KEY], [3; 3 * FRONT]);
        let all = [
            Part::Backends { first: 5, elements: &elements },
            Part::Put { keys: &keys, fronts: &fronts },
            Part::Remove { keys: &keys[..KEY] },
        ];
        let mut bytes = Vec::new();
        all.iter().for_each(|part| part.encode(&mut bytes));
        let read: Vec<_> = parts(&bytes).map(|part| part.unwrap().0).collect();
        assert_eq!(read, all);
        assert_eq!(parts(&bytes).map(|part| part.unwrap().1.len()).sum::<usize>(), bytes.len());
        let ends: Vec<_> = (0..=bytes.len())
            .filter(|end| parts(&bytes[..*end]).all(|part| part.is_ok()))
            .collect();
        assert_eq!(ends.len(), 4, "only between parts: {ends:?}");
        let mut strange = bytes.clone();
        strange[0] = 9;
        assert_eq!(parts(&strange).count(), 1);
        let mut huge = bytes;
        huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(parts(&huge).next().unwrap().is_err());
    }
}

//! Programs in the guest's kernel: on the cgroup that all containers are below, and on their network namespace.
//!
//! The agent loads and attaches an object once, before the machine is saved as a template: a pod's start writes
//! its maps and nothing else. Each program is named after its hook ([`HOOKS`]) and does nothing while its maps are
//! as they were made. Objects that are attached one after another run in that order.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use aya::maps::{Map as AnyMap, MapData, MapError as AyaError};
use aya::programs::{Program, ProgramError};
use aya::{EbpfError, EbpfLoader};

use crate::map::{Map, Source};
use crate::sys;

pub mod events;
pub mod mesh;
pub mod services;

/// Functions of objects, and where they are attached: numbers of `enum bpf_attach_type`.
const HOOKS: [(&str, u32); 16] = [
    ("sock_ops", 3),
    ("connect4", 10),
    ("connect6", 11),
    ("post_bind4", 12),
    ("post_bind6", 13),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getsockopt", 21),
    ("getpeername4", 29),
    ("getpeername6", 30),
    ("getsockname4", 31),
    ("getsockname6", 32),
    ("sock_release", 34),
    ("sk_lookup", sys::SK_LOOKUP),
];

/// Why an object is not attached.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The object could not be read or its maps made.
    #[error("the object: {0}")]
    Object(#[from] EbpfError),
    /// A map's descriptor or sizes could not be had.
    #[error("the map {name}: {source}")]
    Map {
        /// Which.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The object has no such map, or one with other sizes.
    #[error("the object has no map {name:?} with keys of {key} bytes and values of {value}")]
    NoMap {
        /// Which.
        name: &'static str,
        /// As the caller has it.
        key: usize,
        /// As the caller has it.
        value: usize,
    },
    /// A function has no hook's name.
    #[error("the program {0:?} is named after no hook")]
    NoHook(String),
    /// The kernel did not take a program.
    #[error("the program {name}: {source}")]
    Program {
        /// Which.
        name: &'static str,
        /// What the kernel says, with the verifier's log.
        source: ProgramError,
    },
    /// The kernel did not attach it.
    #[error("attaching the program {name}: {source}")]
    Attach {
        /// Which.
        name: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
}

/// A map that user space reads or writes.
#[derive(Debug)]
struct Open {
    fd: OwnedFd,
    key: usize,
    value: usize,
}

/// What an object leaves: its programs' attachments and its maps. Dropping it takes the programs off.
#[derive(Debug)]
pub(crate) struct Attached {
    _links: Vec<OwnedFd>,
    maps: HashMap<String, Open>,
}

impl Attached {
    /// Loads an object (as `include_bytes_aligned!` has it) and attaches all of its programs: `sk_lookup` to
    /// `netns`, the others to `cgroup`.
    ///
    /// # Errors
    /// The kernel refuses, or the object is none of this crate's kind; then nothing of it stays.
    pub(crate) fn new(
        object: &[u8],
        cgroup: BorrowedFd<'_>,
        netns: BorrowedFd<'_>,
    ) -> Result<Self, GuestError> {
        let mut object = EbpfLoader::new().load(object)?;
        let maps = object.maps().filter_map(|(name, map)| Some((name.to_owned(), data(map)?)));
        let open = |(name, map): (String, &MapData)| match open(map) {
            Ok(map) => Ok((name, map)),
            Err(source) => Err(GuestError::Map { name, source }),
        };
        let maps = maps.map(open).collect::<Result<_, _>>()?;
        let known = |name: &str| HOOKS.iter().any(|(hook, _)| *hook == name);
        if let Some((name, _)) = object.programs().find(|(name, _)| !known(name)) {
            return Err(GuestError::NoHook(name.to_owned()));
        }
        let mut links = Vec::new();
        for (name, hook) in HOOKS {
            let Some(program) = object.program_mut(name) else { continue };
            let fail = |source| GuestError::Program { name, source };
            load(program).map_err(fail)?;
            let program = program.fd().map_err(fail)?.as_fd();
            let target = if hook == sys::SK_LOOKUP { netns } else { cgroup };
            let link = sys::link(program, target, hook);
            links.push(link.map_err(|source| GuestError::Attach { name, source })?);
        }
        Ok(Self { _links: links, maps })
    }

    /// Takes out a map with keys of `K` bytes and values of `V` (of a ring buffer 0 and 0).
    ///
    /// # Errors
    /// There is none such, or it was taken.
    pub(crate) fn map<const K: usize, const V: usize>(
        &mut self,
        name: &'static str,
    ) -> Result<Map<K, V>, GuestError> {
        let map = self.maps.remove(name).filter(|map| (map.key, map.value) == (K, V));
        let map = map.ok_or(GuestError::NoMap { name, key: K, value: V })?;
        Ok(Map::of(name, Source::Open(map.fd)))
    }
}

/// The maps that user space may use; aya has names of its own for every kind.
fn data(map: &AnyMap) -> Option<&MapData> {
    match map {
        AnyMap::Array(data)
        | AnyMap::ArrayOfMaps(data)
        | AnyMap::PerCpuArray(data)
        | AnyMap::HashMap(data)
        | AnyMap::LruHashMap(data)
        | AnyMap::LpmTrie(data)
        | AnyMap::SockMap(data)
        | AnyMap::RingBuf(data) => Some(data),
        _ => None,
    }
}

fn open(map: &MapData) -> io::Result<Open> {
    let info = map.info().map_err(|error: AyaError| io::Error::other(error))?;
    let fd = map.fd().as_fd().try_clone_to_owned()?;
    Ok(Open { fd, key: info.key_size() as usize, value: info.value_size() as usize })
}

fn load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SockOps(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

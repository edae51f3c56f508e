//! The policy's maps as the node reads and writes them: pinned, by the kernel's calls alone, so that a pod's
//! start pays for nothing else.
//!
//! Whoever removes pods, changes `names` or what belongs to an epoch holds the [`Lock`]. Readers need none, and
//! neither do pods that start: they take their number by a write that fails if somebody has it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::abi::Counters;
pub use crate::map::MapError;
use crate::map::{Map, Source};
use crate::sys;

#[cfg(test)]
mod by_hand;
mod epochs;
mod names;
mod pins;
mod pods;
mod seen;

pub use names::KEPT;
pub use pins::{Lock, directory, others};
#[cfg(all(test, feature = "loader"))]
pub(super) use pods::is_link_local;

/// `BPF_NOEXIST`, a flag of map updates.
const NO_EXIST: u64 = 1;
/// Names that maps can have; the kernel's is as long.
const NAME: usize = 256;

/// The maps.
#[derive(Debug)]
pub struct Maps {
    pods: Map<4, 64>,
    addresses: Map<24, 4>,
    active: Map<4, 4>,
    locals: Map<20, 16>,
    identities: Map<28, 32>,
    spaces: Map<8, 4>,
    rules: Map<20, 4>,
    flows: Map<4, 4>,
    denials: Map<44, 32>,
    limits: Map<4, 48>,
    counters: Map<4, { Counters::SIZE }>,
    totals: Map<4, { Counters::SIZE }>,
    names: Map<NAME, 4>,
    cpus: usize,
}

/// Names of the maps that user space reads or writes by key.
pub const NAMES: [&str; 13] = [
    "pods",
    "addresses",
    "active",
    "locals",
    "identities",
    "spaces",
    "rules",
    "flows",
    "denials",
    "limits",
    "counters",
    "totals",
    "names",
];

impl Maps {
    /// The pinned ones.
    ///
    /// # Errors
    /// `NotFound` if they are not loaded on this node yet, or what else the kernel says.
    pub fn open(bpf_dir: &Path) -> io::Result<Self> {
        let directory = directory(bpf_dir);
        Self::with(|name| sys::open_pin(&directory.join(name)))
    }

    /// The pinned ones for who needs but a few of them, once: each is opened when it is used.
    ///
    /// # Errors
    /// As [`Maps::open`].
    pub fn open_few(bpf_dir: &Path) -> io::Result<Self> {
        let directory: Arc<Path> = directory(bpf_dir).into();
        // One that every use needs, and that tells whether there are any.
        let mut pods = Some(sys::open_pin(&directory.join("pods"))?);
        Self::from(|name| match (name, pods.take()) {
            ("pods", Some(fd)) => Ok(Source::Open(fd)),
            _ => Ok(Source::Pinned(Arc::clone(&directory))),
        })
    }

    /// Those that `open` gives by name.
    pub(super) fn with(open: impl Fn(&'static str) -> io::Result<OwnedFd>) -> io::Result<Self> {
        Self::from(|name| open(name).map(Source::Open))
    }

    fn from(mut source: impl FnMut(&'static str) -> io::Result<Source>) -> io::Result<Self> {
        fn map<const K: usize, const V: usize>(
            name: &'static str,
            source: &mut impl FnMut(&'static str) -> io::Result<Source>,
        ) -> io::Result<Map<K, V>> {
            source(name).map(|source| Map::of(name, source))
        }
        let source = &mut source;
        Ok(Self {
            pods: map("pods", source)?,
            addresses: map("addresses", source)?,
            active: map("active", source)?,
            locals: map("locals", source)?,
            identities: map("identities", source)?,
            spaces: map("spaces", source)?,
            rules: map("rules", source)?,
            flows: map("flows", source)?,
            denials: map("denials", source)?,
            limits: map("limits", source)?,
            counters: map("counters", source)?,
            totals: map("totals", source)?,
            names: map("names", source)?,
            cpus: possible_cpus()?,
        })
    }
}

/// How many values an element of a per-CPU map has: one for each CPU that there could be.
fn possible_cpus() -> io::Result<usize> {
    let path = "/sys/devices/system/cpu/possible";
    let text = fs::read_to_string(path)?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|last| last.parse::<usize>().ok());
    last.map(|last| last + 1).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{path}: {:?}", text.trim()))
    })
}

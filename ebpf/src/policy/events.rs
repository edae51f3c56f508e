//! The ring buffer `events`, read from its pin: of the programs' user space, only who tells about flows maps it.
//!
//! What is taken is gone for everybody else, so there must be one reader on a node.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;

use aya::maps::{Map, MapData, RingBuf};

use super::abi::Event;
use super::maps::directory;

/// The events that were not read yet.
pub struct Events(RingBuf<MapData>);

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Events").field(&self.as_fd().as_raw_fd()).finish()
    }
}

impl Events {
    /// Opens the pinned ring.
    ///
    /// # Errors
    /// It is not pinned below `bpf_dir`, or cannot be mapped.
    pub fn open(bpf_dir: &Path) -> io::Result<Self> {
        let data =
            MapData::from_pin(directory(bpf_dir).join("events")).map_err(io::Error::other)?;
        Ok(Self(RingBuf::try_from(Map::RingBuf(data)).map_err(io::Error::other)?))
    }

    /// Takes the next one, if there is one. Inside: `None` if it is nothing that the programs write.
    pub fn take(&mut self) -> Option<Option<Event>> {
        let item = self.0.next()?;
        Some(item.get(..Event::SIZE).and_then(|bytes| Event::decode(bytes.try_into().ok()?)))
    }
}

impl AsFd for Events {
    /// It is readable while there are events.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

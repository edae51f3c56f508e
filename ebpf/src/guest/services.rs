//! Services in the guest: tables in the maps of `bpf/services_guest.h`.
//!
//! A table is two maps, made for it and as large as it needs. The one that counts is named by `active`: another is
//! filled beside it, then it is named, then the old one goes. A change of the table that counts is written where no
//! program reads (endpoints that no front names), and takes effect by single writes of fronts.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use aya::include_bytes_aligned;

use super::{Attached, GuestError};
use crate::map::{Map, MapError, Source};
use crate::sys::{self, Mapping};

static OBJECT: &[u8] = include_bytes_aligned!(env!("JOEY_SERVICES_GUEST_OBJECT"));
/// Bytes of `struct front_key`.
pub const KEY: usize = 20;
/// Bytes of `struct front`.
pub const FRONT: usize = 16;
/// Bytes of `struct backend`.
pub const BACKEND: usize = 24;
/// Most elements of either kind that a table can be made for.
pub const MOST: u32 = 1 << 20;

/// `BPF_MAP_TYPE_HASH` and `BPF_MAP_TYPE_ARRAY`.
const HASH: u32 = 1;
const ARRAY: u32 = 2;
/// `BPF_F_MMAPABLE | BPF_F_INNER_MAP`.
const ARRAY_FLAGS: u32 = 1 << 10 | 1 << 12;
/// The only key of `active`.
const ONLY: [u8; 4] = [0; 4];

/// A table of services.
#[derive(Debug)]
struct Table {
    fronts: Map<KEY, FRONT>,
    backends: OwnedFd,
    elements: Mapping,
}

/// The attached programs. Without a table they do nothing.
#[derive(Debug)]
pub struct Services {
    active: Map<4, 4>,
    fronts: Map<4, 4>,
    backends: Map<4, 4>,
    /// The index of the table that counts.
    index: u32,
    table: Option<Table>,
    /// One that does not count yet.
    next: Option<Table>,
    _attached: Attached,
}

impl Table {
    fn new(fronts: u32, backends: u32) -> io::Result<Self> {
        let hash = sys::map::create(HASH, KEY, FRONT, fronts, 0)?;
        let array = sys::map::create(ARRAY, 4, BACKEND, backends, ARRAY_FLAGS)?;
        let elements = Mapping::new(array.as_fd(), backends as usize * BACKEND)?;
        Ok(Self { fronts: Map::of("fronts", Source::Open(hash)), backends: array, elements })
    }
}

fn failed(name: &'static str, step: &'static str) -> impl FnOnce(io::Error) -> MapError {
    move |source| MapError { name, step, source }
}

impl Services {
    /// Loads and attaches them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn attach(cgroup: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> Result<Self, GuestError> {
        let mut attached = Attached::new(OBJECT, cgroup, netns)?;
        Ok(Self {
            active: attached.map("active")?,
            fronts: attached.map("fronts")?,
            backends: attached.map("backends")?,
            index: 0,
            table: None,
            next: None,
            _attached: attached,
        })
    }

    /// Begins another table, with room for so many fronts and endpoints. What is written then is written there,
    /// until it is put in force.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn begin(&mut self, fronts: u32, backends: u32) -> Result<(), MapError> {
        self.next = None;
        if !(1..=MOST).contains(&fronts) || !(1..=MOST).contains(&backends) {
            return Err(failed("fronts", "make")(io::ErrorKind::InvalidInput.into()));
        }
        self.next = Some(Table::new(fronts, backends).map_err(failed("fronts", "make"))?);
        Ok(())
    }

    /// Whether there is a table to write to.
    #[must_use]
    pub fn has_table(&self) -> bool {
        self.next.is_some() || self.table.is_some()
    }

    fn writable(&mut self) -> io::Result<&mut Table> {
        self.next.as_mut().or(self.table.as_mut()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Writes endpoints, `first` and those after it. No front may name them.
    ///
    /// # Errors
    /// There is no room for them.
    pub fn put_backends(&mut self, first: u32, elements: &[u8]) -> Result<(), MapError> {
        let counts = self.next.is_none();
        let mut write = || {
            let table = self.writable()?;
            let offset = first as usize * BACKEND;
            // Who chose one of those that were here may just be about to read it.
            if counts && !table.elements.is_blank(offset, elements.len())? {
                sys::wait_for_programs()?;
            }
            table.elements.write(offset, elements)
        };
        write().map_err(failed("backends", "write"))
    }

    /// Writes fronts: as many keys as values.
    ///
    /// # Errors
    /// There is no room for them.
    pub fn put_fronts(&mut self, keys: &[u8], fronts: &[u8]) -> Result<(), MapError> {
        let count = keys.len() / KEY;
        let mut write = || {
            if fronts.len() != count * FRONT {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let table = self.writable()?;
            let count = u32::try_from(count).map_err(io::Error::other)?;
            match count {
                0 => Ok(()),
                count => {
                    let map = table.fronts.fd().map_err(|error| error.source)?;
                    sys::map::put_batch(map, keys, fronts, count)
                }
            }
        };
        write().map_err(failed("fronts", "write"))
    }

    /// Removes fronts. Fine if they are not there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove_fronts(&mut self, keys: &[u8]) -> Result<(), MapError> {
        let table = self.writable().map_err(failed("fronts", "remove"))?;
        for key in keys.as_chunks::<KEY>().0 {
            table.fronts.remove(key)?;
        }
        Ok(())
    }

    /// Has the table that was begun count, if one was.
    ///
    /// # Errors
    /// The kernel refuses; the old one still counts.
    pub fn commit(&mut self) -> Result<(), MapError> {
        let Some(next) = &self.next else { return Ok(()) };
        let (old, new) = (self.index, 1 - self.index);
        self.fronts.put(&new.to_ne_bytes(), &next.fronts.fd()?.as_raw_fd().to_ne_bytes())?;
        self.backends.put(&new.to_ne_bytes(), &next.backends.as_raw_fd().to_ne_bytes())?;
        self.active.put(&ONLY, &(new + 1).to_ne_bytes())?;
        self.index = new;
        self.table = self.next.take();
        self.fronts.remove(&old.to_ne_bytes())?;
        self.backends.remove(&old.to_ne_bytes())?;
        Ok(())
    }

    /// Has no table count, as it was in the beginning.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn clear(&mut self) -> Result<(), MapError> {
        self.active.put(&ONLY, &[0; 4])?;
        (self.table, self.next) = (None, None);
        for index in [0_u32, 1] {
            self.fronts.remove(&index.to_ne_bytes())?;
            self.backends.remove(&index.to_ne_bytes())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

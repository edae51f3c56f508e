//! A map with keys and values of fixed lengths, by the kernel's calls.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::sys;

/// A map could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("the map {name}: {step}: {source}")]
pub struct MapError {
    /// Which.
    pub name: &'static str,
    /// What was being done.
    pub step: &'static str,
    /// Why it failed.
    pub source: io::Error,
}

/// A key and its value.
pub(crate) type Entry<const K: usize, const V: usize> = ([u8; K], [u8; V]);

/// Where a map is.
pub(crate) enum Source {
    /// Open already.
    Open(OwnedFd),
    /// Pinned by its name in this directory, to be opened when it is used first.
    Pinned(Arc<Path>),
}

/// A map with keys of `K` bytes and values of `V`.
#[derive(Debug)]
pub(crate) struct Map<const K: usize, const V: usize> {
    name: &'static str,
    pinned: Option<Arc<Path>>,
    fd: OnceLock<OwnedFd>,
}

impl<const K: usize, const V: usize> Map<K, V> {
    pub(crate) fn of(name: &'static str, source: Source) -> Self {
        match source {
            Source::Open(fd) => Self { name, pinned: None, fd: fd.into() },
            Source::Pinned(directory) => {
                Self { name, pinned: Some(directory), fd: OnceLock::new() }
            }
        }
    }

    /// Its descriptor.
    pub(crate) fn fd(&self) -> Result<BorrowedFd<'_>, MapError> {
        if let (None, Some(directory)) = (self.fd.get(), &self.pinned) {
            let opened = sys::open_pin(&directory.join(self.name)).map_err(self.fail("open"))?;
            // Another thread may have been quicker.
            let _ = self.fd.set(opened);
        }
        let fd = self.fd.get().map(OwnedFd::as_fd);
        fd.ok_or_else(|| self.fail("open")(io::ErrorKind::NotFound.into()))
    }

    pub(crate) fn fail(&self, step: &'static str) -> impl FnOnce(io::Error) -> MapError {
        let name = self.name;
        move |source| match source.raw_os_error() {
            // The kernel's words would be of a list of arguments.
            Some(libc::E2BIG) => MapError { name, step, source: io::Error::other("it is full") },
            _ => MapError { name, step, source },
        }
    }

    pub(crate) fn get(&self, key: &[u8; K]) -> Result<Option<[u8; V]>, MapError> {
        let mut value = [0; V];
        let found = sys::map::get(self.fd()?, key, &mut value).map_err(self.fail("read"))?;
        Ok(found.then_some(value))
    }

    pub(crate) fn put(&self, key: &[u8; K], value: &[u8; V]) -> Result<(), MapError> {
        sys::map::put(self.fd()?, key, value, 0).map_err(self.fail("write"))
    }

    pub(crate) fn remove(&self, key: &[u8; K]) -> Result<bool, MapError> {
        sys::map::remove(self.fd()?, key).map_err(self.fail("remove"))
    }

    /// The keys. What changes meanwhile may end the list early or have it hold a key twice.
    pub(crate) fn keys(&self) -> Result<Vec<[u8; K]>, MapError> {
        let mut keys: Vec<[u8; K]> = Vec::new();
        let mut next = [0; K];
        loop {
            let last = keys.last().map(|key| &key[..]);
            let more = sys::map::next(self.fd()?, last, &mut next);
            if !more.map_err(self.fail("list"))? {
                return Ok(keys);
            }
            // The last key is gone, and the kernel begins again.
            if keys.first() == Some(&next) {
                return Ok(keys);
            }
            keys.push(next);
        }
    }

    /// All entries, read many at a time; of what changes meanwhile, some.
    pub(crate) fn entries(&self) -> Result<Vec<Entry<K, V>>, MapError> {
        /// How many at a time.
        const MANY: usize = 256;
        let (mut keys, mut values) = (vec![0; MANY * K], vec![0; MANY * V]);
        let (mut from, mut to): (Option<sys::map::Place>, _) = (None, [0; 256]);
        let mut entries = Vec::new();
        loop {
            let (map, count) = (self.fd()?, MANY as u32);
            let batch = sys::map::batch(map, from.as_ref(), &mut to, &mut keys, &mut values, count);
            let (count, last) = batch.map_err(self.fail("list"))?;
            let pairs = keys.as_chunks().0.iter().zip(values.as_chunks().0);
            entries.extend(pairs.take(count as usize).map(|(key, value)| (*key, *value)));
            if last {
                return Ok(entries);
            }
            from = Some(to);
        }
    }
}

//! A tenant's log: a file that is only ever appended to, until another takes its place by a rename.
//!
//! ```text
//! "joeysvc1" ─ record ─ record ─ …     record: head (32 bytes) ─ parts
//! head: length of the parts (u32) ─ CRC-32 of all that follows it (u32) ─ generation (u64) ─ room for fronts,
//!       for endpoints (u32 each; 0 for a change) ─ 0 (u64); little endian
//! ```
//!
//! A reader takes whole records and waits for the rest of one that is not: whoever writes may just be at it, or
//! was killed there. What comes after such a record is in another file. There is one writer at a time.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::table::Record;

const MAGIC: &[u8; 8] = b"joeysvc1";
const HEAD: usize = 32;
/// Most bytes of parts in a record: a table that has as much as fits a guest is smaller.
const MAX_PARTS: usize = 16 << 20;

/// Name of the log for tenants that have no services of their own.
pub const SHARED: &str = "shared";

/// Where the logs are.
#[must_use]
pub fn directory(run_dir: &Path) -> PathBuf {
    run_dir.join("services")
}

/// Name of a tenant's log.
#[must_use]
pub fn name(tenant: &str) -> String {
    let digest = Sha256::digest(tenant);
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut number = [0; N];
    number.copy_from_slice(&bytes[at..at + N]);
    number
}

fn encode(record: &Record) -> Vec<u8> {
    let mut bytes = vec![0; HEAD];
    bytes[..4].copy_from_slice(&(record.parts.len() as u32).to_le_bytes());
    bytes[8..16].copy_from_slice(&record.generation.to_le_bytes());
    bytes[16..20].copy_from_slice(&record.fronts.to_le_bytes());
    bytes[20..24].copy_from_slice(&record.backends.to_le_bytes());
    bytes.extend_from_slice(&record.parts);
    let sum = crc32fast::hash(&bytes[8..]);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Reads a log from its beginning, as far as it is whole.
#[derive(Debug)]
pub struct Reader {
    file: File,
    at: u64,
}

impl Reader {
    /// Opens a log.
    ///
    /// # Errors
    /// It is not there, or is no log.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut magic = [0; MAGIC.len()];
        match file.read_exact_at(&mut magic, 0) {
            Ok(()) if magic == *MAGIC => Ok(Self { file, at: MAGIC.len() as u64 }),
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is no log of services")),
        }
    }

    /// The next whole record.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn take(&mut self) -> io::Result<Option<Record>> {
        let mut head = [0; HEAD];
        if !self.whole(&mut head, self.at)? {
            return Ok(None);
        }
        let length = u32::from_le_bytes(number(&head, 0)) as usize;
        if length > MAX_PARTS {
            return Ok(None);
        }
        let mut parts = vec![0; length];
        if !self.whole(&mut parts, self.at + HEAD as u64)? {
            return Ok(None);
        }
        let mut sum = crc32fast::Hasher::new();
        sum.update(&head[8..]);
        sum.update(&parts);
        if sum.finalize() != u32::from_le_bytes(number(&head, 4)) {
            return Ok(None);
        }
        self.at += (HEAD + length) as u64;
        let [fronts, backends] = [16, 20].map(|at| u32::from_le_bytes(number(&head, at)));
        let generation = u64::from_le_bytes(number(&head, 8));
        Ok(Some(Record { generation, fronts, backends, parts }))
    }

    fn whole(&self, to: &mut [u8], at: u64) -> io::Result<bool> {
        match self.file.read_exact_at(to, at) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// How many bytes were read.
    pub(super) fn position(&self) -> u64 {
        self.at
    }

    /// Whether nothing comes after what was read.
    ///
    /// # Errors
    /// The file cannot be looked at.
    pub fn is_at_end(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.len() == self.at)
    }

    /// Whether a path leads to this file still.
    ///
    /// # Errors
    /// This file cannot be looked at.
    pub fn is_at(&self, path: &Path) -> io::Result<bool> {
        let own = self.file.metadata()?;
        Ok(fs::metadata(path).is_ok_and(|it| (it.dev(), it.ino()) == (own.dev(), own.ino())))
    }
}

/// Writes a log. Whoever has one is the only writer.
#[derive(Debug)]
pub(super) struct Writer {
    path: PathBuf,
    file: File,
    /// Of the file, as this writer left it.
    length: u64,
    /// Of its base.
    base: u64,
}

impl Writer {
    /// Puts a new log in the place of what is there. `at` is told of the moments at which a kill is of interest.
    pub(super) fn create(path: &Path, base: &Record, at: &dyn Fn(&str)) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        let beside = path.with_extension("new");
        let mut options = File::options();
        // What another left unfinished is overwritten.
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        let bytes = [&MAGIC[..], &encode(base)].concat();
        halves(&mut file, &bytes, || at("services-base"))?;
        at("services-rename");
        fs::rename(&beside, path)?;
        let length = bytes.len() as u64;
        Ok(Self { path: path.to_owned(), file, length, base: length })
    }

    /// Goes on with a log that is whole and has `reader`'s end.
    pub(super) fn resume(path: &Path, reader: &Reader, base: u64) -> io::Result<Self> {
        let file = File::options().append(true).open(path)?;
        Ok(Self { path: path.to_owned(), file, length: reader.at, base })
    }

    /// Appends a change.
    pub(super) fn append(&mut self, record: &Record, at: &dyn Fn(&str)) -> io::Result<()> {
        let bytes = encode(record);
        halves(&mut self.file, &bytes, || at("services-append"))?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Whether the file is as this writer left it, and in its place.
    pub(super) fn is_current(&self) -> bool {
        let Ok(own) = self.file.metadata() else { return false };
        own.len() == self.length
            && fs::metadata(&self.path)
                .is_ok_and(|it| (it.dev(), it.ino()) == (own.dev(), own.ino()))
    }

    /// Whether it is time for a new one: readers that come read all of it.
    pub(super) fn is_long(&self) -> bool {
        self.length > (4 * self.base).max(1 << 20)
    }
}

/// Writes in two steps, between which a test may kill.
fn halves(file: &mut File, bytes: &[u8], between: impl Fn()) -> io::Result<()> {
    if cfg!(debug_assertions) {
        let (first, second) = bytes.split_at(bytes.len() / 2);
        file.write_all(first)?;
        between();
        return file.write_all(second);
    }
    file.write_all(bytes)
}

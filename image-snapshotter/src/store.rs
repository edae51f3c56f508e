//! What is in the store: snapshots in a transactional database, blobs in folders named by digest.
//!
//! | path | what | made |
//! | --- | --- | --- |
//! | `snapshots.redb` | every snapshot, its parent and its layer | a transaction a change |
//! | `layers/HEX/` | a layer ([`joey_image::layer`]) | beside, in `new/`, and by rename |
//! | `disks/HEX/` | an image's disk ([`joey_image::disk`]) | the same |
//! | `new/` | what is being made | emptied when the daemon starts |
//!
//! Invariants: a folder in `layers` or `disks` is whole; a snapshot names only layers that are there;
//! a layer or disk that no snapshot needs is removed with the last one that did. After a crash the
//! database is as of its last transaction, and folders that it does not name are removed.

mod blobs;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Condvar, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use joey_image::disk;
use joey_image::layer::{self, LayerError};
use nix::fcntl::{FallocateFlags, fallocate};
use redb::{Database, DatabaseError, ReadableDatabase as _, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub use self::blobs::New;
use crate::memory::Memory;
use crate::metrics::Metrics;

const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
/// Memory that the database may use for itself.
const DATABASE_CACHE: usize = 4 << 20;

/// What a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Read-only use of a committed one.
    View,
    /// Being filled, or a container's.
    Active,
    /// A finished layer on its parent.
    Committed,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The one below it; empty for none.
    pub parent: String,
    /// What it is.
    pub kind: Kind,
    /// Since 1970.
    pub created: (u64, u32),
    /// Since 1970.
    pub updated: (u64, u32),
    /// containerd's own notes.
    pub labels: BTreeMap<String, String>,
    /// Its layer's digest, once applied.
    pub layer: Option<String>,
}

/// Why the store does not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such snapshot.
    #[error("snapshot {0}: not found")]
    NotFound(String),
    /// There is one already.
    #[error("snapshot {0}: already exists")]
    Exists(String),
    /// Not with this snapshot as it is.
    #[error("snapshot {name}: {problem}")]
    Precondition {
        /// Which.
        name: String,
        /// Why not.
        problem: String,
    },
    /// A layer or disk.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The database.
    #[error("the store's database: {0}")]
    Database(String),
    /// Another process has the store.
    #[error("{0}: another process has this store open")]
    Taken(PathBuf),
}

fn database(error: impl std::fmt::Display) -> StoreError {
    StoreError::Database(error.to_string())
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let error = layer::io_error(what, path);
    move |source| StoreError::Layer(error(source))
}

/// Room that is given up when the disk is full and images are to go: also removing takes some, for the database
/// and for names.
const RESERVE: &str = "reserve";
const RESERVE_BYTES: i64 = 4 << 20;

/// The store; one process at a time has it.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    /// None after a failure of the disk, which the database takes for its end: it is opened again.
    database: RwLock<Option<Database>>,
    /// Held while blobs are published or collected, so that none goes while it is being named.
    blobs: Mutex<()>,
    /// Names of the disks that are being made, and the end of one.
    building: (Mutex<HashSet<String>>, Condvar),
    counter: AtomicU64,
    /// Who may use how much memory.
    pub memory: Memory,
    /// What has been done.
    pub metrics: Metrics,
}

/// Hexadecimal part of a digest, which must be SHA-256's.
fn hex(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap_or(digest)
}

fn now() -> (u64, u32) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_secs(), since.subsec_nanos())
}

/// Does what must not fail for lack of room; if it does, once more with the reserve given up.
fn by_the_reserve<T>(
    root: &Path,
    work: impl Fn() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let failed = |error: &StoreError| {
        matches!(error, StoreError::Database(_) | StoreError::Layer(_))
            && fs::remove_file(root.join(RESERVE)).is_ok()
    };
    match work() {
        Err(error) if failed(&error) => {
            tracing::warn!(%error, "once more, with the reserve of the disk given up");
            work()
        }
        done => done,
    }
}

/// Opens the database, and makes one if there is none.
fn open(root: &Path) -> Result<Database, StoreError> {
    let path = root.join("snapshots.redb");
    let opened = Database::builder().set_cache_size(DATABASE_CACHE).create(&path);
    opened.map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::Taken(root.to_owned()),
        error => StoreError::Database(format!("{}: {error}", path.display())),
    })
}

impl Store {
    /// Opens the store in `root`, or makes one, and removes what a crash has left. The folder is for
    /// this process's user only: what is in images is nobody else's on the host.
    ///
    /// # Errors
    /// The folder cannot be used, or another process has the store, which is then not touched.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        by_the_reserve(root, || Self::open_once(root))
    }

    fn open_once(root: &Path) -> Result<Self, StoreError> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(root).map_err(io_error("create", root))?;
        fs::set_permissions(root, fs::Permissions::from_mode(0o700))
            .map_err(io_error("set the mode of", root))?;
        // Its lock is the store's: nothing else is done before.
        let database = open(root)?;
        let new = root.join("new");
        match fs::remove_dir_all(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("empty", &new)(error));
            }
            _ => {}
        }
        for folder in ["layers", "disks", "new", "unpack"] {
            let path = root.join(folder);
            builder.create(&path).map_err(io_error("create", &path))?;
        }
        disk::sync(root)?;
        let begin = database.begin_write().map_err(self::database)?;
        begin.open_table(SNAPSHOTS).map_err(self::database)?;
        begin.commit().map_err(self::database)?;
        let store = Self {
            root: root.to_owned(),
            database: RwLock::new(Some(database)),
            blobs: Mutex::default(),
            building: Default::default(),
            counter: AtomicU64::default(),
            memory: Memory::default(),
            metrics: Metrics::default(),
        };
        store.collect()?;
        Ok(store)
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Works with the database. After the first failure of a disk, be it only full, it refuses all that
    /// comes, so it is closed then, and opened again for whoever comes next.
    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        loop {
            let guard = self.database.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(database) = &*guard {
                let worked = work(database);
                drop(guard);
                if let Err(StoreError::Database(problem)) = &worked {
                    tracing::error!(problem, "the database has failed and is closed");
                    *self.database.write().unwrap_or_else(PoisonError::into_inner) = None;
                }
                return worked;
            }
            drop(guard);
            let mut guard = self.database.write().unwrap_or_else(PoisonError::into_inner);
            if guard.is_none() {
                *guard = Some(open(&self.root)?);
            }
        }
    }

    /// All snapshots by name.
    ///
    /// # Errors
    /// The database fails.
    pub fn all(&self) -> Result<BTreeMap<String, Snapshot>, StoreError> {
        self.with(|opened| {
            let read = opened.begin_read().map_err(database)?;
            let table = read.open_table(SNAPSHOTS).map_err(database)?;
            let rows = table.iter().map_err(database)?;
            rows.map(|row| {
                let (name, value) = row.map_err(database)?;
                Ok((name.value().to_owned(), decode(value.value())?))
            })
            .collect()
        })
    }

    /// One snapshot.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn get(&self, name: &str) -> Result<Snapshot, StoreError> {
        self.with(|opened| {
            let read = opened.begin_read().map_err(database)?;
            let table = read.open_table(SNAPSHOTS).map_err(database)?;
            row(&table, name)
        })
    }

    /// Digests of the layers of a committed snapshot (none for an empty name), the lowest first.
    fn layers(&self, committed: &str) -> Result<Vec<String>, StoreError> {
        self.with(|opened| {
            let read = opened.begin_read().map_err(database)?;
            let table = read.open_table(SNAPSHOTS).map_err(database)?;
            chain(committed, |name| row(&table, name))
        })
    }

    /// Changes the table within one transaction; nothing is changed if `change` fails.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut Rows<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.with(|opened| {
            let transaction = opened.begin_write().map_err(database)?;
            let changed = {
                let mut rows = Rows(transaction.open_table(SNAPSHOTS).map_err(database)?);
                change(&mut rows)
            };
            match changed {
                Ok(value) => {
                    transaction.commit().map_err(database)?;
                    Ok(value)
                }
                Err(error) => {
                    transaction.abort().map_err(database)?;
                    Err(error)
                }
            }
        })
    }

    /// Begins a snapshot on a committed one, or on nothing.
    ///
    /// # Errors
    /// The name is taken, or the parent is not a committed snapshot.
    pub fn prepare(
        &self,
        name: &str,
        parent: &str,
        kind: Kind,
        labels: BTreeMap<String, String>,
    ) -> Result<(), StoreError> {
        self.change(|rows| {
            if rows.get(name)?.is_some() {
                return Err(StoreError::Exists(name.to_owned()));
            }
            if !parent.is_empty() {
                let found = rows.get(parent)?;
                let found = found.ok_or_else(|| StoreError::NotFound(parent.to_owned()))?;
                if found.kind != Kind::Committed {
                    return Err(precondition(
                        parent,
                        "is not committed, so nothing can be put on it",
                    ));
                }
            }
            let (parent, created, updated) = (parent.to_owned(), now(), now());
            rows.put(name, &Snapshot { parent, kind, created, updated, labels, layer: None })
        })
    }

    /// Makes an active snapshot a committed one under another name. It must have its layer, which may
    /// be one without entries: containerd's unpackers apply every layer before they commit. Whoever
    /// commits without has written into the mount, where nothing is kept.
    ///
    /// # Errors
    /// There is no such active snapshot, it has no layer, or the name is taken.
    pub fn commit(
        &self,
        key: &str,
        name: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<(), StoreError> {
        self.change(|rows| {
            if rows.get(name)?.is_some() {
                return Err(StoreError::Exists(name.to_owned()));
            }
            let found = rows.get(key)?;
            let mut snapshot = found.ok_or_else(|| StoreError::NotFound(key.to_owned()))?;
            if snapshot.kind != Kind::Active {
                return Err(precondition(key, "is not active, so it cannot be committed"));
            }
            if snapshot.layer.is_none() {
                return Err(precondition(
                    key,
                    "has no layer, so there is nothing to commit; what was written into its mount is \
                     not kept",
                ));
            }
            snapshot.kind = Kind::Committed;
            snapshot.updated = now();
            snapshot.labels = labels;
            rows.remove(key)?;
            rows.put(name, &snapshot)
        })
    }

    /// Replaces a snapshot's labels: all, or those named in `only` (`None` as value: removed).
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn label(
        &self,
        name: &str,
        labels: BTreeMap<String, String>,
        only: Option<Vec<String>>,
    ) -> Result<Snapshot, StoreError> {
        self.change(|rows| {
            let found = rows.get(name)?;
            let mut snapshot = found.ok_or_else(|| StoreError::NotFound(name.to_owned()))?;
            match only {
                None => snapshot.labels = labels,
                Some(keys) => {
                    for key in keys {
                        match labels.get(&key) {
                            Some(value) => drop(snapshot.labels.insert(key, value.clone())),
                            None => drop(snapshot.labels.remove(&key)),
                        }
                    }
                }
            }
            snapshot.updated = now();
            rows.put(name, &snapshot)?;
            Ok(snapshot)
        })
    }

    /// Removes a snapshot, and with it what nobody else needs.
    ///
    /// # Errors
    /// There is none, or others are on it.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        by_the_reserve(&self.root, || {
            self.change(|rows| {
                if rows.get(name)?.is_none() {
                    return Err(StoreError::NotFound(name.to_owned()));
                }
                if let Some(child) = rows.child_of(name)? {
                    return Err(precondition(name, &format!("is the parent of {child}")));
                }
                rows.remove(name)
            })
        })
    }

    /// Makes the reserve, unless it is there or there is no room for it.
    fn keep_reserve(&self) {
        let path = self.root.join(RESERVE);
        if path.exists() {
            return;
        }
        let made = fs::File::create(&path)
            .map(|file| fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES));
        if !matches!(made, Ok(Ok(()))) {
            let _ = fs::remove_file(&path);
        }
    }
}

fn precondition(name: &str, problem: &str) -> StoreError {
    StoreError::Precondition { name: name.to_owned(), problem: problem.to_owned() }
}

fn row(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &str,
) -> Result<Snapshot, StoreError> {
    let value = table.get(name).map_err(database)?;
    decode(value.ok_or_else(|| StoreError::NotFound(name.to_owned()))?.value())
}

fn decode(bytes: &[u8]) -> Result<Snapshot, StoreError> {
    serde_json::from_slice(bytes).map_err(database)
}

/// Digests of the layers of a committed snapshot, the lowest first.
fn chain(
    name: &str,
    get: impl Fn(&str) -> Result<Snapshot, StoreError>,
) -> Result<Vec<String>, StoreError> {
    let mut digests = Vec::new();
    let mut at = name.to_owned();
    while !at.is_empty() {
        let snapshot = get(&at)?;
        digests.extend(snapshot.layer);
        at = snapshot.parent;
    }
    digests.reverse();
    Ok(digests)
}

/// Name of the disk of these layers: the same layers make the same disk.
fn disk_name(digests: &[String]) -> String {
    let mut hash = Sha256::new_with_prefix(b"joey disk 2\n");
    for digest in digests {
        hash.update(digest);
        hash.update(b"\n");
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The table within a transaction.
struct Rows<'a>(redb::Table<'a, &'static str, &'static [u8]>);

impl Rows<'_> {
    fn get(&self, name: &str) -> Result<Option<Snapshot>, StoreError> {
        let value = self.0.get(name).map_err(database)?;
        value.map(|value| decode(value.value())).transpose()
    }

    fn put(&mut self, name: &str, snapshot: &Snapshot) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(snapshot).map_err(database)?;
        self.0.insert(name, bytes.as_slice()).map(drop).map_err(database)
    }

    fn remove(&mut self, name: &str) -> Result<(), StoreError> {
        self.0.remove(name).map(drop).map_err(database)
    }

    fn child_of(&self, parent: &str) -> Result<Option<String>, StoreError> {
        for row in self.0.iter().map_err(database)? {
            let (name, value) = row.map_err(database)?;
            if decode(value.value())?.parent == parent {
                return Ok(Some(name.value().to_owned()));
            }
        }
        Ok(None)
    }
}

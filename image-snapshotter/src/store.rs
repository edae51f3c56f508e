//! What is in the store: snapshots in a transactional database, blobs in folders named by digest.
//!
//! | path | what | made |
//! | --- | --- | --- |
//! | `snapshots.redb` | every snapshot, its parent and its layer | a transaction a change |
//! | `layers/HEX/` | a layer ([`crate::layer`]) | beside, in `new/`, and by rename |
//! | `disks/HEX/` | an image's disk ([`crate::disk`]) | the same |
//! | `new/` | what is being made | emptied when the daemon starts |
//!
//! Invariants: a folder in `layers` or `disks` is whole; a snapshot names only layers that are there;
//! a layer or disk that no snapshot needs is removed with the last one that did. After a crash the
//! database is as of its last transaction, and folders that it does not name are removed.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::disk::{self, Layer};
use crate::layer::{self, LayerError};

const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");

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
}

fn database(error: impl std::fmt::Display) -> StoreError {
    StoreError::Database(error.to_string())
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let error = layer::io_error(what, path);
    move |source| StoreError::Layer(error(source))
}

/// The store; one process at a time has it.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    database: Database,
    /// Held while blobs are published or collected, so that none goes while it is being named.
    blobs: Mutex<()>,
    /// Held while a disk is made.
    disks: Mutex<()>,
    counter: AtomicU64,
}

/// A folder that is being filled; removed unless published.
#[derive(Debug)]
pub struct New {
    /// The folder.
    pub path: PathBuf,
}

impl Drop for New {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Hexadecimal part of a digest, which must be SHA-256's.
fn hex(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap_or(digest)
}

fn now() -> (u64, u32) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_secs(), since.subsec_nanos())
}

impl Store {
    /// Opens the store in `root`, or makes one, and removes what a crash has left.
    ///
    /// # Errors
    /// The folder cannot be used, or another process has the store.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let new = root.join("new");
        match fs::remove_dir_all(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("empty", &new)(error));
            }
            _ => {}
        }
        for folder in ["layers", "disks", "new", "unpack"] {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(io_error("create", &path))?;
        }
        let path = root.join("snapshots.redb");
        let database = Database::create(&path)
            .map_err(|error| StoreError::Database(format!("{}: {error}", path.display())))?;
        let begin = database.begin_write().map_err(self::database)?;
        begin.open_table(SNAPSHOTS).map_err(self::database)?;
        begin.commit().map_err(self::database)?;
        let store = Self {
            root: root.to_owned(),
            database,
            blobs: Mutex::default(),
            disks: Mutex::default(),
            counter: AtomicU64::default(),
        };
        store.collect()?;
        Ok(store)
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// All snapshots by name.
    ///
    /// # Errors
    /// The database fails.
    pub fn all(&self) -> Result<BTreeMap<String, Snapshot>, StoreError> {
        let read = self.database.begin_read().map_err(database)?;
        let table = read.open_table(SNAPSHOTS).map_err(database)?;
        let rows = table.iter().map_err(database)?;
        rows.map(|row| {
            let (name, value) = row.map_err(database)?;
            Ok((name.value().to_owned(), decode(value.value())?))
        })
        .collect()
    }

    /// One snapshot.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn get(&self, name: &str) -> Result<Snapshot, StoreError> {
        let read = self.database.begin_read().map_err(database)?;
        let table = read.open_table(SNAPSHOTS).map_err(database)?;
        let value = table.get(name).map_err(database)?;
        decode(value.ok_or_else(|| StoreError::NotFound(name.to_owned()))?.value())
    }

    /// Changes the table within one transaction; nothing is changed if `change` fails.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut Rows<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let transaction = self.database.begin_write().map_err(database)?;
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

    /// Makes an active snapshot a committed one under another name.
    ///
    /// # Errors
    /// There is no such active snapshot, or the name is taken.
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
        self.change(|rows| {
            if rows.get(name)?.is_none() {
                return Err(StoreError::NotFound(name.to_owned()));
            }
            if let Some(child) = rows.child_of(name)? {
                return Err(precondition(name, &format!("is the parent of {child}")));
            }
            rows.remove(name)
        })
    }

    /// Removes layers and disks that no snapshot needs. What an error keeps is kept for the next time.
    ///
    /// # Errors
    /// The database or a folder cannot be read.
    pub fn collect(&self) -> Result<(), StoreError> {
        let _blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.all()?;
        let (mut layers, mut disks) = (HashSet::new(), HashSet::new());
        for (name, snapshot) in &all {
            if let Some(layer) = &snapshot.layer {
                layers.insert(hex(layer).to_owned());
            }
            if snapshot.kind == Kind::Committed {
                disks.insert(disk_name(&chain(&all, name)?));
            } else if snapshot.parent.is_empty() {
                disks.insert(disk_name(&[]));
            }
        }
        for (folder, needed) in [("layers", layers), ("disks", disks)] {
            let folder = self.root.join(folder);
            for entry in fs::read_dir(&folder).map_err(io_error("read", &folder))? {
                let entry = entry.map_err(io_error("read", &folder))?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if !needed.contains(&name) {
                    tracing::info!(path = %entry.path().display(), "removed: no snapshot needs it");
                    // Moved first, so that a half-removed one is never taken for whole.
                    let trash = self.begin()?;
                    let target = trash.path.join("removed");
                    fs::rename(entry.path(), &target).map_err(io_error("remove", &entry.path()))?;
                }
            }
        }
        Ok(())
    }

    /// A new folder to make a blob in.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn begin(&self) -> Result<New, StoreError> {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join("new").join(number.to_string());
        fs::create_dir(&path).map_err(io_error("create", &path))?;
        Ok(New { path })
    }

    /// Publishes `new` as the layer of this digest and gives it to the active snapshot `key`.
    ///
    /// # Errors
    /// There is no such active snapshot, or it has a layer; the layer is then not kept.
    pub fn apply(&self, key: &str, digest: &str, new: &New) -> Result<(), StoreError> {
        let _blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        publish(&new.path, &self.root.join("layers").join(hex(digest)))?;
        self.change(|rows| {
            let found = rows.get(key)?;
            let mut snapshot = found.ok_or_else(|| StoreError::NotFound(key.to_owned()))?;
            if snapshot.kind != Kind::Active {
                return Err(precondition(key, "is not active, so no layer can be applied"));
            }
            if snapshot.layer.as_ref().is_some_and(|layer| layer != digest) {
                return Err(precondition(key, "has a layer already; a snapshot takes one"));
            }
            snapshot.layer = Some(digest.to_owned());
            rows.put(key, &snapshot)
        })
    }

    /// The folder of the disk of a committed snapshot (or of an empty image, for an empty name); it is
    /// made if need be.
    ///
    /// # Errors
    /// A layer's entry cannot be placed, or a file of the store fails.
    pub fn disk(&self, committed: &str) -> Result<PathBuf, StoreError> {
        let digests = match committed {
            "" => Vec::new(),
            name => chain(&self.all()?, name)?,
        };
        let folder = self.root.join("disks").join(disk_name(&digests));
        let _disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        if folder.exists() {
            return Ok(folder);
        }
        let layers: Vec<Layer> = digests
            .into_iter()
            .map(|digest| Layer {
                folder: self.root.join("layers").join(hex(&digest)),
                relative: Path::new("../../layers").join(hex(&digest)),
                digest,
            })
            .collect();
        let new = self.begin()?;
        disk::make(&new.path, &layers)?;
        let _blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        publish(&new.path, &folder)?;
        Ok(folder)
    }

    /// Bytes on disk and number of files of a snapshot's own layer, and of its image's index.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn usage(&self, name: &str) -> Result<(u64, u64), StoreError> {
        let all = self.all()?;
        let snapshot = all.get(name).ok_or_else(|| StoreError::NotFound(name.to_owned()))?;
        let mut folders = Vec::new();
        if let Some(layer) = &snapshot.layer {
            folders.push(self.root.join("layers").join(hex(layer)));
        }
        if snapshot.kind == Kind::Committed {
            folders.push(self.root.join("disks").join(disk_name(&chain(&all, name)?)));
        }
        let bytes = folders.iter().map(|folder| layer::disk_bytes(folder)).sum();
        let files = folders.iter().filter_map(|folder| fs::read_dir(folder).ok());
        Ok((bytes, files.map(|files| files.count() as u64).sum()))
    }
}

fn precondition(name: &str, problem: &str) -> StoreError {
    StoreError::Precondition { name: name.to_owned(), problem: problem.to_owned() }
}

fn decode(bytes: &[u8]) -> Result<Snapshot, StoreError> {
    serde_json::from_slice(bytes).map_err(database)
}

/// Digests of the layers of a committed snapshot, the lowest first.
fn chain(all: &BTreeMap<String, Snapshot>, name: &str) -> Result<Vec<String>, StoreError> {
    let mut digests = Vec::new();
    let mut at = name;
    while !at.is_empty() {
        let snapshot = all.get(at).ok_or_else(|| StoreError::NotFound(at.to_owned()))?;
        digests.extend(snapshot.layer.clone());
        at = &snapshot.parent;
    }
    digests.reverse();
    Ok(digests)
}

/// Name of the disk of these layers: the same layers make the same disk.
fn disk_name(digests: &[String]) -> String {
    let mut hash = Sha256::new_with_prefix(b"joey disk 1\n");
    for digest in digests {
        hash.update(digest);
        hash.update(b"\n");
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Moves a whole folder to its place, where the same may be already; both are then on disk.
fn publish(new: &Path, place: &Path) -> Result<(), StoreError> {
    let sync = |path: &Path| {
        File::open(path).and_then(|folder| folder.sync_all()).map_err(io_error("sync", path))
    };
    sync(new)?;
    if place.exists() {
        return Ok(());
    }
    fs::rename(new, place).map_err(io_error("publish", place))?;
    sync(place.parent().unwrap_or(place))
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn add(store: &Store, name: &str, parent: &str, digest: &str, content: &[u8]) {
        let key = format!("extract-{name}");
        store.prepare(&key, parent, Kind::Active, BTreeMap::new()).unwrap();
        let new = store.begin().unwrap();
        layer::write(&new.path, content, 1 << 20).unwrap();
        store.apply(&key, digest, &new).unwrap();
        store.commit(&key, name, BTreeMap::new()).unwrap();
    }

    fn folders(root: &Path, kind: &str) -> usize {
        fs::read_dir(root.join(kind)).unwrap().count()
    }

    #[test]
    fn layers_are_shared_and_go_with_their_last_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        add(&store, "a", "", "sha256:1", &[]);
        add(&store, "b", "a", "sha256:2", &[]);
        add(&store, "c", "", "sha256:2", &[]);
        assert_eq!(folders(dir.path(), "layers"), 2);
        let disk = store.disk("b").unwrap();
        assert_eq!(store.disk("b").unwrap(), disk);
        store.prepare("container", "b", Kind::Active, BTreeMap::new()).unwrap();
        for (name, why) in [("a", "parent of b"), ("b", "parent of container")] {
            assert!(store.remove(name).unwrap_err().to_string().contains(why));
        }
        store.remove("container").unwrap();
        store.remove("b").unwrap();
        store.collect().unwrap();
        assert!(!disk.exists());
        assert_eq!(folders(dir.path(), "layers"), 2);
        store.remove("c").unwrap();
        store.remove("a").unwrap();
        store.collect().unwrap();
        assert_eq!((folders(dir.path(), "layers"), folders(dir.path(), "new")), (0, 0));
    }

    #[test]
    fn a_crash_leaves_whole_snapshots_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        {
            let store = Store::open(dir.path()).unwrap();
            add(&store, "a", "", "sha256:1", &[]);
            store.disk("a").unwrap();
            // Half a layer, and a whole one that no transaction has named.
            std::mem::forget(store.begin().unwrap());
            fs::create_dir(dir.path().join("layers/2")).unwrap();
            assert!(Store::open(dir.path()).is_err(), "two processes had the store");
        }
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.get("a").unwrap().layer.as_deref(), Some("sha256:1"));
        assert_eq!((folders(dir.path(), "layers"), folders(dir.path(), "new")), (1, 0));
        assert_eq!(folders(dir.path(), "disks"), 1);
    }

    #[test]
    fn what_contradicts_the_store_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        add(&store, "a", "", "sha256:1", &[]);
        let none = BTreeMap::new;
        assert!(matches!(store.get("x"), Err(StoreError::NotFound(_))));
        let exists = store.prepare("a", "", Kind::Active, none());
        assert!(matches!(exists, Err(StoreError::Exists(_))));
        assert!(matches!(
            store.prepare("b", "x", Kind::View, none()),
            Err(StoreError::NotFound(_))
        ));
        store.prepare("b", "a", Kind::View, none()).unwrap();
        for refused in [
            store.commit("b", "c", none()),
            store.prepare("c", "b", Kind::Active, none()),
            store.apply("b", "sha256:1", &store.begin().unwrap()),
        ] {
            assert!(matches!(refused, Err(StoreError::Precondition { .. })), "{refused:?}");
        }
        let one = |key: &str| [(key.to_owned(), "1".to_owned())].into();
        store.label("b", one("x"), None).unwrap();
        store.label("b", one("y"), Some(vec!["y".to_owned(), "x".to_owned()])).unwrap();
        assert_eq!(store.get("b").unwrap().labels, one("y"));
    }
}

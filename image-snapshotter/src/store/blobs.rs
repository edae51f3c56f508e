//! The store's folders: layers and disks, made beside and published by rename.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use joey_image::disk::{self, Layer};
use joey_image::layer::{self, BLOCK, LayerError};
use joey_image::tree::{Limits, is_memory};

use super::{HashSet, Kind, Store, StoreError, chain, disk_name, hex, io_error, precondition};
use crate::memory::{self, LARGE, SMALL};

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

/// The right to make one disk, whose name nobody else then has.
struct Building<'a> {
    store: &'a Store,
    name: &'a str,
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        let (names, ended) = &self.store.building;
        names.lock().unwrap_or_else(PoisonError::into_inner).remove(self.name);
        ended.notify_all();
    }
}

impl Store {
    /// Removes layers and disks that no snapshot needs. What an error keeps is kept for the next time.
    ///
    /// # Errors
    /// The database or a folder cannot be read.
    pub fn collect(&self) -> Result<(), StoreError> {
        // Dropped, and so removed, when others may go on already.
        let removed = super::by_the_reserve(&self.root, || self.discard_unneeded());
        drop(removed?);
        self.keep_reserve();
        Ok(())
    }

    /// Takes blobs that no snapshot needs out of their places.
    fn discard_unneeded(&self) -> Result<Vec<New>, StoreError> {
        let mut removed = Vec::new();
        let _blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.all()?;
        let get = |name: &str| {
            all.get(name).cloned().ok_or_else(|| StoreError::NotFound(name.to_owned()))
        };
        let (mut layers, mut disks) = (HashSet::new(), HashSet::new());
        for (name, snapshot) in &all {
            if let Some(layer) = &snapshot.layer {
                layers.insert(hex(layer).to_owned());
            }
            if snapshot.kind == Kind::Committed {
                disks.insert(disk_name(&chain(name, get)?));
            } else if snapshot.parent.is_empty() {
                disks.insert(disk_name(&[]));
            }
        }
        for (folder, needed) in [("layers", layers), ("disks", disks)] {
            let folder = self.root.join(folder);
            for entry in fs::read_dir(&folder).map_err(io_error("read", &folder))? {
                let entry = entry.map_err(io_error("read", &folder))?;
                if !needed.contains(&*entry.file_name().to_string_lossy()) {
                    tracing::info!(path = %entry.path().display(), "removed: no snapshot needs it");
                    removed.push(self.discard(&entry.path())?);
                    self.metrics.collected.add(1);
                }
            }
        }
        Ok(removed)
    }

    /// Moves a blob to where what is left is removed, so that a half-removed one is never taken for
    /// whole.
    fn discard(&self, path: &Path) -> Result<New, StoreError> {
        let trash = self.begin()?;
        fs::rename(path, trash.path.join("removed")).map_err(io_error("remove", path))?;
        Ok(trash)
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
        disk::sync(&new.path)?;
        let place = self.root.join("layers").join(hex(digest));
        let _blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = !place.exists();
        let applied = self.change(|rows| {
            let found = rows.get(key)?;
            let mut snapshot = found.ok_or_else(|| StoreError::NotFound(key.to_owned()))?;
            if snapshot.kind != Kind::Active {
                return Err(precondition(key, "is not active, so no layer can be applied"));
            }
            if snapshot.layer.as_ref().is_some_and(|layer| layer != digest) {
                return Err(precondition(key, "has a layer already; a snapshot takes one"));
            }
            publish(&new.path, &place)?;
            snapshot.layer = Some(digest.to_owned());
            rows.put(key, &snapshot)
        });
        // Published, but not given to the snapshot. If it was the disk that failed, none can tell what has
        // come to be on it: then the next collection sees.
        let known = !matches!(applied, Err(StoreError::Database(_)));
        if applied.is_err() && known && fresh && place.exists() {
            let _ = self.discard(&place);
        }
        applied
    }

    /// The folder of the disk of a committed snapshot (or of an empty image, for an empty name); it is
    /// made if need be. Whoever wants the same waits for it, others do not.
    ///
    /// It stays as long as the committed snapshot; the empty image's as long as there is a snapshot
    /// without parent, which the caller must have made before.
    ///
    /// # Errors
    /// A layer's entry cannot be placed, or a file of the store fails.
    pub fn disk(&self, committed: &str) -> Result<PathBuf, StoreError> {
        let digests = self.layers(committed)?;
        let name = disk_name(&digests);
        let folder = self.root.join("disks").join(&name);
        if self.has(&folder) {
            return Ok(folder);
        }
        let _building = self.building(&name);
        if self.has(&folder) {
            return Ok(folder);
        }
        let new = self.make(digests).inspect_err(|_| self.metrics.disks_refused.add(1))?;
        let _blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        publish(&new.path, &folder)?;
        Ok(folder)
    }

    /// Whether there is such a blob, not to be removed by a collection that is under way: what that
    /// read of the snapshots may be older than the caller's.
    fn has(&self, folder: &Path) -> bool {
        let _blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        folder.exists()
    }

    /// Waits until nobody makes the disk of this name.
    fn building<'a>(&'a self, name: &'a str) -> Building<'a> {
        let (names, ended) = &self.building;
        let lock = names.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = ended.wait_while(lock, |names| names.contains(name));
        waited.unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        Building { store: self, name }
    }

    /// Makes a disk of these layers: with little memory, or if that is not enough, alone with much.
    fn make(&self, digests: Vec<String>) -> Result<New, StoreError> {
        let begin = Instant::now();
        let layers: Vec<Layer> = digests
            .into_iter()
            .map(|digest| Layer {
                folder: self.root.join("layers").join(hex(&digest)),
                relative: Path::new("../../layers").join(hex(&digest)),
                digest,
            })
            .collect();
        let make = |memory| -> Result<New, LayerError> {
            let new = self.begin().map_err(layer_error)?;
            disk::make(&new.path, &layers, Limits::of(memory))?;
            Ok(new)
        };
        let share = self.memory.disks.take();
        let mut made = make(SMALL);
        drop(share);
        if made.as_ref().is_err_and(is_memory) {
            let _share = self.memory.large.take();
            made = make(LARGE);
            memory::trim();
        }
        let new = made?;
        self.metrics.disks.add(1);
        self.metrics.disk_time.add_since(begin);
        Ok(new)
    }

    /// Bytes on disk and number of files that a snapshot itself costs: of its layer, and if it is an
    /// image's uppermost, of the image's index. That index is made for the first container, and
    /// containerd asks but once, so an estimate stands for one that is not there yet: of what the
    /// tables say once more, a quarter more, and of the hash tree. While an image is being unpacked,
    /// what is to be in its middle counts as uppermost.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn usage(&self, name: &str) -> Result<(u64, u64), StoreError> {
        let snapshot = self.get(name)?;
        let (mut bytes, mut files) = (0, 0);
        if let Some(layer) = &snapshot.layer {
            let folder = self.root.join("layers").join(hex(layer));
            (bytes, files) = (layer::disk_bytes(&folder), count(&folder));
        }
        if snapshot.kind == Kind::Committed {
            let digests = self.layers(name)?;
            let folder = self.root.join("disks").join(disk_name(&digests));
            if folder.exists() {
                (bytes, files) = (bytes + layer::disk_bytes(&folder), files + count(&folder));
            } else if !self.has_committed_child(name)? {
                (bytes, files) = (bytes + self.estimate(&digests), files + DISK_FILES);
            }
        }
        Ok((bytes, files))
    }

    /// About the bytes of the index of these layers' disk.
    fn estimate(&self, digests: &[String]) -> u64 {
        let layers = self.root.join("layers");
        let size = |digest: &String, name: &str| {
            fs::metadata(layers.join(hex(digest)).join(name)).map_or(0, |meta| meta.len())
        };
        let tables: u64 = digests.iter().map(|digest| size(digest, "table")).sum();
        let hashes: u64 = digests.iter().map(|digest| size(digest, "hashes")).sum();
        let bytes = tables + tables / 4 + hashes + hashes / 128;
        bytes.next_multiple_of(BLOCK as u64) + 3 * BLOCK as u64
    }

    fn has_committed_child(&self, name: &str) -> Result<bool, StoreError> {
        let committed = |other: &super::Snapshot| other.kind == Kind::Committed;
        Ok(self.all()?.values().any(|other| other.parent == name && committed(other)))
    }
}

/// Entries of a disk's folder.
const DISK_FILES: u64 = 3;

fn count(folder: &Path) -> u64 {
    fs::read_dir(folder).map_or(0, |files| files.count() as u64)
}

/// An error of the store as one of a layer; it is of a file.
fn layer_error(error: StoreError) -> LayerError {
    match error {
        StoreError::Layer(error) => error,
        other => layer::io_error("make", Path::new("new"))(io::Error::other(other.to_string())),
    }
}

/// Moves a whole folder, which is synced, to its place, where the same may be already; both are then
/// on disk.
fn publish(new: &Path, place: &Path) -> Result<(), StoreError> {
    if !place.exists() {
        fs::rename(new, place).map_err(io_error("publish", place))?;
    }
    Ok(disk::sync(place.parent().unwrap_or(place))?)
}

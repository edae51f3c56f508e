//! The folder of cached images: what is there, and what goes when it is full.
//!
//! | name | |
//! | --- | --- |
//! | `KEY.disk/` | an image; its `disk.json` is locked by whoever uses it, its time is that of the last use |
//! | `KEY.lock` | held by who makes it |
//! | `KEY.new/` | being made, or left by a converter that was killed |
//! | `KEY.gone/` | being removed, or left in the same way |

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

use super::{RootfsError, io_error};
use crate::config::Config;

/// A cached image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cached {
    /// Its key.
    pub key: String,
    /// Bytes it takes on disk.
    pub bytes: u64,
    /// When a container last used it.
    pub used: SystemTime,
    #[serde(skip)]
    path: PathBuf,
}

/// Where images are cached.
#[must_use]
pub fn folder(config: &Config) -> PathBuf {
    config.state_dir.join("images")
}

/// All cached images, the one that was not used for longest first.
///
/// # Errors
/// The folder cannot be read.
pub fn all(config: &Config) -> Result<Vec<Cached>, RootfsError> {
    let folder = folder(config);
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io_error("list", &folder))?,
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        let key = path.file_stem().and_then(|stem| stem.to_str()).map(ToOwned::to_owned);
        let is_image = path.extension().is_some_and(|extension| extension == "disk");
        // What vanishes meanwhile was evicted by somebody else.
        if let (Some(key), Ok(meta), true) = (key, description(&path).metadata(), is_image) {
            let used = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            found.push(Cached { key, bytes: bytes(&path), used, path });
        }
    }
    found.sort_by_key(|cached| cached.used);
    Ok(found)
}

/// What says what the image in this folder consists of.
pub(super) fn description(image: &Path) -> PathBuf {
    image.join("disk.json")
}

/// Bytes on disk of everything in a folder.
fn bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes(&entry.path()),
        meta => meta.map_or(0, |meta| meta.blocks() * 512),
    };
    entries.map(size).sum()
}

/// Holds the lock at `path`, a file that whoever is done with it removes: what was waited for may be the lock
/// of nothing by then.
pub(super) fn lock(path: &Path, how: FlockArg) -> io::Result<Flock<File>> {
    loop {
        let held = Flock::lock(File::create(path)?, how).map_err(|(_, errno)| errno)?;
        let same = std::fs::metadata(path).is_ok_and(|there| {
            held.metadata().is_ok_and(|held| (held.dev(), held.ino()) == (there.dev(), there.ino()))
        });
        if same {
            return Ok(held);
        }
    }
}

/// Removes what converters and evictors left that were killed.
pub(super) fn sweep(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is = |kind| path.extension().is_some_and(|extension| extension == kind);
        let lock_path = path.with_extension("lock");
        if is("gone") {
            let _ = std::fs::remove_dir_all(&path);
        } else if is("new")
            && let Ok(_held) = lock(&lock_path, FlockArg::LockExclusiveNonblock)
        {
            let _ = std::fs::remove_dir_all(&path);
            let _ = std::fs::remove_file(lock_path);
        }
    }
}

/// Removes images, those that were not used for longest first, until no more than `bound` bytes are
/// left; images in use stay. Gives the keys of the removed ones. What was never finished goes in any case.
///
/// # Errors
/// The folder cannot be read.
pub fn shrink(config: &Config, bound: u64) -> Result<Vec<String>, RootfsError> {
    sweep(&folder(config));
    let images = all(config)?;
    let mut total: u64 = images.iter().map(|image| image.bytes).sum();
    let mut removed = Vec::new();
    for image in images {
        if total <= bound {
            break;
        }
        if evict(&image.path) {
            total -= image.bytes;
            removed.push(image.key);
        }
    }
    Ok(removed)
}

/// Removes one image unless somebody uses it.
fn evict(path: &Path) -> bool {
    let Ok(file) = File::open(description(path)) else { return false };
    let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return false };
    let gone = path.with_extension("gone");
    let _ = std::fs::remove_dir_all(&gone);
    // At once: it may be made again while this one is being removed.
    let removed = std::fs::rename(path, &gone).is_ok();
    let _ = std::fs::remove_dir_all(&gone);
    removed
}

/// Prints the cached images.
///
/// # Errors
/// The folder cannot be read.
#[allow(clippy::print_stdout)]
pub fn list(config: &Config, json: bool) -> Result<(), RootfsError> {
    let images = all(config)?;
    if json {
        println!("{}", serde_json::json!({ "images": images }));
        return Ok(());
    }
    println!("{:<44} {:>10}  LAST USED", "KEY", "MIB");
    for image in images {
        let ago = image.used.elapsed().unwrap_or_default().as_secs() / 60;
        println!("{:<44} {:>10}  {ago} min ago", image.key, image.bytes >> 20);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_goes_and_what_is_in_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { state_dir: dir.path().to_owned(), ..Config::default() };
        std::fs::create_dir(folder(&config)).unwrap();
        for (age, key) in [(30, "a"), (20, "b"), (10, "c")] {
            let path = folder(&config).join(format!("{key}.disk"));
            std::fs::create_dir(&path).unwrap();
            std::fs::write(description(&path), vec![1; 8192]).unwrap();
            let used = SystemTime::now() - std::time::Duration::from_secs(age);
            File::open(description(&path)).unwrap().set_modified(used).unwrap();
        }
        let in_use = File::open(description(&folder(&config).join("a.disk"))).unwrap();
        let _in_use = Flock::lock(in_use, FlockArg::LockShared).unwrap();
        assert_eq!(shrink(&config, 16384).unwrap(), ["b"]);
        assert_eq!(shrink(&config, 16384).unwrap(), [""; 0]);
        assert_eq!(shrink(&config, 0).unwrap(), ["c"]);
        let left: Vec<String> = all(&config).unwrap().into_iter().map(|image| image.key).collect();
        assert_eq!(left, ["a"]);
    }

    #[test]
    fn what_killed_converters_left_is_swept_but_not_what_is_under_way() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { state_dir: dir.path().to_owned(), ..Config::default() };
        let folder = folder(&config);
        std::fs::create_dir(&folder).unwrap();
        for half in ["dead.new", "dead.gone", "busy.new"] {
            std::fs::create_dir(folder.join(half)).unwrap();
            std::fs::write(folder.join(half).join("index"), "half").unwrap();
        }
        let held = lock(&folder.join("busy.lock"), FlockArg::LockExclusive).unwrap();
        shrink(&config, u64::MAX).unwrap();
        let mut left: Vec<_> =
            std::fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.file_name()).collect();
        left.sort();
        assert_eq!(left, ["busy.lock", "busy.new"]);
        drop(held);
    }

    #[test]
    fn a_lock_that_was_removed_is_taken_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k.lock");
        let first = lock(&path, FlockArg::LockExclusive).unwrap();
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || lock(&path, FlockArg::LockExclusive).unwrap()
        });
        std::thread::sleep(std::time::Duration::from_millis(50));
        std::fs::remove_file(&path).unwrap();
        drop(first);
        let _second = waiting.join().unwrap();
        assert!(lock(&path, FlockArg::LockExclusiveNonblock).is_err());
    }
}

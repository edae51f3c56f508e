//! `joey image convert`: directories of a snapshot to a disk, in a process of its own.
//!
//! One converter per disk, by a lock; the others wait and find it made. Each directory becomes a layer, as a tar
//! stream does in joey-snapshotter, and the disk is made of them in the same way. It is written beside, synced,
//! and appears by rename.

use std::fs;
use std::path::{Path, PathBuf};

use joey_image::directory::Directory;
use joey_image::disk::{self, Layer};
use joey_image::layer::{self, LayerError};
use joey_image::tree::Limits;
use nix::fcntl::FlockArg;

use super::{RootfsError, cache, io_error};
use crate::config::Config;
use crate::failpoint;

/// Memory for what is known of an image's files besides their content: some million files.
const MEMORY: usize = 512 << 20;

/// Makes the disk `output` of `lowers` (the top one first), unless it is there; then keeps the cache within
/// `bound_mib` MiB and a fifth of its file system.
///
/// # Errors
/// [`RootfsError`]; nothing is left behind.
pub fn run(
    config: &Config,
    output: &Path,
    bound_mib: u64,
    lowers: &[PathBuf],
) -> Result<(), RootfsError> {
    let folder = cache::folder(config);
    fs::create_dir_all(&folder).map_err(io_error("make folder", &folder))?;
    let lock = output.with_extension("lock");
    let held = cache::lock(&lock, FlockArg::LockExclusive).map_err(io_error("lock", &lock))?;
    if !output.exists() {
        publish(config, output, lowers)?;
    }
    let _ = fs::remove_file(lock);
    drop(held);
    let fifth = nix::sys::statvfs::statvfs(&folder)
        .map_or(u64::MAX, |stat| stat.blocks() * stat.fragment_size() / 5);
    cache::shrink(config, (bound_mib << 20).min(fifth))?;
    Ok(())
}

fn publish(config: &Config, output: &Path, lowers: &[PathBuf]) -> Result<(), RootfsError> {
    let beside = output.with_extension("new");
    // Left by a converter that was killed.
    let _ = fs::remove_dir_all(&beside);
    let made = make(&beside, lowers)
        .map_err(|error| RootfsError::Convert { layers: lowers.len(), reason: error.to_string() })
        .inspect(|()| failpoint::hold(&config.run_dir, "image.made"))
        .and_then(|()| fs::rename(&beside, output).map_err(io_error("publish", output)));
    if made.is_err() {
        let _ = fs::remove_dir_all(&beside);
    }
    made
}

fn make(folder: &Path, lowers: &[PathBuf]) -> Result<(), LayerError> {
    let create = |path: &Path| fs::create_dir(path).map_err(layer::io_error("make folder", path));
    create(folder)?;
    let mut layers = Vec::with_capacity(lowers.len());
    for (number, lower) in lowers.iter().rev().enumerate() {
        let relative = PathBuf::from(number.to_string());
        let made = folder.join(&relative);
        create(&made)?;
        let digest = lower.display().to_string();
        layer::write(&made, Directory::open(lower)?, u64::MAX).map_err(|source| {
            LayerError::Layer { layer: digest.clone(), source: Box::new(source) }
        })?;
        layers.push(Layer { digest, folder: made, relative });
    }
    disk::make(folder, &layers, Limits::of(MEMORY))?;
    // What a disk needs of them is in its index.
    for path in layers.iter().flat_map(|layer| ["table", "hashes"].map(|n| layer.folder.join(n))) {
        fs::remove_file(&path).map_err(layer::io_error("remove", &path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_becomes_a_disk_and_what_cannot_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { state_dir: dir.path().to_owned(), ..Config::default() };
        let lower = dir.path().join("lower");
        fs::create_dir_all(lower.join("etc")).unwrap();
        fs::write(lower.join("etc/name"), "x".repeat(5000)).unwrap();
        let (made, failed) =
            ["k.disk", "l.disk"].map(|name| cache::folder(&config).join(name)).into();
        run(&config, &made, 1, std::slice::from_ref(&lower)).unwrap();
        let image = crate::rootfs::described::open(&made.join("disk.json")).unwrap();
        assert!(image.verity.is_some());
        let _socket = std::os::unix::net::UnixListener::bind(lower.join("etc/socket")).unwrap();
        let error = run(&config, &failed, 1, &[lower]).unwrap_err().to_string();
        assert!(error.contains("etc/socket") && error.contains("lower"), "{error}");
        let names = fs::read_dir(cache::folder(&config)).unwrap().flatten();
        let mut left: Vec<_> = names.map(|entry| entry.file_name()).collect();
        left.retain(|name| name != "l.lock");
        assert_eq!(left, ["k.disk"]);
    }
}

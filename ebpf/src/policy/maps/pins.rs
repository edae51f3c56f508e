//! Where the maps are pinned, and who may change them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// Keeps others from changing the maps of a node.
#[derive(Debug)]
pub struct Lock {
    _directory: Flock<File>,
}

impl Lock {
    /// Waits for it.
    ///
    /// # Errors
    /// The policy is not loaded, or the kernel refuses.
    pub fn take(bpf_dir: &Path) -> io::Result<Self> {
        // A BPF file system has no plain files, so the directory itself is what is locked.
        Self::of(File::open(directory(bpf_dir))?)
    }

    pub(in super::super) fn of(file: File) -> io::Result<Self> {
        let lock = Flock::lock(file, FlockArg::LockExclusive);
        Ok(Self { _directory: lock.map_err(|(_, error)| error)? })
    }
}

/// Where the maps and programs are pinned below `bpf_dir`. The name holds the digest of their layout: another
/// version with the same one goes on with them, one with another pins beside.
#[must_use]
pub fn directory(bpf_dir: &Path) -> PathBuf {
    bpf_dir.join(concat!("policy-", env!("JOEY_POLICY_LAYOUT")))
}

/// Where other layouts' maps are pinned below `bpf_dir`: pods that another version has started may have them still.
#[must_use]
pub fn others(bpf_dir: &Path) -> Vec<PathBuf> {
    let own = directory(bpf_dir);
    let entries = fs::read_dir(bpf_dir).into_iter().flatten().flatten();
    let is = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        *path != own && name.is_some_and(|name| name.starts_with("policy-"))
    };
    entries.map(|entry| entry.path()).filter(is).collect()
}

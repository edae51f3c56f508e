//! What a container has written, where joey-snapshotter finds it.
//!
//! For `writable_layer` in CRI's statistics containerd asks the snapshotter of a container, never its runtime. But what
//! a container writes is in its sandbox; so the shim writes down what the guest says it is, each time it is asked for
//! statistics:
//! ```text
//! RUN_DIR/sandboxes/SANDBOX/usage/CONTAINER    {"bytes": 4096, "inodes": 1}
//! ```
//! The sandbox's folder goes with the sandbox, whatever becomes of its shim.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

const SANDBOXES: &str = "sandboxes";
const USAGE: &str = "usage";

/// What is used of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes, in whole blocks.
    pub bytes: u64,
    /// Files, directories and the like.
    pub inodes: u64,
}

impl Usage {
    /// Writes down what a container uses, in the folder of its sandbox.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn write(&self, sandbox: &Path, container: &str) -> io::Result<()> {
        let folder = sandbox.join(USAGE);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // Never half of it for a reader.
        let beside = folder.join(format!(".{container}"));
        fs::write(&beside, serde_json::to_vec(self)?)?;
        fs::rename(beside, folder.join(container))
    }

    /// Takes away what is written of a container that is deleted.
    pub fn forget(sandbox: &Path, container: &str) {
        // Most have none; and the folder goes with the sandbox.
        let _ = fs::remove_file(sandbox.join(USAGE).join(container));
    }

    /// Finds what is written of a container, below the shims' `run_dir`; nothing if there is nothing.
    #[must_use]
    pub fn find(run_dir: &Path, container: &str) -> Self {
        let sandboxes = fs::read_dir(run_dir.join(SANDBOXES));
        let read = |sandbox: fs::DirEntry| {
            let text = fs::read(sandbox.path().join(USAGE).join(container)).ok()?;
            serde_json::from_slice(&text).ok()
        };
        sandboxes.into_iter().flatten().flatten().find_map(read).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_found_until_it_is_forgotten() {
        let run = tempfile::tempdir().unwrap();
        let sandboxes = ["a", "b"].map(|id| run.path().join(SANDBOXES).join(id));
        assert_eq!(Usage::find(run.path(), "c"), Usage::default());
        for sandbox in &sandboxes {
            fs::create_dir_all(sandbox).unwrap();
        }
        let usage = Usage { bytes: 4096, inodes: 1 };
        Usage::default().write(&sandboxes[0], "d").unwrap();
        Usage::default().write(&sandboxes[1], "c").unwrap();
        usage.write(&sandboxes[1], "c").unwrap();
        assert_eq!(Usage::find(run.path(), "c"), usage);
        Usage::forget(&sandboxes[1], "c");
        Usage::forget(&sandboxes[1], "c");
        assert_eq!(Usage::find(run.path(), "c"), Usage::default());
    }
}

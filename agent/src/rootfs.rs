//! Mounts a container's root from its disks, inside the container's own process.
//!
//! ```text
//! /run/joey/root = overlay( lower: the image layers, top first;  upper: a directory of the pod's disk )
//! ```
//!
//! Runs in the forked child in its own private mount namespace, with which every mount here goes
//! away. There is an upper layer even below a read-only root, in memory: mount points that the image
//! lacks are made there, before the engine makes the root read-only. A single disk that may be written is
//! the root itself.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use crate::container::Sources;
use crate::storage::{LayerDisk, RootfsPlan};
use crate::volumes;

const ROOT: &str = "/run/joey/root";
const LAYERS: &str = "/run/joey/layers";
const UPPER: &str = "/run/joey/upper";
/// Enough for the mount points of a read-only root.
const READ_ONLY_UPPER: &str = "mode=755,size=1m";

/// Roots of containers, from their disks; volumes, from the host's copies.
pub(crate) const SOURCES: Sources = Sources { root: mount_root, bind: volumes::bind_source };

fn mount_root(plan: &str) -> Result<PathBuf, String> {
    serde_json::from_str::<RootfsPlan>(plan).map_err(|error| error.to_string())?.mount()
}

/// Mounts a layer for mount points alone.
fn upper() -> Result<PathBuf, String> {
    let upper = directory(UPPER)?;
    attempt("tmpfs", &upper, "tmpfs", MsFlags::empty(), READ_ONLY_UPPER)?;
    directory(upper.join("upper"))?;
    directory(upper.join("work"))?;
    Ok(upper)
}

impl RootfsPlan {
    fn mount(&self) -> Result<PathBuf, String> {
        let root = directory(ROOT)?;
        if let [disk] = self.layers.as_slice()
            && disk.writable
        {
            attach(disk, &root)?;
            return Ok(root);
        }
        let mut lower = Vec::with_capacity(self.layers.len());
        for (index, disk) in self.layers.iter().enumerate() {
            let target = directory(format!("{LAYERS}/{index}"))?;
            attach(disk, &target)?;
            lower.push(index.to_string());
        }
        lower.reverse();
        let upper = self.writable.clone().map_or_else(upper, Ok)?;
        // Relative names: the options of one mount have to fit into a page.
        std::env::set_current_dir(LAYERS).map_err(|error| format!("{LAYERS}: {error}"))?;
        let lower = lower.join(":");
        let upper = upper.display();
        // Volatile: what is written has to outlast the container, not the machine.
        let options =
            format!("lowerdir={lower},upperdir={upper}/upper,workdir={upper}/work,volatile");
        let result = attempt("overlay", &root, "overlay", MsFlags::empty(), &options);
        std::env::set_current_dir("/").map_err(|error| format!("/: {error}"))?;
        result.map(|()| root)
    }
}

fn directory(path: impl Into<PathBuf>) -> Result<PathBuf, String> {
    let path = path.into();
    fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

fn attach(disk: &LayerDisk, target: &Path) -> Result<(), String> {
    let flags = if disk.writable { MsFlags::MS_NOATIME } else { MsFlags::MS_RDONLY };
    let device = disk.device.display().to_string();
    attempt(&device, target, disk.file_system.name(), flags, "")
}

fn attempt(
    source: &str,
    target: &Path,
    kind: &str,
    flags: MsFlags,
    options: &str,
) -> Result<(), String> {
    mount(Some(source), target, Some(kind), flags, Some(options)).map_err(|error| {
        format!("mounting {kind} from {source} on {} ({options}): {error}", target.display())
    })
}

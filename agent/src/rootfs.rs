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

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use joey_protocol::ids::VolumeId;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::fstat;

use crate::container::Sources;
use crate::storage::{LayerDisk, RootfsPlan};
use crate::{paths, volumes};

const ROOT: &str = "/run/joey/root";
const LAYERS: &str = "/run/joey/layers";
const UPPER: &str = "/run/joey/upper";
/// Writable layers at single places, each with `upper`, `work` and the whole, `root`.
const SCRATCH: &str = "/run/joey/scratch";
/// Disks of volumes, by their names.
const DISKS: &str = "/run/joey/disks";
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
        for (name, disk) in &self.volumes {
            attach(disk, &directory(Path::new(DISKS).join(name))?)?;
        }
        if let Some(scratch) = &self.scratch {
            let (source, target) = (scratch.display().to_string(), directory(SCRATCH)?);
            attempt(&source, &target, "bind", MsFlags::MS_BIND, "")?;
        }
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

/// Where the disk of a volume is mounted.
pub(crate) fn disk(name: &VolumeId) -> PathBuf {
    Path::new(DISKS).join(name.as_str())
}

/// Opens a directory of the root such that it can be written: as it is, or below a read-only root with a
/// writable layer on top, of its owner and mode.
pub(crate) fn scratch(name: &VolumeId, below: OwnedFd) -> io::Result<OwnedFd> {
    if !Path::new(SCRATCH).exists() {
        return Ok(below);
    }
    let place = Path::new(SCRATCH).join(name.as_str());
    let [upper, work, root] = ["upper", "work", "root"].map(|name| place.join(name));
    fs::create_dir(&place)?;
    for path in [&upper, &work, &root] {
        fs::create_dir(path)?;
    }
    let meta = fstat(&below)?;
    chown(&upper, Some(meta.st_uid), Some(meta.st_gid))?;
    fs::set_permissions(&upper, Permissions::from_mode(meta.st_mode & 0o7777))?;
    let options = format!(
        "lowerdir=/proc/self/fd/{},upperdir={},workdir={},volatile",
        below.as_raw_fd(),
        upper.display(),
        work.display()
    );
    mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
    paths::open_path(&root)
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

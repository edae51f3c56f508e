//! A machine in reserve: a clone that waits, with its shim, for the next sandbox of its size.
//!
//! ```text
//!   shim of a ready sandbox ── replenish ──▶ keeper: clone, rehearse, listen
//!   containerd ── start ── claim ──▶ keeper: becomes the sandbox's shim ── identity ─▶ …
//! ```
//!
//! A keeper is a shim that has its machine before it has its sandbox. The machine is nobody's: it has no
//! identity and leads to no network, and has run one container of Joey's own, the rehearsal, so that a
//! tenant's first container finds its whole way cached, loaded and, under software emulation, translated.
//! `start` hands a keeper the sandbox's socket; from there everything is as in a shim that cloned its
//! machine itself, which is also what happens when no keeper waits. One keeper serves one sandbox, once.
//!
//! Keepers are found by their class: whatever a machine and a shim depend on. After an update of QEMU, of
//! the guest, of Joey or of its configuration nobody claims the old ones, and they leave.

mod claim;
pub mod keeper;
mod rehearsal;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub(crate) use self::claim::{Claim, Terms};
pub(crate) use self::keeper::replenish;
pub use self::rehearsal::rehearse_for_template;
use crate::config::Config;
use crate::guest::GuestChannel;
use crate::host::net::ParkedTap;
use crate::sandbox::{Disks, PodDisk};
use crate::sizing::Sizing;
use crate::vmm::Vm;
use crate::vmm::template::TemplateStore;

/// Ids of the records of machines that are nobody's begin so.
pub const PREFIX: &str = "standby-";

/// A machine that has no sandbox yet.
pub(crate) struct Standby {
    pub(crate) sizing: Sizing,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) channel: GuestChannel,
    pub(crate) disks: Arc<Disks>,
    pub(crate) disk: PodDisk,
    pub(crate) tap: ParkedTap,
}

/// What a keeper is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Role {
    class: String,
    sizing: Sizing,
    /// Control groups in which it waits.
    home: Vec<PathBuf>,
}

/// Names the machines that could be exchanged for one another.
fn class(config: &Config, sizing: Sizing) -> anyhow::Result<String> {
    let vmm = config.vmm()?;
    let key = TemplateStore::new(&vmm)?.key(sizing.vcpus, sizing.memory_mib)?;
    let program = std::fs::metadata("/proc/self/exe")?;
    // A keeper's files, networks and processes are those of its mount and PID namespaces.
    let namespace = |name: &str| -> std::io::Result<u64> {
        Ok(std::fs::metadata(Path::new("/proc/self/ns").join(name))?.ino())
    };
    let text = format!(
        "{key}\n{} {} {}.{}\n{} {} {}\n{config:?}\n",
        program.dev(),
        program.ino(),
        program.mtime(),
        program.mtime_nsec(),
        namespace("mnt")?,
        namespace("pid")?,
        namespace("net")?,
    );
    let mut class: String =
        Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    class.truncate(16);
    Ok(class)
}

/// Where keepers of a class listen.
fn folder(config: &Config, class: &str) -> PathBuf {
    config.run_dir.join("standby").join(class)
}

//! Templates: machines that booted once on this node, to be continued from by every sandbox.
//!
//! ```text
//! <templates>/<key>.lock     held while one is built       <key>.<pid>.new/  being built
//! <templates>/<key>/         memory state kernel qemu process manifest.json published by rename
//! ```
//!
//! Invariants: a published template is complete and never changes; what it depends on is its key; it
//! is checked against its digests when first used after the node booted, and again when a file's
//! identity (device, inode, size, times) is not what it was when last checked.

mod build;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub use self::build::Rehearse;
use super::accel::{self, Acceleration};
use super::qemu::args::LAYOUT;
use super::qemu::{Version, version};
use super::{VmmConfig, VmmError};

const MEMORY: &str = "memory";
const STATE: &str = "state";
const KERNEL: &str = "kernel";
/// QEMU with its addresses put in; not there if that could not be done.
const VMM: &str = "qemu";
/// Checkpoint of a clone's VMM; not there if none could be taken.
const PROCESS: &str = "process";
const MANIFEST: &str = "manifest.json";

/// What is wrong with a template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// There is none for this machine.
    #[error("no template {0} on this node; `joey template build` makes one")]
    Missing(String),
    /// It is not what was built.
    #[error("template {key} is damaged: {what}; it will be built again")]
    Damaged {
        /// Which.
        key: String,
        /// What is wrong with it.
        what: String,
    },
    /// A file could not be read or written.
    #[error("template {key}: {path}: {source}")]
    File {
        /// Which.
        key: String,
        /// Which of its files.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The booted guest did not come up.
    #[error("template {key}: the guest's agent: {what}; the console is in {console}")]
    Agent {
        /// Which.
        key: String,
        /// What happened.
        what: String,
        /// Where to look.
        console: PathBuf,
    },
}

impl TemplateError {
    /// Whether the template should be thrown away.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }
}

/// One file of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileRecord {
    bytes: u64,
    sha256: String,
}

/// What a template was made from, and its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its key.
    pub key: String,
    /// QEMU's version.
    pub qemu: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Processors.
    pub vcpus: u32,
    /// Memory.
    pub memory_mib: u32,
    /// Digest of the guest image.
    pub guest: String,
    files: BTreeMap<String, FileRecord>,
}

impl Manifest {
    /// Whether clones continue a checkpoint instead of starting QEMU.
    pub fn has_checkpoint(&self) -> bool {
        self.files.contains_key(PROCESS)
    }
}

/// A template that was checked.
#[derive(Debug, Clone)]
pub struct Template {
    directory: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

impl Template {
    pub(crate) fn memory(&self) -> PathBuf {
        self.directory.join(MEMORY)
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.directory.join(KERNEL)
    }

    pub(crate) fn vmm(&self) -> Option<PathBuf> {
        self.manifest.files.contains_key(VMM).then(|| self.directory.join(VMM))
    }

    pub(crate) fn open_state(&self) -> Result<OwnedFd, TemplateError> {
        self.open(STATE)
    }

    /// The checkpoint, if there is one.
    pub(crate) fn open_process(&self) -> Result<Option<OwnedFd>, TemplateError> {
        self.manifest.has_checkpoint().then(|| self.open(PROCESS)).transpose()
    }

    fn open(&self, name: &str) -> Result<OwnedFd, TemplateError> {
        let path = self.directory.join(name);
        File::open(&path).map(OwnedFd::from).map_err(file_error(&self.manifest.key, &path))
    }
}

/// The node's templates.
#[derive(Debug)]
pub struct TemplateStore<'a> {
    config: &'a VmmConfig,
    acceleration: Acceleration,
    qemu: Version,
    guest: String,
}

impl<'a> TemplateStore<'a> {
    /// Learns what a template's key depends on.
    pub fn new(config: &'a VmmConfig) -> Result<Self, VmmError> {
        let qemu = version(&config.qemu, &config.run_dir)?;
        let path = config.guest_dir.join(MANIFEST);
        // The image's manifest holds the digests of its files.
        let guest = fs::read(&path).map_err(|source| VmmError::Guest { path, source })?;
        Ok(Self {
            acceleration: accel::probe(&config.run_dir),
            qemu,
            guest: hex(&Sha256::digest(&guest)),
            config,
        })
    }

    /// The node's accelerator.
    pub fn acceleration(&self) -> &Acceleration {
        &self.acceleration
    }

    /// The key of the template for a machine of this size.
    pub fn key(&self, vcpus: u32, memory_mib: u32) -> Result<String, VmmError> {
        let text = format!(
            "{LAYOUT}\n{}\n{}\n{}\n{}\n{vcpus}\n{memory_mib}\n",
            self.guest,
            self.qemu.text,
            self.qemu.identity,
            self.acceleration.identity(),
        );
        let mut key = hex(&Sha256::digest(text.as_bytes()));
        key.truncate(24);
        Ok(key)
    }

    /// Every published template on this node.
    pub fn list(&self) -> Vec<Manifest> {
        let Ok(entries) = fs::read_dir(&self.config.templates_dir) else {
            return Vec::new();
        };
        let mut found: Vec<Manifest> = entries
            .flatten()
            .filter_map(|entry| {
                let text = fs::read(entry.path().join(MANIFEST)).ok()?;
                let manifest: Manifest = serde_json::from_slice(&text).ok()?;
                // One that is being made or removed has another name yet, or still.
                (entry.file_name() == manifest.key.as_str()).then_some(manifest)
            })
            .collect();
        found.sort_by(|a, b| a.key.cmp(&b.key));
        found
    }

    /// A template that may be used: complete, and checked since it last changed. The check reads all of it.
    pub fn open(&self, key: &str) -> Result<Template, TemplateError> {
        let template = self.read(key)?;
        let identity = template.identity()?;
        if self.is_known(key, &identity) {
            return Ok(template);
        }
        template.check()?;
        let stamp = self.stamp(key);
        let _ = fs::create_dir_all(&self.config.run_dir);
        if let Err(error) = fs::write(&stamp, identity) {
            tracing::warn!("keeping {}: {error}", stamp.display());
        }
        Ok(template)
    }

    /// A template that has been checked already, and so takes no time.
    pub(crate) fn open_known(&self, key: &str) -> Option<Template> {
        let template = self.read(key).ok()?;
        let identity = template.identity().ok()?;
        self.is_known(key, &identity).then_some(template)
    }

    /// What a template was when it was checked.
    fn stamp(&self, key: &str) -> PathBuf {
        self.config.run_dir.join(format!("template-{key}"))
    }

    fn is_known(&self, key: &str, identity: &str) -> bool {
        fs::read_to_string(self.stamp(key)).is_ok_and(|known| known == identity)
    }

    /// Has a template that a machine ended with checked before it is used again.
    pub(crate) fn doubt(&self, key: &str) {
        let _ = fs::remove_file(self.stamp(key));
    }

    /// Checks a template in full.
    pub fn verify(&self, key: &str) -> Result<(), TemplateError> {
        self.read(key)?.check()
    }

    fn read(&self, key: &str) -> Result<Template, TemplateError> {
        let directory = self.config.templates_dir.join(key);
        let path = directory.join(MANIFEST);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !directory.exists() => {
                return Err(TemplateError::Missing(key.to_owned()));
            }
            Err(error) => return Err(damaged(key, format!("{}: {error}", path.display()))),
        };
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| damaged(key, format!("its manifest: {error}")))?;
        if manifest.key != key {
            return Err(damaged(key, format!("its manifest is that of {}", manifest.key)));
        }
        for name in [MEMORY, STATE, KERNEL] {
            if !manifest.files.contains_key(name) {
                return Err(damaged(key, format!("its manifest lacks {name}")));
            }
        }
        Ok(Template { directory, manifest })
    }

    /// Takes a template away.
    pub fn remove(&self, key: &str) -> Result<(), TemplateError> {
        let directory = self.config.templates_dir.join(key);
        let gone = self.config.templates_dir.join(format!("{key}.{}.old", std::process::id()));
        let file = |path: &Path| file_error(key, path);
        match fs::rename(&directory, &gone) {
            // Swept meanwhile, it is gone as well.
            Ok(()) => match fs::remove_dir_all(&gone) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file(&gone)(error)),
                _ => Ok(()),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(file(&directory)(error)),
        }
    }

    /// Takes away a template that proved bad, so that the next build makes a new one.
    pub(crate) fn condemn(&self, key: &str) {
        self.doubt(key);
        if let Err(error) = self.remove(key) {
            tracing::warn!("removing a bad template: {error}");
        }
    }

    /// Removes templates of other guest images, VMMs or accelerators, and what failed builds left.
    /// Gives their keys.
    pub fn collect_stale(&self) -> Result<Vec<String>, VmmError> {
        let mut removed = Vec::new();
        for manifest in self.list() {
            if self.key(manifest.vcpus, manifest.memory_mib)? != manifest.key {
                self.remove(&manifest.key)?;
                removed.push(manifest.key);
            }
        }
        removed.extend(sweep(&self.config.templates_dir));
        Ok(removed)
    }
}

/// Removes what killed builders and removers have left in the folder of the templates; gives its names. What is
/// being built stays: its builder holds the lock.
pub fn sweep(templates: &Path) -> Vec<String> {
    let mut removed = Vec::new();
    for entry in fs::read_dir(templates).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((key, kind)) = name.split_once('.') else { continue };
        let _nobody_builds = if kind.ends_with(".new") {
            let Ok(file) = File::create(templates.join(format!("{key}.lock"))) else { continue };
            let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { continue };
            Some(lock)
        } else if kind.ends_with(".old") {
            None
        } else {
            continue;
        };
        match fs::remove_dir_all(entry.path()) {
            Ok(()) => {
                tracing::info!("removed {name}, which was never finished");
                removed.push(name);
            }
            // Published or removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!("removing {}: {error}", entry.path().display()),
        }
    }
    removed
}

impl Template {
    fn identity(&self) -> Result<String, TemplateError> {
        let mut text = String::new();
        for name in self.manifest.files.keys() {
            let path = self.directory.join(name);
            let m = fs::metadata(&path)
                .map_err(|error| damaged(&self.manifest.key, format!("{name}: {error}")))?;
            text += &format!(
                "{name} {} {} {} {}.{} {}.{}\n",
                m.dev(),
                m.ino(),
                m.size(),
                m.mtime(),
                m.mtime_nsec(),
                m.ctime(),
                m.ctime_nsec()
            );
        }
        Ok(text)
    }

    fn check(&self) -> Result<(), TemplateError> {
        let key = &self.manifest.key;
        for (name, expected) in &self.manifest.files {
            let found = record(&self.directory.join(name))
                .map_err(|error| damaged(key, format!("{name}: {error}")))?;
            if found.bytes != expected.bytes {
                let what = format!("{name} has {} of {} bytes", found.bytes, expected.bytes);
                return Err(damaged(key, what));
            }
            if found.sha256 != expected.sha256 {
                return Err(damaged(key, format!("the content of {name} has changed")));
            }
        }
        Ok(())
    }
}

fn record(path: &Path) -> io::Result<FileRecord> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        digest.update(buffer.get(..read).unwrap_or_default());
        bytes += read as u64;
    }
    Ok(FileRecord { bytes, sha256: hex(&digest.finalize()) })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn damaged(key: &str, what: String) -> TemplateError {
    TemplateError::Damaged { key: key.to_owned(), what }
}

fn file_error(key: &str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError + use<> {
    let (key, path) = (key.to_owned(), path.to_owned());
    move |source| TemplateError::File { key, path, source }
}

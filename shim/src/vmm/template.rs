//! Templates: machines that booted once on this node, to be continued from by every sandbox.
//!
//! ```text
//! <templates>/<key>.lock     held while one is built       <key>.<pid>.new/  being built
//! <templates>/<key>/         memory state kernel manifest.json      published by rename
//! ```
//!
//! Invariants: a published template is complete and never changes; what it depends on is its key; it
//! is checked against its digests when first used after the node booted, and again when a file's
//! identity (device, inode, size, times) is not what it was when last checked.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use joey_protocol::mux::Mux;
use joey_protocol::{api, limits};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::time::timeout;

use super::accel::{self, Acceleration};
use super::qemu::args::{LAYOUT, Mode};
use super::qemu::{QemuVm, Version, kernel_stub, version};
use super::{Paths, Phases, Vm, VmSpec, VmmConfig, VmmError, prepare};

const MEMORY: &str = "memory";
const STATE: &str = "state";
const KERNEL: &str = "kernel";
const MANIFEST: &str = "manifest.json";
/// After the agent answered, how long the guest gets to come to rest before it is stopped. Kernels put
/// work off for seconds after their boot; what is pending then, every clone has to do in its first
/// second: with 2 s a clone's first container took a third longer than with 8 s.
const REST: Duration = Duration::from_secs(8);

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

    pub(crate) fn open_state(&self) -> Result<OwnedFd, TemplateError> {
        let path = self.directory.join(STATE);
        match File::open(&path) {
            Ok(file) => Ok(file.into()),
            Err(source) => {
                Err(TemplateError::File { key: self.manifest.key.clone(), path, source })
            }
        }
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
            self.acceleration.name(),
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
            .filter_map(|entry| fs::read(entry.path().join(MANIFEST)).ok())
            .filter_map(|text| serde_json::from_slice(&text).ok())
            .collect();
        found.sort_by(|a, b| a.key.cmp(&b.key));
        found
    }

    /// A template that may be used: complete, and checked since it last changed.
    pub fn open(&self, key: &str) -> Result<Template, TemplateError> {
        let template = self.read(key)?;
        let stamp = self.config.run_dir.join(format!("template-{key}"));
        let identity = template.identity()?;
        if fs::read_to_string(&stamp).is_ok_and(|known| known == identity) {
            return Ok(template);
        }
        template.check()?;
        let _ = fs::create_dir_all(&self.config.run_dir);
        if let Err(error) = fs::write(&stamp, identity) {
            tracing::warn!("keeping {}: {error}", stamp.display());
        }
        Ok(template)
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
            Ok(()) => fs::remove_dir_all(&gone).map_err(file(&gone)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(file(&directory)(error)),
        }
    }

    /// Takes away a template that proved bad, so that the next build makes a new one.
    pub(crate) fn condemn(&self, key: &str) {
        let _ = fs::remove_file(self.config.run_dir.join(format!("template-{key}")));
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
        let Ok(entries) = fs::read_dir(&self.config.templates_dir) else {
            return Ok(removed);
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let mut parts = name.rsplit('.');
            let (kind, pid) = (parts.next(), parts.next());
            let dead = pid
                .and_then(|pid| pid.parse::<u32>().ok())
                .is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
            if matches!(kind, Some("new" | "old")) && dead {
                let _ = fs::remove_dir_all(entry.path());
                removed.push(name);
            }
        }
        Ok(removed)
    }

    /// Builds the template for a machine of this size unless a good one is there. Of several
    /// builders one builds, the others wait and use what it built. Blocks while it waits: for a
    /// process of its own.
    pub async fn build(&self, vcpus: u32, memory_mib: u32) -> Result<Template, VmmError> {
        let key = self.key(vcpus, memory_mib)?;
        let directory = &self.config.templates_dir;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(file_error(&key, directory))?;
        let _lock = self.lock(&key).await?;
        match self.open(&key) {
            Ok(template) => return Ok(template),
            Err(TemplateError::Missing(_)) => {}
            Err(error) => {
                tracing::warn!("{error}");
                self.condemn(&key);
            }
        }
        let work = directory.join(format!("{key}.{}.new", std::process::id()));
        let _ = fs::remove_dir_all(&work);
        let built = self.build_in(&work, &key, vcpus, memory_mib).await;
        if built.is_err() {
            let _ = fs::remove_dir_all(&work);
        }
        built?;
        Ok(self.open(&key)?)
    }

    async fn lock(&self, key: &str) -> Result<Flock<File>, TemplateError> {
        let path = self.config.templates_dir.join(format!("{key}.lock"));
        let file = File::create(&path).map_err(file_error(key, &path))?;
        // A thread waits, not the loop: the builder that holds the lock may be in this process.
        let (sender, receiver) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let _ = sender.send(Flock::lock(file, FlockArg::LockExclusive));
        });
        match receiver.await {
            Ok(Ok(lock)) => Ok(lock),
            Ok(Err((_, errno))) => Err(file_error(key, &path)(errno.into())),
            Err(_) => Err(file_error(key, &path)(io::Error::other("waiting for the lock"))),
        }
    }

    async fn build_in(
        &self,
        work: &Path,
        key: &str,
        vcpus: u32,
        memory_mib: u32,
    ) -> Result<(), VmmError> {
        let id = format!("template-{key}");
        let error = |path: &Path| file_error(key, path);
        fs::create_dir(work).map_err(error(work))?;
        let (memory, state, kernel) = (work.join(MEMORY), work.join(STATE), work.join(KERNEL));
        let bytes = u64::from(memory_mib) << 20;
        let file = File::create(&memory).map_err(error(&memory))?;
        file.set_len(bytes).map_err(error(&memory))?;
        // The memory is a shared mapping: without room the VMM would die of a bus error half-way.
        nix::fcntl::posix_fallocate(&file, 0, bytes.cast_signed())
            .map_err(|errno| error(&memory)(errno.into()))?;
        let owner = self.config.ids.of(&id);
        std::os::unix::fs::chown(&memory, Some(owner.uid), Some(owner.gid))
            .map_err(error(&memory))?;
        let stub = kernel_stub(&self.config.guest_dir.join("vmlinuz"))?;
        fs::write(&kernel, stub).map_err(error(&kernel))?;
        let target = File::create(&state).map_err(error(&state))?;
        let spec = VmSpec {
            id,
            vcpus,
            memory_mib,
            tap: None,
            mac: [0; 6],
            run_dir: self.config.run_dir.join(format!("build-{key}")),
            cgroup_procs: Vec::new(),
        };
        let console = spec.run_dir.join("console.log");
        let paths = Paths {
            kernel: self.config.guest_dir.join("vmlinuz"),
            initrd: Some(self.config.guest_dir.join("initrd")),
            memory: Some(memory.clone()),
        };
        let launch = prepare(self.config, self, Mode::Build, spec, &paths, None)?;
        let vm = QemuVm::start(launch, &mut Phases::new()).await?;
        let channel = vm.take_channel()?;
        // Open until the state is saved: a guest that saw its host go would end in every clone.
        let _connected =
            channel.as_fd().try_clone_to_owned().map_err(VmmError::io("keeping the channel"))?;
        let greeting = greet(channel);
        let answered = tokio::select! {
            answered = greeting => answered,
            how = vm.exited() => Err(format!("the VMM ended: {how}")),
        };
        answered.map_err(|what| TemplateError::Agent { key: key.to_owned(), what, console })?;
        vm.save(target.into()).await?;
        vm.kill();
        vm.exited().await;
        self.publish(work, key, vcpus, memory_mib)
    }

    fn publish(&self, work: &Path, key: &str, vcpus: u32, memory_mib: u32) -> Result<(), VmmError> {
        let mut files = BTreeMap::new();
        for name in [MEMORY, STATE, KERNEL] {
            let path = work.join(name);
            // Every VMM has an id of its own and may read; the directory keeps everyone else out.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o444))
                .and_then(|()| std::os::unix::fs::chown(&path, Some(0), Some(0)))
                .and_then(|()| File::open(&path)?.sync_all())
                .map_err(file_error(key, &path))?;
            files.insert(name.to_owned(), record(&path).map_err(file_error(key, &path))?);
        }
        let manifest = Manifest {
            key: key.to_owned(),
            qemu: self.qemu.text.clone(),
            accelerator: self.acceleration.name().to_owned(),
            vcpus,
            memory_mib,
            guest: self.guest.clone(),
            files,
        };
        let path = work.join(MANIFEST);
        let text = serde_json::to_vec_pretty(&manifest).map_err(io::Error::from);
        text.and_then(|text| fs::write(&path, text)).map_err(file_error(key, &path))?;
        let target = self.config.templates_dir.join(key);
        fs::rename(work, &target).map_err(file_error(key, &target))?;
        Ok(())
    }
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

/// Waits until the agent answers and the guest is at rest.
async fn greet(channel: tokio::net::UnixStream) -> Result<(), String> {
    let (mux, driver) = Mux::connect(channel);
    let calls = mux.open(limits::STREAM_RPC).map_err(|error| error.to_string())?;
    let socket = ttrpc::r#async::transport::Socket::new(calls);
    let agent = api::AgentClient::new(ttrpc::r#async::Client::new(socket));
    let request =
        api::HelloRequest { protocol_version: limits::PROTOCOL_VERSION, ..Default::default() };
    let hello = agent.hello(ttrpc::context::Context::default(), &request);
    let asking = async {
        match timeout(limits::deadline::HELLO_COLD, hello).await {
            Ok(Ok(_)) => {
                tokio::time::sleep(REST).await;
                Ok(())
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {:?}", limits::deadline::HELLO_COLD)),
        }
    };
    tokio::select! {
        asked = asking => asked,
        ended = driver => Err(format!("the channel was lost: {ended:?}")),
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

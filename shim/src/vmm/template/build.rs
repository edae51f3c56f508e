//! Building a template: boot, come to rest, save, publish. One builder per template on a node.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::future::BoxFuture;
use joey_protocol::mux::Mux;
use joey_protocol::{api, limits};
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{
    KERNEL, MANIFEST, MEMORY, Manifest, PROCESS, STATE, Template, TemplateError, TemplateStore,
    VMM, file_error, record,
};
use crate::config::DISK_MIB;
use crate::failpoint;
use crate::vmm::qemu::args::Mode;
use crate::vmm::qemu::relocate::{random_base, relocate};
use crate::vmm::qemu::{QemuVm, kernel_stub};
use crate::vmm::{Disk, Paths, Phases, Vm, VmSpec, VmmError, continued, prepare};

/// After the agent answered, how long the guest gets to come to rest before it is stopped. Kernels put
/// work off for seconds after their boot; what is pending then, every clone has to do in its first
/// second: with 2 s a clone's first container took a third longer than with 8 s.
const REST: Duration = Duration::from_secs(8);

/// Mode of files that are executed.
const PROGRAM: u32 = 0o555;

/// What a machine that is nobody's goes through, by its channel, before its checkpoint is taken.
pub type Rehearse<'a> =
    dyn Fn(Arc<dyn Vm>, UnixStream) -> BoxFuture<'a, anyhow::Result<()>> + Sync + 'a;
/// How long after a failure QEMU's end may become known.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// How much of it the guest uses in the disk that it opens once: the smallest there is.
const TRIAL_BYTES: u64 = *DISK_MIB.start() << 20;

impl TemplateStore<'_> {
    /// Builds the template for a machine of this size unless a good one is there. Of several
    /// builders one builds, the others wait and use what it built. Blocks while it waits: for a
    /// process of its own.
    pub async fn build(
        &self,
        vcpus: u32,
        memory_mib: u32,
        rehearse: &Rehearse<'_>,
    ) -> Result<Template, VmmError> {
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
        let built = self.build_in(&work, &key, vcpus, memory_mib, rehearse).await;
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
        rehearse: &Rehearse<'_>,
    ) -> Result<(), VmmError> {
        let error = |path: &Path| file_error(key, path);
        fs::create_dir(work).map_err(error(work))?;
        let (memory, state, kernel) = (work.join(MEMORY), work.join(STATE), work.join(KERNEL));
        let bytes = u64::from(memory_mib) << 20;
        let file = File::create(&memory).map_err(error(&memory))?;
        file.set_len(bytes).map_err(error(&memory))?;
        // The memory is a shared mapping: without room the VMM would die of a bus error half-way.
        nix::fcntl::posix_fallocate(&file, 0, bytes.cast_signed())
            .map_err(|errno| error(&memory)(errno.into()))?;
        let spec = self.nobodys(key, vcpus, memory_mib);
        let owner = self.config.ids.of(&spec.id);
        std::os::unix::fs::chown(&memory, Some(owner.uid), Some(owner.gid))
            .map_err(error(&memory))?;
        let stub = kernel_stub(&self.config.guest_dir.join("vmlinuz"))?;
        fs::write(&kernel, stub).map_err(error(&kernel))?;
        let target = File::create(&state).map_err(error(&state))?;
        let console = spec.run_dir.join("console.log");
        let paths = Paths {
            kernel: self.config.guest_dir.join("vmlinuz"),
            initrd: Some(self.config.guest_dir.join("initrd")),
            memory: Some(memory.clone()),
            vmm: None,
        };
        let launch = prepare(self.config, self, Mode::Build, spec, &paths, None)?;
        let vm = QemuVm::start(launch, &mut Phases::new()).await?;
        let saved = self.boot_and_save(&vm, key, &console, target.into()).await;
        // That QEMU has ended is the reason, not that it does not answer.
        let ended = match saved {
            Err(VmmError::Qmp(_)) => timeout(LAST_WORDS, vm.exited()).await.ok(),
            _ => None,
        };
        vm.kill();
        vm.exited().await;
        saved.map_err(|error| match (error, ended) {
            (VmmError::Qmp(_), Some(how)) => {
                let what = format!("the VMM ended: {how}");
                TemplateError::Agent { key: key.to_owned(), what, console }.into()
            }
            (error @ VmmError::Qmp(_), None) => {
                file_error(key, work)(io::Error::other(error)).into()
            }
            (error, _) => error,
        })?;
        make_sparse(&memory).map_err(error(&memory))?;
        self.relocate_vmm(&work.join(VMM)).map_err(error(&work.join(VMM)))?;
        let machine = || self.nobodys(key, vcpus, memory_mib);
        if let Err(error) = self.checkpoint(work, machine, rehearse).await {
            tracing::warn!("template {key}: clones start QEMU anew: {error:#}");
            let _ = fs::remove_file(work.join(PROCESS));
        }
        failpoint::reach(&self.config.run_dir, "template.publishing").await;
        self.publish(work, key, vcpus, memory_mib)
    }

    /// Waits until the guest is at rest and writes its state to `target`.
    async fn boot_and_save(
        &self,
        vm: &QemuVm,
        key: &str,
        console: &Path,
        target: OwnedFd,
    ) -> Result<(), VmmError> {
        failpoint::reach(&self.config.run_dir, "template.booting").await;
        let channel = vm.take_channel()?;
        // Open until the state is saved: a guest that saw its host go would end in every clone.
        let _connected =
            channel.as_fd().try_clone_to_owned().map_err(VmmError::io("keeping the channel"))?;
        // A disk as every sandbox will have one, to be opened once.
        let disk = Disk { ephemeral: true, ..Disk::from(trial().map_err(VmmError::io("a disk"))?) };
        vm.attach_disk(limits::POD_DISK, &disk, false).await?;
        let greeting = greet(channel);
        let answered = tokio::select! {
            answered = greeting => answered,
            how = vm.exited() => Err(format!("the VMM ended: {how}")),
        };
        answered.map_err(|what| {
            let (key, console) = (key.to_owned(), console.to_owned());
            TemplateError::Agent { key, what, console }
        })?;
        vm.detach_disk(limits::POD_DISK).await?;
        failpoint::reach(&self.config.run_dir, "template.saving").await;
        vm.save(target).await
    }

    /// A machine that a template is made with.
    fn nobodys(&self, key: &str, vcpus: u32, memory_mib: u32) -> VmSpec {
        VmSpec {
            id: format!("template-{key}"),
            vcpus,
            memory_mib,
            tap: None,
            mac: [0; 6],
            run_dir: self.config.run_dir.join(format!("build-{key}")),
            cgroup_procs: Vec::new(),
        }
    }

    /// Has a clone go through what every sandbox does, and takes the checkpoint of its VMM that sandboxes
    /// continue. Under KVM a part of the machine is in the kernel, where no checkpoint reaches.
    async fn checkpoint(
        &self,
        work: &Path,
        machine: impl Fn() -> VmSpec,
        rehearse: &Rehearse<'_>,
    ) -> anyhow::Result<()> {
        if self.acceleration.kvm {
            return Ok(());
        }
        let spec = machine();
        let vcpus = spec.vcpus as usize;
        let vmm = Some(work.join(VMM)).filter(|path| path.exists());
        let (kernel, memory) = (work.join(KERNEL), Some(work.join(MEMORY)));
        let paths = Paths { kernel, initrd: None, memory, vmm };
        let state = File::open(work.join(STATE))?;
        let launch = prepare(self.config, self, Mode::Clone, spec, &paths, Some(state.into()))?;
        let vm = Arc::new(QemuVm::start(launch, &mut Phases::new()).await?);
        vm.restored().await?;
        // Open until the checkpoint is taken: a guest that saw its host go would end.
        let channel = vm.take_channel()?;
        let _connected = channel.as_fd().try_clone_to_owned()?;
        rehearse(vm.clone(), channel).await?;
        let path = work.join(PROCESS);
        let taken = vm.checkpoint(vcpus, &File::create(&path)?).await;
        taken.with_context(|| path.display().to_string())?;
        vm.kill();
        vm.exited().await;
        fs::set_permissions(&path, fs::Permissions::from_mode(PROGRAM))?;
        // Once here, rather than in every sandbox.
        let launch = continued(self.config, machine(), File::open(&path)?.into())?;
        let vm = QemuVm::start(launch, &mut Phases::new()).await?;
        vm.restored().await?;
        let answered = answers(vm.take_channel()?, async |_| Ok(())).await;
        answered.map_err(|what| anyhow::anyhow!("its checkpoint does not go on: {what}"))?;
        vm.kill();
        vm.exited().await;
        Ok(())
    }

    /// Makes the copy of QEMU that clones run. Without one they run QEMU itself, for more time and memory.
    fn relocate_vmm(&self, copy: &Path) -> io::Result<()> {
        let mut image = fs::read(&self.config.qemu)?;
        match relocate(&mut image, random_base()?) {
            Ok(()) => {
                fs::write(copy, image)?;
                fs::set_permissions(copy, fs::Permissions::from_mode(PROGRAM))
            }
            Err(error) => {
                tracing::warn!("clones run {} as it is: {error}", self.config.qemu.display());
                Ok(())
            }
        }
    }

    fn publish(&self, work: &Path, key: &str, vcpus: u32, memory_mib: u32) -> Result<(), VmmError> {
        let mut files = BTreeMap::new();
        for name in [MEMORY, STATE, KERNEL, VMM, PROCESS] {
            let path = work.join(name);
            let program = [VMM, PROCESS].contains(&name);
            if program && !path.exists() {
                continue;
            }
            // Every VMM has an id of its own and may read; the directory keeps everyone else out.
            let mode = if program { PROGRAM } else { 0o444 };
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))
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

/// Gives back the room of what the guest never wrote: of a large machine's template that is nearly all.
fn make_sparse(memory: &Path) -> io::Result<()> {
    const STEP: usize = 64 << 10;
    let file = File::options().read(true).write(true).open(memory)?;
    let mut block = vec![0; STEP];
    for at in (0..file.metadata()?.len()).step_by(STEP) {
        let read = file.read_at(&mut block, at)?;
        if block.iter().take(read).all(|byte| *byte == 0) {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&file, hole, at.cast_signed(), read as i64)?;
        }
    }
    Ok(())
}

/// An empty disk in memory, as long as an empty slot: the guest may not have read the slot's length yet.
fn trial() -> io::Result<OwnedFd> {
    let file = File::from(memfd_create(c"trial", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(limits::MAX_POD_DISK)?;
    Ok(file.into())
}

/// Waits until the agent answers, has opened a disk and the guest is at rest.
async fn greet(channel: UnixStream) -> Result<(), String> {
    answers(channel, async |agent| {
        let request = api::OpenDiskRequest { bytes: TRIAL_BYTES, ..Default::default() };
        let rehearsed = agent.rehearse_disk(ttrpc::context::Context::default(), &request);
        timeout(limits::deadline::OPEN_DISK, rehearsed)
            .await
            .map_err(|_| "it does not open a disk in time".to_owned())?
            .map_err(|error| error.to_string())?;
        tokio::time::sleep(REST).await;
        Ok(())
    })
    .await
}

/// Waits until the agent answers and has done what is asked of it `then`.
async fn answers(
    channel: UnixStream,
    then: impl AsyncFnOnce(&api::AgentClient) -> Result<(), String>,
) -> Result<(), String> {
    let (mux, driver) = Mux::connect(channel);
    let calls = mux.open(limits::STREAM_RPC).map_err(|error| error.to_string())?;
    let socket = ttrpc::r#async::transport::Socket::new(calls);
    let agent = api::AgentClient::new(ttrpc::r#async::Client::new(socket));
    let request =
        api::HelloRequest { protocol_version: limits::PROTOCOL_VERSION, ..Default::default() };
    let asking = async {
        let hello = agent.hello(ttrpc::context::Context::default(), &request);
        match timeout(limits::deadline::HELLO_COLD, hello).await {
            Ok(Ok(_)) => then(&agent).await,
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {:?}", limits::deadline::HELLO_COLD)),
        }
    };
    tokio::select! {
        asked = asking => asked,
        ended = driver => Err(format!("the channel was lost: {ended:?}")),
    }
}

//! Creating and deleting containers: plan → images → disks → files → guest, and the way back.
//!
//! What a creation has acquired is collected in [`Acquired`], and given back by [`Handle::release`]:
//! when a later step fails and when the container is deleted.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use joey_image::usage::Usage;
use joey_protocol::api;
use joey_protocol::ids::ContainerId;
use nix::sched::CpuSet;
use oci_spec::runtime::{Process as OciProcess, Spec};

use super::plan::{self, Plan, Source};
use super::state::{self, Exit, Operation, Process, Status};
use super::{
    CreateTask, Deleted, Guest, Handle, KILLED, Progress, SandboxError, SandboxEvent, StdioPaths,
};
use crate::failpoint;
use crate::guest::GuestError;
use crate::host::patience::{self, PATIENCE};
use crate::host::{block, cpus, mounts, oom};
use crate::rootfs;
use crate::rootfs::{FileSystem, Image, described};
use crate::stdio::{Copies, DRAIN, Stdio};
use crate::volumes::direct;

/// How long the exits of a deleted container's execs may take: their output is read first.
const LAST_EXITS: Duration = DRAIN.saturating_add(Duration::from_secs(1));

/// How long the guest's word of a damaged image may come after its answer.
const DAMAGE_TOLD: Duration = Duration::from_millis(50);

/// A container of the pod.
pub(crate) struct Container {
    pub(super) process: Process,
    pub(super) bundle: PathBuf,
    pub(super) stdio: StdioPaths,
    pub(super) copies: Option<Copies>,
    pub(super) execs: HashMap<String, Exec>,
    pub(super) acquired: Acquired,
    /// Whether its deletion is under way.
    pub(super) deleting: bool,
    /// `process.oomScoreAdj` of its specification.
    pub(super) oom_score: Option<i32>,
    /// The host's processors that it is bound to.
    pub(super) cpus: Option<CpuSet>,
    /// When containerd was last told of a memory kill in it.
    pub(super) oom_told: Option<tokio::time::Instant>,
}

/// A further process of a container.
pub(crate) struct Exec {
    pub(super) process: Process,
    pub(super) stdio: StdioPaths,
    pub(super) copies: Option<Copies>,
}

/// What a container holds in VM and guest.
#[derive(Clone, Default)]
pub(crate) struct Acquired {
    pub(super) slots: Vec<u32>,
    /// Volumes that the guest mounts from disks.
    direct: Vec<String>,
    /// Whether the guest knows the container.
    in_guest: bool,
    /// Files that are written back to the host when the container ends.
    pub(super) write_back: Vec<plan::WriteBack>,
}

impl Handle {
    /// Creates a container, or notes the sandbox's own task, for which there is no process.
    ///
    /// # Errors
    /// [`SandboxError`]; nothing is left behind.
    pub async fn create(&self, task: CreateTask) -> Result<u32, SandboxError> {
        ContainerId::new(&task.id)?;
        let text = std::fs::read(task.bundle.join("config.json"))
            .map_err(|error| SandboxError::host(&task.id, "read config.json", error))?;
        let refuse = |reason| SandboxError::Refused(format!("container {}: {reason}", task.id));
        let mut spec: Spec = serde_json::from_slice(&text)
            .map_err(|error| refuse(format!("config.json: {error}")))?;
        if plan::is_sandbox(&spec) {
            return self.create_pause(task).await;
        }
        let resources = spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut());
        let cpus = resources.map_or(Ok(None), cpus::take).map_err(refuse)?;
        {
            let mut table = self.table();
            if table.process(&task.id, None).is_some() {
                return Err(SandboxError::Exists { what: "container", id: task.id });
            }
            let container = Container {
                process: Process::new(),
                bundle: task.bundle.clone(),
                stdio: task.stdio.clone(),
                copies: None,
                execs: HashMap::new(),
                acquired: Acquired::default(),
                deleting: false,
                oom_score: spec.process().as_ref().and_then(OciProcess::oom_score_adj),
                cpus,
                oom_told: None,
            };
            table.containers.insert(task.id.clone(), container);
        }
        let mut acquired = Acquired::default();
        match self.build(&task, &spec, &mut acquired).await {
            Ok((pid, copies)) => {
                if let Some(container) = self.table().containers.get_mut(&task.id) {
                    container.copies = Some(copies);
                    container.acquired = acquired;
                }
                let id = task.id.clone();
                let created = SandboxEvent::Created { task, pid };
                self.advance(&id, None, Some(created), |process| process.created(pid))?;
                Ok(pid)
            }
            Err(error) => {
                let error = self.blame(error, &acquired).await;
                self.release(&task.id, acquired).await;
                self.table().containers.remove(&task.id);
                self.treat_vmm_again();
                Err(error)
            }
        }
    }

    async fn build(
        &self,
        task: &CreateTask,
        spec: &Spec,
        acquired: &mut Acquired,
    ) -> Result<(u32, Copies), SandboxError> {
        let id = &task.id;
        let config = &self.0.config;
        let start = Instant::now();
        let stdio = self.open_stdio(id, &format!("container {id}"), &task.stdio).await?;
        let images = rootfs::prepare(id, &task.rootfs, config)
            .await
            .map_err(|error| SandboxError::host(id, "prepare the root file system", error))?;
        self.0.timeline.host("image", id, start);
        let guest = self.guest().await?;
        guest
            .pod_disk
            .wait()
            .await
            .map_err(|reason| SandboxError::host(id, "wait for the disk", reason))?;
        self.treat_vmm(&guest);
        let start = Instant::now();
        // Not before the VM runs: its process is forked off, and there must be no other thread then.
        let mut plan = self.plan(id, spec).await?;
        let mut rootfs = api::Rootfs { read_only: plan.read_only_root, ..Default::default() };
        for image in images {
            let disk = attach(&guest, id, image, acquired).await?;
            if let Some(name) = image_name(spec) {
                guest.disks.name(disk.slot, name);
            }
            rootfs.layers.push(disk);
        }
        let mut volumes = Vec::new();
        for (name, description) in std::mem::take(&mut plan.images) {
            let image = described::open(&description)
                .map_err(|error| SandboxError::host(id, "open an image volume", error))?;
            let disk = Some(attach(&guest, id, image, acquired).await?).into();
            volumes.push(api::DiskVolume { name, disk, ..Default::default() });
        }
        let mut devices = Vec::new();
        for device in &plan.devices {
            devices.push(give(&guest, id, device, acquired).await?);
        }
        self.0.timeline.host("disk", id, start);
        failpoint::reach(&config.run_dir, "create.attached").await;
        let start = Instant::now();
        for volume in &plan.volumes {
            match &volume.source {
                Source::Shared(shared) => {
                    let opened = self.0.shares.open(&guest, volume, shared).await;
                    opened.map_err(|error| {
                        SandboxError::host(id, "share files of the host", error)
                    })?;
                }
                Source::Direct(direct) => {
                    let opened = self.0.direct.open(&guest, volume, direct).await;
                    opened
                        .map_err(|error| SandboxError::host(id, "mount a disk's files", error))?;
                    acquired.direct.push(volume.id.clone());
                }
                _ => {}
            }
        }
        self.0
            .volumes
            .copy_in(&guest.client, &plan.volumes)
            .await
            .map_err(|error| SandboxError::host(id, "copy files into the guest", error))?;
        self.0.timeline.host("files", id, start);
        acquired.write_back = std::mem::take(&mut plan.write_back);
        let request = api::CreateContainerRequest {
            container_id: id.clone(),
            spec: plan.spec,
            rootfs: Some(rootfs).into(),
            volumes,
            devices,
            ..Default::default()
        };
        self.create_in_guest(&guest, request, stdio, acquired).await
    }

    /// Plans a container; what it mounts from the host is looked at, which may take for ever.
    async fn plan(&self, id: &str, spec: &Spec) -> Result<Plan, SandboxError> {
        let vmm_pid = self.table().vmm_pid;
        let pod_files = self.0.pod_files.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let empty_dirs = self.0.empty_dirs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let looked = Arc::new(Mutex::new(PathBuf::new()));
        let config = self.0.config.clone();
        let (asked, noted) = (spec.clone(), looked.clone());
        let planning = patience::within(PATIENCE, move || {
            let look = |path: &Path| {
                path.clone_into(&mut noted.lock().unwrap_or_else(PoisonError::into_inner));
                look(path)
            };
            let facts = plan::Facts {
                vmm_pid,
                pod_files: &pod_files,
                empty_dirs: &empty_dirs,
                look: &look,
                mounted: &mounts::root_of,
                direct: &|path| direct::find(&config.direct_volumes_dir, path),
                described: &described::of_mount,
            };
            Plan::new(&asked, &facts)
        });
        let planned = planning.await.map_err(|error| {
            let source = looked.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let mount = mount_of(spec, &source);
            SandboxError::host(id, "look at what it mounts", format!("{mount}: {error}"))
        })?;
        planned.map_err(|refusal| SandboxError::Refused(format!("container {id}: {refusal}")))
    }

    /// Has the host's kernel treat the VMM as it would the pod's containers: its memory killer, and its scheduler,
    /// which keeps it to the processors that they are bound to.
    pub(super) fn treat_vmm(&self, guest: &Guest) {
        let table = self.table();
        let scores = table.containers.values().filter_map(|container| container.oom_score);
        oom::set_of_pod(guest.vm.pid(), scores);
        let bound = table.containers.values().map(|container| container.cpus);
        if let Err(error) = cpus::keep(guest.vm.pid(), bound) {
            tracing::warn!(sandbox = %self.0.boot.id, %error, "the VMM keeps the processors that it had");
        }
    }

    /// The same, when a container has gone; without a guest there is nothing to treat.
    fn treat_vmm_again(&self) {
        let guest = match &*self.0.progress.borrow() {
            Progress::Ready(guest) => guest.clone(),
            _ => return,
        };
        self.treat_vmm(&guest);
    }

    async fn create_in_guest(
        &self,
        guest: &Guest,
        mut request: api::CreateContainerRequest,
        stdio: Stdio,
        acquired: &mut Acquired,
    ) -> Result<(u32, Copies), SandboxError> {
        let id = request.container_id.clone();
        let (message, copies) = stdio
            .attach(|| guest.streams.open())
            .map_err(|error| SandboxError::host(&id, "open stdio streams", error))?;
        request.stdio = Some(message).into();
        let start = Instant::now();
        acquired.in_guest = true;
        failpoint::reach(&self.0.config.run_dir, "create.call").await;
        let reply = guest
            .client
            .create_container(&request)
            .await
            .map_err(|source| SandboxError::Guest { id: id.clone(), source })?;
        self.0.timeline.host("container", &id, start);
        failpoint::reach(&self.0.config.run_dir, "create.made").await;
        self.note_phases(&id, &reply.phases);
        self.note_first_byte(id, copies.first_byte());
        Ok((reply.pid, copies))
    }

    /// A failed creation's error, which says so if an image of it turns out to be damaged.
    async fn blame(&self, error: SandboxError, acquired: &Acquired) -> SandboxError {
        let SandboxError::Guest { id, source: source @ GuestError::Refused { .. } } = &error else {
            return error;
        };
        let Ok(guest) = self.guest().await else { return error };
        // The guest's word of it comes beside its answer.
        tokio::time::sleep(DAMAGE_TOLD).await;
        if acquired.slots.iter().any(|slot| guest.disks.is_damaged(*slot)) {
            let reason = format!("{source}: its image is damaged on this node, see the shim's log");
            return SandboxError::Host { id: id.clone(), what: "make the container", reason };
        }
        error
    }

    /// Notes when the container's first output arrives; nothing if it never has any.
    fn note_first_byte(&self, id: String, first_byte: impl Future<Output = bool> + Send + 'static) {
        let inner = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            if first_byte.await
                && let Some(inner) = inner.upgrade()
            {
                inner.timeline.mark("first byte", &id);
                inner.timeline.write(&Handle(inner.clone()).directory());
            }
        });
    }

    /// Adds what the guest measured.
    pub(super) fn note_phases(&self, container: &str, phases: &[api::Phase]) {
        let steps = phases
            .iter()
            .map(|phase| (phase.name.as_str(), Duration::from_nanos(phase.nanoseconds)));
        self.0.timeline.guest(container, steps);
    }

    /// Gives back what a container held. Failures are logged: with a dead guest they are normal.
    async fn release(&self, id: &str, acquired: Acquired) {
        let Ok(guest) = self.guest().await else { return };
        if acquired.in_guest {
            let request = api::ProcessRequest { container_id: id.to_owned(), ..Default::default() };
            match guest.client.delete(&request).await {
                Err(error) if !error.is_not_found() => {
                    tracing::warn!(container = id, %error, "container not deleted in the guest");
                }
                _ => {}
            }
        }
        for volume in &acquired.direct {
            self.0.direct.release(&guest, volume).await;
        }
        for slot in acquired.slots {
            guest.disks.release(guest.vm.as_ref(), slot).await;
        }
    }

    /// Deletes a stopped (or never started) process, or container with everything it held.
    ///
    /// # Errors
    /// It runs, or is not there.
    pub async fn delete(&self, id: &str, exec: Option<&str>) -> Result<Deleted, SandboxError> {
        let deleted = match exec {
            Some(exec) => self.delete_exec(id, exec).await?,
            None if self.is_pause(id) => self.delete_pause(id).await?,
            None => self.delete_container(id).await?,
        };
        if exec.is_none() {
            self.emit(SandboxEvent::Deleted { id: id.to_owned(), deleted });
        }
        let last = {
            let table = self.table();
            table.leaving && table.is_empty()
        };
        if last {
            let handle = self.clone();
            tokio::spawn(async move { handle.leave().await });
        }
        Ok(deleted)
    }

    async fn delete_container(&self, id: &str) -> Result<Deleted, SandboxError> {
        let not_found = || self.not_found("container", id);
        let acquired = {
            let mut table = self.table();
            let container = table.containers.get_mut(id).ok_or_else(not_found)?;
            state::check(container.process.status(), Operation::Delete)
                .map_err(|refusal| SandboxError::State { id: id.to_owned(), refusal })?;
            if std::mem::replace(&mut container.deleting, true) {
                return Err(not_found());
            }
            container.acquired.clone()
        };
        failpoint::reach(&self.0.config.run_dir, "delete.call").await;
        self.release(id, acquired).await;
        failpoint::reach(&self.0.config.run_dir, "delete.released").await;
        self.end_execs(id).await;
        let container = self.table().containers.remove(id).ok_or_else(not_found)?;
        Usage::forget(&self.directory(), id);
        self.treat_vmm_again();
        Ok(deleted(&container.process))
    }

    /// Sees to it that every exec of a container that the guest has deleted, and with it killed, has
    /// an end: the guest's word for it, if that comes soon.
    async fn end_execs(&self, id: &str) {
        let execs: Vec<_> = {
            let table = self.table();
            let execs = table.containers.get(id).map(|container| &container.execs);
            execs.into_iter().flatten().map(|(id, it)| (id.clone(), it.process.ended())).collect()
        };
        let deadline = Instant::now() + LAST_EXITS;
        for (exec, mut ended) in execs {
            let soon = tokio::time::timeout_at(deadline.into(), ended.wait_for(Option::is_some));
            if soon.await.is_err() {
                self.ended(id, Some(&exec), Exit { status: KILLED, at: SystemTime::now() });
            }
        }
    }

    async fn delete_exec(&self, id: &str, exec_id: &str) -> Result<Deleted, SandboxError> {
        let exec = {
            let mut table = self.table();
            let container =
                table.containers.get_mut(id).ok_or_else(|| self.not_found("container", id))?;
            let name = format!("{id}/{exec_id}");
            let exec = container.execs.get(exec_id).ok_or_else(|| self.not_found("exec", &name))?;
            state::check(exec.process.status(), Operation::Delete)
                .map_err(|refusal| SandboxError::State { id: name.clone(), refusal })?;
            container.execs.remove(exec_id).ok_or_else(|| self.not_found("exec", &name))?
        };
        if let Ok(guest) = self.guest().await {
            let request = api::ProcessRequest {
                container_id: id.to_owned(),
                exec_id: exec_id.to_owned(),
                ..Default::default()
            };
            match guest.client.delete(&request).await {
                Err(error) if !error.is_not_found() => {
                    tracing::warn!(container = id, exec = exec_id, %error, "exec not deleted");
                }
                _ => {}
            }
        }
        Ok(deleted(&exec.process))
    }
}

/// Attaches an image for a container; from then on it is to be released.
async fn attach(
    guest: &Guest,
    id: &str,
    image: Image,
    acquired: &mut Acquired,
) -> Result<api::Disk, SandboxError> {
    let (file_system, writable) = (image.file_system.name().to_owned(), image.writable);
    let verity = image.verity.as_ref().map(api::Verity::from).into();
    let attached = guest.disks.attach(guest.vm.as_ref(), image).await;
    let slot = attached.map_err(|error| SandboxError::host(id, "attach an image", error))?;
    acquired.slots.push(slot);
    Ok(api::Disk { slot, file_system, writable, verity, ..Default::default() })
}

fn image_name(spec: &Spec) -> Option<&String> {
    spec.annotations().as_ref()?.get("io.kubernetes.cri.image-name")
}

/// Gives a block device of the host to a container.
async fn give(
    guest: &Guest,
    id: &str,
    device: &plan::BlockDevice,
    acquired: &mut Acquired,
) -> Result<api::BlockDevice, SandboxError> {
    let (major, minor) = device.numbers;
    let (numbers, writable) = (device.numbers, device.writable);
    let opened = patience::within(PATIENCE, move || block::open(numbers, writable)).await;
    let (file, bytes) = opened.and_then(|opened| opened).map_err(|error| {
        SandboxError::host(id, "open a block volume", format!("device {major}:{minor}: {error}"))
    })?;
    let image = Image {
        disk: file.into(),
        verity: None,
        description: None,
        file_system: FileSystem::None,
        writable: device.writable,
        key: format!("device {major}:{minor}"),
        lock: None,
    };
    let slot = attach(guest, id, image, acquired).await?.slot;
    Ok(api::BlockDevice { slot, bytes, major, minor, ..Default::default() })
}

/// How an error names the mount whose source this is.
fn mount_of(spec: &Spec, source: &Path) -> String {
    let mut mounts = spec.mounts().iter().flatten();
    let mount = mounts.find(|mount| mount.source().as_deref() == Some(source));
    let destination = mount.map_or(Path::new("?"), |mount| mount.destination());
    format!("mount {} (from {})", destination.display(), source.display())
}

/// What a path of the host is, links followed.
fn look(path: &Path) -> plan::Kind {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() => plan::Kind::File,
        Ok(meta) if meta.is_dir() => plan::Kind::Directory,
        Ok(_) => plan::Kind::Special,
        Err(_) => plan::Kind::Missing,
    }
}

/// What is said of a deleted process; one that never ran has no exit of its own.
pub(super) fn deleted(process: &Process) -> Deleted {
    let exit = process.exit();
    let never_ran = process.status() == Status::Created;
    Deleted {
        pid: process.pid(),
        status: exit.map_or(if never_ran { 0 } else { KILLED }, |exit| exit.status),
        exited_at: exit.map_or_else(SystemTime::now, |exit| exit.at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_mount_that_does_not_answer() {
        let mounts = serde_json::json!([
            {"destination": "/a", "source": "/one"}, {"destination": "/b", "source": "/two"}
        ]);
        let text = serde_json::json!({"ociVersion": "1.1.0", "mounts": mounts});
        let spec: Spec = serde_json::from_value(text).unwrap();
        assert_eq!(mount_of(&spec, Path::new("/two")), "mount /b (from /two)");
        assert_eq!(mount_of(&spec, Path::new("/three")), "mount ? (from /three)");
    }
}

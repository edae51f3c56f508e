//! What the sandbox does with containers: each call from its checked request to its effect.
//!
//! A call that has begun to change things is run as a task of its own, so that a host that gives up
//! waiting does not leave a container half made: the task goes on to one of its ends.

use std::path::Path;
use std::sync::Arc;

use joey_protocol::ids::{ContainerId, ExecId, REHEARSAL, VolumeId};
use joey_protocol::{api, limits};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Process as OciProcess, Spec};
use serde_json::from_slice;

use crate::apart::apart;
use crate::boot::CGROUP_ROOT;
use crate::container::{Container, CreateRequest, Error as EngineError, Kind, usage};
use crate::containers::{ContainerEntry, Process};
use crate::phases::Phases;
use crate::sandbox::{Sandbox, SandboxError};
use crate::storage::{self, SlotClaim};
use crate::{block_devices, clock, streams, volumes};

/// Longest signal number of Linux.
const SIGNAL_MAX: u32 = 64;

fn engine(error: EngineError) -> SandboxError {
    SandboxError::Engine(error)
}

impl Sandbox {
    /// Runs a call to its end even when its caller is gone.
    pub(crate) async fn to_the_end<T: Send + 'static>(
        self: &Arc<Self>,
        call: impl Future<Output = Result<T, SandboxError>> + Send + 'static,
    ) -> Result<T, SandboxError> {
        tokio::spawn(call).await.unwrap_or(Err(SandboxError::Cancelled))
    }

    /// Makes a container, up to its command.
    pub(crate) async fn create_container(
        self: Arc<Self>,
        mut request: api::CreateContainerRequest,
    ) -> Result<api::CreateContainerResponse, SandboxError> {
        let id = ContainerId::new(&request.container_id)?;
        self.require_stage_of(id.as_str())?;
        let mut phases = Phases::begin();
        let mut spec: Spec = parse_spec(&request.spec)?;
        phases.done("container-specification");
        let mut json = std::mem::take(&mut request.spec);
        let rootfs = request.rootfs.get_or_default();
        let mut plan = storage::plan(rootfs, &request.volumes)?;
        let reservation = self.containers.reserve(id.as_str())?;
        let volumes = request.volumes.iter().filter_map(|volume| volume.disk.as_ref());
        let raw = |device: &api::BlockDevice| api::Disk { slot: device.slot, ..Default::default() };
        let devices: Vec<_> = request.devices.iter().map(raw).collect();
        let disks: Vec<_> = rootfs.layers.iter().chain(volumes).chain(&devices).collect();
        let slots = SlotClaim::take(&self.slots, &disks)?;
        let devices_in_use = block_devices::name(&mut spec, &request.devices, &self.devices)?;
        phases.done("container-disks");
        if !devices.is_empty() {
            json = serde_json::to_vec(&spec).unwrap_or_default();
        }
        let writable = plan.layers.iter().any(|disk| disk.writable);
        let wanted = !rootfs.read_only || volumes::has_scratch(&spec);
        let layer = (wanted && !writable).then(|| self.disk.layer()).transpose()?;
        let path = layer.as_ref().map(|layer| layer.path().to_owned());
        (plan.writable, plan.scratch) = if rootfs.read_only { (None, path) } else { (path, None) };
        let shared_pid = if shares_pid(&spec) { Some(self.pod_pid()?) } else { None };
        let (ends, io) = streams::prepare(&self.mux, request.stdio.get_or_default())?;
        phases.done("container-layer");
        let mut container = Container::create(CreateRequest {
            id: id.as_str(),
            cgroup_root: Path::new(CGROUP_ROOT),
            spec,
            json: &json,
            rootfs: serde_json::to_string(&plan).unwrap_or_default(),
            spares: &self.spares,
            io,
            shared_pid: shared_pid.as_ref(),
        })
        .await
        .map_err(engine)?;
        let child = self.reaper.adopted(Pid::from_raw(container.pid));
        phases.add(&container.phases);
        let pumps = ends.run(std::mem::take(&mut container.io))?;
        let pid = child.pid().as_raw().unsigned_abs();
        let init = Process::new(child, pumps);
        let events = self.events.clone();
        reservation.keep(ContainerEntry::watched(
            id.as_str(),
            container,
            init,
            (slots, devices_in_use, layer),
            shared_pid.is_some(),
            events,
        ));
        Ok(api::CreateContainerResponse { pid, phases: phases.end(), ..Default::default() })
    }

    /// Prepares a further process.
    pub(crate) async fn create_exec(
        self: Arc<Self>,
        request: api::CreateExecRequest,
    ) -> Result<(), SandboxError> {
        let container = self.containers.get(&request.container_id)?;
        let id = ExecId::new(&request.exec_id)?;
        let process: OciProcess = parse("process", &request.process)?;
        container.reserve_exec(id.as_str())?;
        let made = self.make_exec(&container, &process, request.stdio.get_or_default()).await;
        let (made, result) = match made {
            Ok(made) => (Some(made), Ok(())),
            Err(error) => (None, Err(error)),
        };
        container.keep_exec(id.as_str(), made);
        result
    }

    async fn make_exec(
        &self,
        container: &ContainerEntry,
        process: &OciProcess,
        stdio: &api::Stdio,
    ) -> Result<(crate::container::Exec, Process), SandboxError> {
        let (ends, io) = streams::prepare(&self.mux, stdio)?;
        let mut exec = container.engine.exec(process, io).await.map_err(engine)?;
        let child = self.reaper.adopted(Pid::from_raw(exec.pid));
        let pumps = ends.run(std::mem::take(&mut exec.io))?;
        Ok((exec, Process::new(child, pumps)))
    }

    /// Runs what was created.
    pub(crate) async fn start_process(
        self: Arc<Self>,
        request: api::ProcessRequest,
    ) -> Result<api::StartResponse, SandboxError> {
        let container = self.containers.get(&request.container_id)?;
        let mut phases = Phases::begin();
        let pid = if request.exec_id.is_empty() {
            container.engine.start().await.map_err(engine)?;
            container.init.child.pid()
        } else {
            let exec = container.exec(&request.exec_id)?;
            exec.start().await.map_err(engine)?;
            exec.process.child.pid()
        };
        phases.done("exec");
        let pid = pid.as_raw().unsigned_abs();
        Ok(api::StartResponse { pid, phases: phases.end(), ..Default::default() })
    }

    /// Sends a signal to one process or to all of a container.
    pub(crate) async fn signal(&self, request: &api::SignalRequest) -> Result<(), SandboxError> {
        let container = self.containers.get(&request.container_id)?;
        if request.signal > SIGNAL_MAX {
            return Err(SandboxError::Invalid(format!("there is no signal {}", request.signal)));
        }
        let number = request.signal as i32;
        if request.all {
            let signal = Signal::try_from(number).map_err(|_| {
                SandboxError::Invalid(format!("signal {number} cannot go to a whole container"))
            })?;
            return container.engine.kill_all(signal).map_err(engine);
        }
        if request.exec_id.is_empty() {
            container.init.signal(number)
        } else {
            container.exec(&request.exec_id)?.process.signal(number)
        }
    }

    /// Sets the size of a terminal.
    pub(crate) fn resize(&self, request: &api::ResizePtyRequest) -> Result<(), SandboxError> {
        let container = self.containers.get(&request.container_id)?;
        if request.exec_id.is_empty() {
            container.init.resize(request.width, request.height)
        } else {
            container.exec(&request.exec_id)?.process.resize(request.width, request.height)
        }
    }

    /// Forgets an exec, or removes a container with all it has.
    pub(crate) async fn delete(
        self: Arc<Self>,
        request: api::ProcessRequest,
    ) -> Result<(), SandboxError> {
        if !request.exec_id.is_empty() {
            return self.containers.get(&request.container_id)?.delete_exec(&request.exec_id);
        }
        let (entry, reservation) = self.containers.take(&request.container_id)?;
        if let Err(error) = entry.engine.destroy().await {
            reservation.keep(entry);
            return Err(engine(error));
        }
        // The mounts go with the last process; the disks are free before the name is.
        entry.init.child.wait().await;
        entry.release();
        drop(reservation);
        if request.container_id == REHEARSAL {
            self.volumes.forget_file(&VolumeId::new(REHEARSAL)?)?;
            storage::vacate(&self.slots)?;
            // In place of the one it took.
            self.spares.fork(Path::new(CGROUP_ROOT), 1).map_err(engine)?;
        }
        Ok(())
    }

    /// Changes a container's limits.
    pub(crate) async fn update(
        self: Arc<Self>,
        request: api::UpdateRequest,
    ) -> Result<(), SandboxError> {
        let resources: LinuxResources = parse("resources", &request.resources)?;
        let container = self.containers.get(&request.container_id)?;
        // A lower limit of memory takes until the kernel has got so much back.
        let update = || {
            let updated = container.engine.update(&resources);
            updated.map_err(|error| (error.kind as u8, error.to_string()))
        };
        let updated: Result<(), (u8, String)> = apart(&self.reaper, update)
            .await
            .map_err(|error| engine(EngineError::failed(format!("changing limits: {error}"))))?;
        updated.map_err(|(kind, text)| engine(EngineError::new(Kind::from_byte(kind), text)))
    }

    /// Moves the wall clock, once it is a sandbox's.
    pub(crate) fn adjust_clock(&self, nanoseconds: i64) -> Result<i64, SandboxError> {
        self.require_started()?;
        clock::adjust(nanoseconds).map_err(SandboxError::Clock)
    }

    /// Stops a container's processes, or lets them go on.
    pub(crate) async fn freeze(
        self: Arc<Self>,
        request: api::ContainerRequest,
        frozen: bool,
    ) -> Result<(), SandboxError> {
        let container = self.containers.get(&request.container_id)?;
        container.engine.freeze(frozen).await.map_err(engine)
    }

    /// What a container uses, or all of them together.
    pub(crate) async fn stats(
        &self,
        request: &api::ContainerRequest,
    ) -> Result<api::StatsResponse, SandboxError> {
        if request.container_id.is_empty() {
            return usage(Path::new(CGROUP_ROOT)).map_err(engine);
        }
        let container = self.containers.get(&request.container_id)?;
        let mut stats = container.engine.stats().map_err(engine)?;
        (stats.layer_bytes, stats.layer_inodes) = container.layer_usage();
        (stats.volumes_bytes, stats.volumes_inodes) = self.disk.volumes_usage();
        Ok(stats)
    }

    /// A container's processes.
    pub(crate) async fn processes(
        &self,
        request: &api::ContainerRequest,
    ) -> Result<api::ProcessesResponse, SandboxError> {
        let container = self.containers.get(&request.container_id)?;
        let pids = container.engine.pids().map_err(engine)?;
        let processes = pids
            .into_iter()
            .take(limits::MAX_PROCESSES)
            .map(|pid| api::ProcessInfo {
                pid,
                exec_id: container.exec_of(pid),
                ..Default::default()
            })
            .collect();
        Ok(api::ProcessesResponse { processes, ..Default::default() })
    }
}

fn parse<T: serde::de::DeserializeOwned>(what: &str, json: &[u8]) -> Result<T, SandboxError> {
    from_slice(json).map_err(|error| SandboxError::Invalid(format!("the {what}: {error}")))
}

/// Whether a container joins the pod's pid namespace: its own namespace list names one by path.
fn parse_spec(json: &[u8]) -> Result<Spec, SandboxError> {
    if json.len() > limits::MAX_SPEC {
        return Err(SandboxError::Invalid(format!(
            "the specification has {} bytes, at most {} are allowed",
            json.len(),
            limits::MAX_SPEC
        )));
    }
    parse("specification", json)
}

fn shares_pid(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.is_some_and(|namespaces| {
        namespaces.iter().any(|namespace| {
            namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_some()
        })
    })
}

//! The single owner of what the guest is: a clone without identity, then one sandbox.
//!
//! ```text
//! Fresh --StartSandbox--> Started        (containers, volumes)
//!   \--any error--------> Failed         (nothing is served; the host ends the machine)
//! ```
//!
//! Invariant: nothing of a tenant's container exists before `Started`, and nothing of the rehearsal
//! after it. The lock guards only this state and is
//! never held across an await.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use joey_protocol::ids::{IdError, REHEARSAL, VolumeId};
use joey_protocol::mux::Mux;
use joey_protocol::{api, handshake, limits};
use protobuf::MessageField;
use ttrpc::Code;

use crate::block_devices;
use crate::connections;
use crate::container::{Kind, Spares};
use crate::containers::Containers;
use crate::disk_volumes::{DiskVolumeError, DiskVolumes};
use crate::events::Events;
use crate::forward::{self, ForwardError};
use crate::identity::{self, IdentityError, Prepared};
use crate::log::warning;
use crate::phases::Phases;
use crate::pod_disk::{self, PodDisk};
use crate::pod_pid::PodPidNamespace;
use crate::programs::{Programs, ProgramsError};
use crate::reap::Reaper;
use crate::rootfs::SOURCES;
use crate::services::{self, ServicesError};
use crate::share::{self, ShareError};
use crate::storage::{self, SharedSlots, StorageError};
use crate::streams::StdioError;
use crate::volumes::{VOLUMES, VolumeError, Volumes};

/// When the rest of the identity is seen to.
const LATER: Duration = Duration::from_millis(300);

/// A call that could not be done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    /// The host and the guest image do not fit.
    #[error(transparent)]
    Version(#[from] handshake::VersionMismatch),
    /// Something was asked before StartSandbox succeeded.
    #[error("the sandbox has no identity yet: StartSandbox must succeed first")]
    NotStarted,
    /// StartSandbox came again.
    #[error("the sandbox was started before; a clone becomes one sandbox, once")]
    StartedBefore,
    /// A rehearsal would be part of a pod.
    #[error("container {REHEARSAL:?} belongs before the sandbox's start, and must be gone by then")]
    Rehearsing,
    /// The clone could not become the sandbox.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The containers' connections cannot be what the pod wants.
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    /// A name is not one.
    #[error(transparent)]
    Name(#[from] IdError),
    /// A file could not be put or read.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// A port cannot be reached.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// Services cannot be changed.
    #[error(transparent)]
    Services(#[from] ServicesError),
    /// Files of the host are not shared.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A disk is not mounted, or not unmounted.
    #[error(transparent)]
    DiskVolume(#[from] DiskVolumeError),
    /// The request cannot be followed.
    #[error("{0}")]
    Invalid(String),
    /// There is no such thing.
    #[error("there is no {kind} {id:?} in this sandbox")]
    Unknown {
        /// What was looked for.
        kind: &'static str,
        /// Its name.
        id: String,
    },
    /// The name is taken.
    #[error("there is a {kind} {id:?} in this sandbox already, or it is being removed")]
    Exists {
        /// What was to be made.
        kind: &'static str,
        /// Its name.
        id: String,
    },
    /// A signal came too late.
    #[error("process {0} has ended")]
    Ended(i32),
    /// A signal could not be sent.
    #[error("sending signal {signal} to process {pid}: {error}")]
    Signal {
        /// The process.
        pid: i32,
        /// The signal.
        signal: i32,
        /// The kernel's answer.
        error: nix::Error,
    },
    /// A terminal's size could not be set.
    #[error("resizing the process's terminal: {0}")]
    Resize(io::Error),
    /// The clock could not be moved.
    #[error("moving the guest's clock: {0}")]
    Clock(io::Error),
    /// The pod's pid namespace could not be made.
    #[error("the pod's shared pid namespace: {0}")]
    PodPid(io::Error),
    /// The container cannot have its root.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The process cannot have its stdio.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The engine could not do it.
    #[error(transparent)]
    Engine(crate::container::Error),
    /// The agent ends.
    #[error("the call was cut off")]
    Cancelled,
}

impl SandboxError {
    /// The code that says to the host what kind of fault it is.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Version(_) | Self::NotStarted | Self::StartedBefore | Self::Rehearsing => {
                Code::FAILED_PRECONDITION
            }
            Self::Services(error) if error.is_callers() => Code::INVALID_ARGUMENT,
            Self::Identity(error) if error.is_callers() => Code::INVALID_ARGUMENT,
            Self::Programs(error) if error.is_callers() => Code::INVALID_ARGUMENT,
            Self::Name(_) | Self::Volume(VolumeError::Invalid { .. }) => Code::INVALID_ARGUMENT,
            Self::Invalid(_) | Self::Storage(StorageError::Invalid(_)) => Code::INVALID_ARGUMENT,
            Self::Unknown { .. } | Self::Ended(_) => Code::NOT_FOUND,
            Self::Exists { .. } => Code::ALREADY_EXISTS,
            Self::Storage(StorageError::Busy { .. }) => Code::FAILED_PRECONDITION,
            Self::Resize(error) if error.kind() == io::ErrorKind::InvalidInput => {
                Code::FAILED_PRECONDITION
            }
            Self::Stdio(StdioError::File(_)) | Self::Share(ShareError::Mount { .. }) => {
                Code::INTERNAL
            }
            Self::DiskVolume(DiskVolumeError::Unknown { .. }) => Code::UNIMPLEMENTED,
            Self::Forward(ForwardError::Connect { .. }) => Code::UNAVAILABLE,
            Self::Share(_) | Self::Forward(_) => Code::INVALID_ARGUMENT,
            Self::Stdio(_) => Code::INVALID_ARGUMENT,
            Self::Engine(error) => match error.kind {
                Kind::Invalid => Code::INVALID_ARGUMENT,
                Kind::Unsupported => Code::UNIMPLEMENTED,
                Kind::NotRunning => Code::FAILED_PRECONDITION,
                Kind::Failed => Code::INTERNAL,
            },
            Self::Identity(_)
            | Self::Programs(_)
            | Self::Clock(_)
            | Self::Volume(_)
            | Self::Signal { .. }
            | Self::Resize(_)
            | Self::PodPid(_)
            | Self::Storage(_)
            | Self::DiskVolume(_)
            | Self::Services(_)
            | Self::Cancelled => Code::INTERNAL,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Fresh,
    Started,
    Failed,
}

/// The sandbox.
pub(crate) struct Sandbox {
    phase: Mutex<Phase>,
    /// Kept to the end: closing what was prepared would cost each clone more than it frees.
    prepared: Mutex<Prepared>,
    pod_pid: Mutex<Option<PodPidNamespace>>,
    /// What looks at the containers' sockets; none in tests.
    pub(crate) programs: Option<Programs>,
    /// Where what containers write goes.
    pub(crate) disk: PodDisk,
    /// Small files from the host.
    pub(crate) volumes: Volumes,
    /// First processes of containers to come.
    pub(crate) spares: Spares,
    /// The containers.
    pub(crate) containers: Containers,
    /// The disks in use.
    pub(crate) slots: SharedSlots,
    /// Those of them that are mounted for all containers.
    pub(crate) disk_volumes: DiskVolumes,
    /// Those of them that are containers' devices.
    pub(crate) devices: block_devices::Users,
    /// The channel, for stdio.
    pub(crate) mux: Mux,
    /// The sole waiter.
    pub(crate) reaper: Reaper,
    /// What the host is told.
    pub(crate) events: Events,
}

impl Sandbox {
    /// A clone that is nobody yet.
    pub(crate) fn new(
        prepared: Prepared,
        disk: PodDisk,
        programs: Option<Programs>,
        mux: Mux,
        reaper: Reaper,
        events: Events,
    ) -> Self {
        Self {
            phase: Mutex::new(Phase::Fresh),
            prepared: Mutex::new(prepared),
            pod_pid: Mutex::default(),
            disk,
            programs,
            volumes: Volumes::new(VOLUMES, pod_disk::VOLUMES),
            spares: Spares::new(SOURCES),
            containers: Containers::default(),
            slots: SharedSlots::default(),
            disk_volumes: DiskVolumes::default(),
            devices: block_devices::Users::default(),
            mux,
            reaper,
            events,
        }
    }

    /// The pod's shared pid namespace, made when first asked for, and anew when its init was killed.
    pub(crate) fn pod_pid(&self) -> Result<OwnedFd, SandboxError> {
        let mut pod = self.pod_pid.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(descriptor) = pod.as_ref().and_then(PodPidNamespace::descriptor) {
            return descriptor.map_err(SandboxError::PodPid);
        }
        let made = PodPidNamespace::new(&self.reaper).map_err(SandboxError::PodPid)?;
        let descriptor = made.descriptor();
        *pod = Some(made);
        descriptor.unwrap_or(Err(io::ErrorKind::Interrupted.into())).map_err(SandboxError::PodPid)
    }

    /// Who the agent is; changes nothing.
    pub(crate) fn hello(
        &self,
        request: &api::HelloRequest,
    ) -> Result<api::HelloResponse, SandboxError> {
        handshake::check("host", request.protocol_version)?;
        let release = nix::sys::utsname::uname()
            .map(|names| names.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(api::HelloResponse {
            protocol_version: limits::PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: release,
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_bytes: memory_bytes(),
            disk_slots: storage::count_slots(),
            ..Default::default()
        })
    }

    /// Makes this clone the sandbox; once.
    pub(crate) fn start(
        self: &Arc<Self>,
        request: api::StartSandboxRequest,
    ) -> Result<api::StartSandboxResponse, SandboxError> {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase != Phase::Fresh {
            return Err(SandboxError::StartedBefore);
        }
        if !self.containers.is_empty() {
            *phase = Phase::Failed;
            return Err(SandboxError::Rehearsing);
        }
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let assumed = self.assume(&mut prepared, &request).and_then(|mut response| {
            response.boot_id = identity::boot_id()?;
            Ok(response)
        });
        match assumed {
            Ok(response) => {
                *phase = Phase::Started;
                if request.mesh.observe
                    && let Some(events) = self.programs.as_ref().and_then(Programs::take_events)
                {
                    let host = self.events.connections();
                    tokio::spawn(connections::tell(events, Arc::clone(self), host));
                }
                tokio::spawn(Arc::clone(self).complete(request.network));
                Ok(response)
            }
            Err(error) => {
                *phase = Phase::Failed;
                warning!("sandbox {} does not start: {error}", request.sandbox_id);
                Err(error)
            }
        }
    }

    /// Gives the machine its identity, and the programs what the pod wants of them.
    fn assume(
        &self,
        prepared: &mut Prepared,
        request: &api::StartSandboxRequest,
    ) -> Result<api::StartSandboxResponse, SandboxError> {
        let mut response = prepared.assume(request)?;
        let mut phases = Phases::begin();
        if self.programs.as_ref().map_or(Ok(false), |programs| programs.apply(request))? {
            phases.done("mesh");
        }
        response.phases.extend(phases.end());
        Ok(response)
    }

    /// Goes through [`Self::start`] and back.
    pub(crate) fn rehearse(
        &self,
        request: &api::StartSandboxRequest,
    ) -> Result<api::StartSandboxResponse, SandboxError> {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase != Phase::Fresh {
            return Err(SandboxError::StartedBefore);
        }
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let done = self.assume(&mut prepared, request).and_then(|done| {
            prepared.resign(request)?;
            self.programs.as_ref().map_or(Ok(()), Programs::clear)?;
            Ok(done)
        });
        if done.is_err() {
            *phase = Phase::Failed;
        }
        done
    }

    /// Does what can wait until the pod has started.
    async fn complete(self: Arc<Self>, network: MessageField<api::Network>) {
        tokio::time::sleep(LATER).await;
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = prepared.complete(&network) {
            warning!("after the sandbox's start: {error}");
        }
    }

    /// Refuses whatever comes before the identity.
    pub(crate) fn require_started(&self) -> Result<(), SandboxError> {
        match *self.phase.lock().unwrap_or_else(PoisonError::into_inner) {
            Phase::Started => Ok(()),
            Phase::Fresh | Phase::Failed => Err(SandboxError::NotStarted),
        }
    }

    /// Refuses containers and volumes before the identity, but for the rehearsal's, and those after it.
    pub(crate) fn require_stage_of(&self, name: &str) -> Result<(), SandboxError> {
        match (*self.phase.lock().unwrap_or_else(PoisonError::into_inner), name) {
            (Phase::Fresh, REHEARSAL) => Ok(()),
            (Phase::Started, REHEARSAL) => Err(SandboxError::Rehearsing),
            (Phase::Started, _) => Ok(()),
            (Phase::Fresh | Phase::Failed, _) => Err(SandboxError::NotStarted),
        }
    }

    /// Opens the pod's disk: in a machine that is nobody's too, once it has rehearsed an identity and with it
    /// has entropy of its own.
    pub(crate) async fn open_disk(
        &self,
        request: &api::OpenDiskRequest,
    ) -> Result<api::OpenDiskResponse, SandboxError> {
        if !self.containers.is_empty() {
            return Err(SandboxError::Invalid("the pod's disk comes before containers".to_owned()));
        }
        if !self.prepared.lock().unwrap_or_else(PoisonError::into_inner).is_unique() {
            return Err(SandboxError::NotStarted);
        }
        let phases = self.disk.open(request.bytes).await?;
        Ok(api::OpenDiskResponse { phases, ..Default::default() })
    }

    /// Goes through [`Self::open_disk`] and back, under a key that is no secret. What is unique here the
    /// machine forgets: it is about to be multiplied.
    pub(crate) async fn rehearse_disk(
        &self,
        request: &api::OpenDiskRequest,
    ) -> Result<(), SandboxError> {
        if *self.phase.lock().unwrap_or_else(PoisonError::into_inner) != Phase::Fresh {
            return Err(SandboxError::Rehearsing);
        }
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).multiply();
        Ok(self.disk.rehearse(request.bytes).await?)
    }

    /// Changes the table of services.
    pub(crate) fn update_services(
        &self,
        request: &api::UpdateServicesRequest,
    ) -> Result<(), SandboxError> {
        self.require_started()?;
        Ok(services::update(self.programs.as_ref(), request)?)
    }

    /// Mounts files of the host.
    pub(crate) fn share_files(&self, request: &api::ShareFilesRequest) -> Result<(), SandboxError> {
        self.require_started()?;
        let id = VolumeId::new(&request.volume_id)?;
        Ok(share::mount_share(&self.mux, &self.reaper, &id, request.stream)?)
    }

    /// Connects to a port of the pod.
    pub(crate) async fn forward(&self, request: &api::ForwardRequest) -> Result<(), SandboxError> {
        self.require_started()?;
        Ok(forward::forward(&self.mux, request.stream, request.port).await?)
    }

    /// Puts files into a volume.
    pub(crate) fn copy_in(&self, request: &api::CopyInRequest) -> Result<(), SandboxError> {
        self.require_stage_of(&request.volume_id)?;
        let id = VolumeId::new(&request.volume_id)?;
        let medium = request.medium.enum_value_or_default();
        let new = self.volumes.place(&id, medium, request.size_bytes)?;
        if request.if_missing && !new {
            return Ok(());
        }
        if new && medium == api::Medium::DISK {
            let directory = Path::new(pod_disk::VOLUMES).join(id.as_str());
            self.disk.volume(&directory, request.size_bytes)?;
        }
        for entry in &request.entries {
            self.volumes.put(&id, entry)?;
        }
        Ok(())
    }

    /// Reads the beginning of a volume's file.
    pub(crate) fn read_file(
        &self,
        request: &api::ReadFileRequest,
    ) -> Result<Vec<u8>, SandboxError> {
        self.require_started()?;
        let id = VolumeId::new(&request.volume_id)?;
        Ok(self.volumes.read(&id, &request.path, request.limit)?)
    }
}

/// Memory of the guest that the kernel manages.
pub(crate) fn memory_bytes() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(0, |info| info.ram_total())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox() -> Sandbox {
        let (mux, _driver) = Mux::new(tokio::io::empty());
        let disk = PodDisk::new(Vec::new(), Reaper::default());
        Sandbox::new(Prepared::nothing(), disk, None, mux, Reaper::default(), Events::new().0)
    }

    #[tokio::test]
    async fn nothing_is_served_before_the_identity() {
        let sandbox = Arc::new(sandbox());
        let error = sandbox.copy_in(&api::CopyInRequest::new()).unwrap_err();
        assert_eq!(error.code(), Code::FAILED_PRECONDITION);
        // A request without entropy: refused before anything of this machine is touched.
        let request = api::StartSandboxRequest {
            protocol_version: limits::PROTOCOL_VERSION,
            ..Default::default()
        };
        assert_eq!(sandbox.start(request.clone()).unwrap_err().code(), Code::INVALID_ARGUMENT);
        let error = sandbox.start(request).unwrap_err();
        assert_eq!(error.code(), Code::FAILED_PRECONDITION, "a failed clone stays failed");
        assert!(sandbox.require_started().is_err());
        let error = sandbox.open_disk(&api::OpenDiskRequest::new()).await.unwrap_err();
        assert!(matches!(error, SandboxError::NotStarted), "no key before there is entropy");
    }

    #[test]
    fn only_the_rehearsal_comes_before_the_identity_and_only_there() {
        let sandbox = Arc::new(sandbox());
        sandbox.require_stage_of(REHEARSAL).unwrap();
        assert!(sandbox.require_stage_of("tenant").is_err());
        let reservation = sandbox.containers.reserve(REHEARSAL).unwrap();
        let error = sandbox.start(api::StartSandboxRequest::new()).unwrap_err();
        assert!(matches!(error, SandboxError::Rehearsing), "{error}");
        drop(reservation);
        assert!(sandbox.start(api::StartSandboxRequest::new()).is_err(), "it has failed for good");
        *sandbox.phase.lock().unwrap() = Phase::Started;
        assert!(sandbox.require_stage_of(REHEARSAL).is_err());
        sandbox.require_stage_of("tenant").unwrap();
    }

    #[test]
    fn hello_checks_the_version() {
        let sandbox = sandbox();
        assert!(sandbox.hello(&api::HelloRequest::new()).is_err());
        let request =
            api::HelloRequest { protocol_version: limits::PROTOCOL_VERSION, ..Default::default() };
        assert!(sandbox.hello(&request).unwrap().memory_bytes > 0);
    }
}

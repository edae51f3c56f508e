//! From nothing to a guest with its identity, in phases that can only advance or fail.
//!
//! ```text
//!   Wanted ── plug ──▶ Wired ── launch ──▶ Launched ── identify ──▶ Guest
//!      └───────────────┴─────────────────────┴── failure: teardown, every later request is told why
//! ```
//!
//! Each phase notes what it is about to acquire in the record first, so that the same teardown serves
//! a failed start and a killed shim.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use joey_protocol::api;
use joey_protocol::limits::{ENTROPY_BYTES, MACHINE_ID_BYTES, PROTOCOL_VERSION, deadline};
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::disks::Disks;
use super::pod_disk::PodDiskError;
use super::record::{PodNetwork, ProcessId};
use super::{
    Guest, Handle, LAST_WORDS, Opening, PodDisk, Progress, SandboxError, forward, identity, plan,
    teardown,
};
use crate::config::Config;
use crate::failpoint;
use crate::guest::{GuestChannel, GuestError};
use crate::host::net::{self, Applicant, Wire};
use crate::host::{self, cgroup};
use crate::mesh::{Mesh, MeshError};
use crate::net_limits::NetLimits;
use crate::policy::state::Store;
use crate::policy::tenant;
use crate::services;
use crate::sizing::{self, Sizing};
use crate::standby::{self, Standby};
use crate::vmm::{self, Vm, VmSpec};

/// What the sandbox is to become, from whichever of containerd's APIs tells it.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    /// The pod's network namespace.
    pub(super) netns: Option<PathBuf>,
    /// Whether the pod asks for the host's network: CRI then names no network namespace at all.
    pub(super) host_network: bool,
    /// Whether the pod asks for the host's IPC: there is no IPC namespace for it either.
    pub(super) host_ipc: bool,
    /// The same of processes. Containers do not show it: CRI has them join the sandbox's.
    pub(super) host_pid: bool,
    /// Host name.
    pub(super) hostname: String,
    /// OCI's `cgroupsPath`.
    pub(super) cgroups_path: Option<String>,
    /// Pod-wide sysctls.
    pub(super) sysctls: Vec<(String, String)>,
    /// The sandbox's annotations: sizes and names.
    pub(crate) annotations: HashMap<String, String>,
}

impl Wanted {
    /// Reads the sandbox container's (or a lone container's) specification.
    pub(crate) fn of_spec(spec: &Spec) -> Self {
        let linux = spec.linux().as_ref();
        let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
        let netns = namespaces.and_then(|all| {
            let network = all.iter().find(|n| n.typ() == LinuxNamespaceType::Network)?;
            network.path().clone()
        });
        let isolated = |kind| namespaces.is_some_and(|all| all.iter().any(|n| n.typ() == kind));
        Self {
            netns,
            host_network: !isolated(LinuxNamespaceType::Network),
            host_ipc: !isolated(LinuxNamespaceType::Ipc),
            host_pid: !isolated(LinuxNamespaceType::Pid),
            hostname: host::pod_name(spec.hostname().clone()),
            cgroups_path: linux
                .and_then(|linux| linux.cgroups_path().as_ref())
                .map(|path| path.to_string_lossy().into_owned()),
            sysctls: plan::sandbox_sysctls(spec),
            annotations: spec.annotations().clone().unwrap_or_default(),
        }
    }

    fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str)
    }

    /// Namespace and name, where CRI gave them.
    fn pod(&self) -> Option<(String, String)> {
        let part = |key: &str| self.annotation(key).map(str::to_owned);
        Some((
            part("io.kubernetes.cri.sandbox-namespace")?,
            part("io.kubernetes.cri.sandbox-name")?,
        ))
    }

    /// How the pod is in a mesh.
    fn mesh(&self, config: &Config) -> Result<Mesh, MeshError> {
        let namespaces = Store::new(&config.state_dir).mesh()?;
        let pod = self.pod();
        let namespace = pod.as_ref().map(|(namespace, _)| namespace.as_str());
        Ok(Mesh::of(&self.annotations, namespace, &namespaces)?)
    }

    /// Who the pod is to the node's policy.
    fn applicant(&self, config: &Config) -> Applicant {
        let pod = self.pod();
        let namespace = pod.as_ref().map(|(namespace, _)| namespace.as_str());
        let annotation = |key: &str| self.annotation(key);
        let tenant = tenant::of(annotation, namespace, &config.tenant_annotations);
        Applicant { tenant: tenant.unwrap_or_default(), pod, mesh: Mesh::default() }
    }
}

/// The pod's interface is joined to a tap (or the pod has none), and the size is known.
struct Wired {
    wire: Option<Wire>,
    /// The machine, if one has waited.
    machine: Option<Machine>,
    sizing: Sizing,
    disk_mib: u64,
    services: Option<services::follow::Source>,
    cgroups: Vec<PathBuf>,
    /// What the guest is to do with the containers' connections.
    in_guest: Option<api::Mesh>,
}

/// A VM that runs.
struct Machine {
    vm: Arc<dyn Vm>,
    channel: GuestChannel,
    disks: Arc<Disks>,
    /// The pod's own, if it has it already.
    disk: Option<PodDisk>,
}

/// The pod's VM runs.
struct Launched {
    wire: Option<Wire>,
    machine: Machine,
    disk_mib: u64,
    /// What the guest is to do with the containers' connections.
    in_guest: Option<api::Mesh>,
    services: Option<services::follow::Source>,
}

impl Handle {
    /// Starts the bring-up in a task of its own; once.
    pub(super) fn bring_up(&self, wanted: Wanted) {
        let waiting = self.0.progress.send_if_modified(|progress| {
            let waiting = matches!(progress, Progress::Waiting);
            if waiting {
                *progress = Progress::Starting;
            }
            waiting
        });
        if !waiting {
            return;
        }
        let handle = self.clone();
        let task = tokio::spawn(async move {
            let limit = Duration::from_secs(handle.0.config.start_timeout_seconds);
            let outcome = tokio::time::timeout(limit, handle.phases(&wanted)).await;
            let id = &handle.0.boot.id;
            match outcome {
                Ok(Ok((guest, sizing))) => {
                    handle.settle(Progress::Ready(guest));
                    let (config, home) = (handle.0.config.clone(), handle.0.boot.home.clone());
                    tokio::spawn(standby::replenish(config, sizing, home));
                }
                Ok(Err(error)) => handle.give_up(&error.to_string()).await,
                Err(_) => {
                    let limit = limit.as_secs();
                    let late = "it did not start within start_timeout_seconds";
                    handle.give_up(&format!("sandbox {id}: {late} = {limit}")).await;
                }
            }
        });
        let mut starting =
            self.0.starting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *starting = Some(task);
    }

    fn settle(&self, progress: Progress) {
        self.0.progress.send_replace(progress);
        self.0.timeline.write(&self.directory());
    }

    /// A start failed: undo it and tell everybody who asks why.
    async fn give_up(&self, reason: &str) {
        tracing::error!(sandbox = %self.0.boot.id, reason, "sandbox not started");
        self.settle(Progress::Failed(reason.into()));
        self.undo(false).await;
    }

    /// Undoes everything but the socket, on which this shim still answers, and the record, by which it is
    /// found should containerd forget it; that goes when the shim leaves. It waits for processes to end, so
    /// in a thread of its own; one at a time.
    pub(super) async fn undo(&self, leaves: bool) {
        let _alone = self.0.undoing.lock().await;
        let mut record = {
            let record = self.0.record.lock();
            record.unwrap_or_else(std::sync::PoisonError::into_inner).clone()
        };
        record.socket = PathBuf::new();
        let config = self.0.config.clone();
        let undo = move || match leaves {
            true => teardown::undo(&config.run_dir, &record),
            false => teardown::release(&config.run_dir, &record),
        };
        match tokio::task::spawn_blocking(undo).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "clean-up"),
            Err(error) => tracing::error!(%error, "clean-up"),
        }
    }

    async fn phases(&self, wanted: &Wanted) -> Result<(Guest, Sizing), SandboxError> {
        let wired = self.plug(wanted)?;
        let sizing = wired.sizing;
        let launched = self.launch(wired).await?;
        let vm = launched.machine.vm.clone();
        match self.identify(wanted, launched).await {
            Ok(guest) => Ok((guest, sizing)),
            // Whatever failed first, that the VMM is gone is the reason.
            Err(error) => match tokio::time::timeout(LAST_WORDS, vm.exited()).await {
                Ok(how) => {
                    let ended = format!("the VMM ended: {how} ({error})");
                    Err(SandboxError::host(&self.0.boot.id, "make the clone itself", ended))
                }
                Err(_) => Err(error),
            },
        }
    }

    /// The machine that has waited, if it is as large as the sandbox asks; another one ends.
    fn standby(&self, sizing: Sizing) -> Option<Standby> {
        let mut standby = self.0.standby.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        standby.take().filter(|standby| standby.sizing == sizing)
    }

    /// Size, cgroup and wire.
    fn plug(&self, wanted: &Wanted) -> Result<Wired, SandboxError> {
        let id = &self.0.boot.id;
        let config = &self.0.config;
        let refuse =
            |error: &dyn std::fmt::Display| SandboxError::Refused(format!("sandbox {id}: {error}"));
        let sizing = sizing::size(config, &wanted.annotations).map_err(|error| refuse(&error))?;
        let disk_mib =
            sizing::disk_mib(config, &wanted.annotations).map_err(|error| refuse(&error))?;
        *self.0.empty_dirs.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
            sizing::empty_dirs(&wanted.annotations).map_err(|error| refuse(&error))?;
        let mesh = wanted.mesh(config).map_err(|error| refuse(&error))?;
        let in_guest = mesh.in_guest(&wanted.annotations).map_err(|error| refuse(&error))?;
        let on_host = wanted.netns.as_deref().is_some_and(net::is_host_netns);
        let netns = match &wanted.netns {
            _ if on_host || wanted.host_network => {
                return Err(refuse(
                    &"host network (hostNetwork: true) is not supported: the pod's \
                    network is its virtual machine's own",
                ));
            }
            other => other.clone(),
        };
        if wanted.host_ipc {
            return Err(refuse(
                &"host IPC (hostIPC: true) is not supported: the pod's shared memory, semaphores \
                and message queues are its virtual machine's own",
            ));
        }
        if wanted.host_pid {
            return Err(refuse(
                &"host PID (hostPID: true) is not supported: a VM pod cannot see the host's processes",
            ));
        }
        let path = wanted.cgroups_path.clone().unwrap_or_else(|| format!("/joey/{id}"));
        let cgroups = cgroup::directories(&path).map_err(|error| refuse(&error))?;
        self.record(|record| {
            record.pod = wanted.pod().map(|(namespace, name)| format!("{namespace}/{name}"));
            record.vcpus = sizing.vcpus;
            record.memory_mib = sizing.memory_mib;
            record.netns.clone_from(&netns);
            record.cgroups.clone_from(&cgroups);
        })?;
        cgroup::create(&cgroups)
            .map_err(|error| SandboxError::host(id, "make the pod's cgroup", error))?;
        let standby = self.standby(sizing);
        let (machine, tap) = match standby {
            None => (None, None),
            Some(Standby { vm, channel, disks, disk, tap, .. }) => {
                let pid = u32::try_from(vm.pid()).unwrap_or(0);
                cgroup::put(pid, &cgroups).map_err(|error| {
                    SandboxError::host(id, "put the VMM into the pod's cgroup", error)
                })?;
                (Some(Machine { vm, channel, disks, disk: Some(disk) }), Some(tap))
            }
        };
        self.0.timeline.shim();
        failpoint::hold(&config.run_dir, "start.wire");
        let start = Instant::now();
        let limits =
            NetLimits::default().annotated(&wanted.annotations).map_err(|error| refuse(&error))?;
        let applicant = Applicant { mesh, ..wanted.applicant(config) };
        if !applicant.tenant.is_empty() {
            tenant::check(&applicant.tenant).map_err(|error| refuse(&error))?;
        }
        let services =
            config.services.annotated(&wanted.annotations).map_err(|error| refuse(&error))?;
        let services = match services {
            services::Mode::Host => None,
            services::Mode::Guest => {
                let found = services::follow::Source::find(&config.run_dir, &applicant.tenant);
                Some(found.map_err(|error| refuse(&error))?)
            }
        };
        let record = |place: &PodNetwork| {
            self.record(|record| record.network = Some(place.clone())).map_err(io::Error::other)?;
            failpoint::hold(&config.run_dir, "start.admission");
            Ok(())
        };
        let wire = netns
            .as_deref()
            .map(|netns| Wire::plug(netns, config, tap, &applicant, record))
            .transpose()
            .map_err(|error| SandboxError::host(id, "join the pod's network to its VM", error))?;
        if let Some(judged) = wire.as_ref().and_then(Wire::judged) {
            self.0.timeline.part("policy", judged.begun, judged.took);
        }
        if limits != NetLimits::default() {
            self.limit_network(limits)?;
        }
        self.0.timeline.host("wire", "", start);
        failpoint::hold(&config.run_dir, "start.attached");
        // Not before: whoever has the kernel's lock on network devices while it must not run, because its pod has
        // used up what it may, keeps all other pods of the node waiting.
        cgroup::join(&cgroups)
            .map_err(|error| SandboxError::host(id, "enter the pod's cgroup", error))?;
        Ok(Wired { wire, machine, sizing, disk_mib, services, cgroups, in_guest })
    }

    /// The VMM, cloned or booted or in reserve, and the channel to its agent.
    async fn launch(&self, wired: Wired) -> Result<Launched, SandboxError> {
        let id = &self.0.boot.id;
        if let Some(machine) = wired.machine {
            let pid = u32::try_from(machine.vm.pid()).unwrap_or(0);
            self.table().vmm_pid = pid;
            self.record(|record| record.cloned = Some(true))?;
            self.0.timeline.mark("standby", "");
            let Wired { wire, disk_mib, services, in_guest, .. } = wired;
            return Ok(Launched { wire, machine, disk_mib, services, in_guest });
        }
        let fail = |what| move |error: &dyn std::fmt::Display| SandboxError::host(id, what, error);
        let procs =
            cgroup::open(&wired.cgroups).map_err(|error| fail("open the pod's cgroup")(&error))?;
        let tap: Option<OwnedFd> = wired
            .wire
            .as_ref()
            .map(Wire::tap_fd)
            .transpose()
            .map_err(|error| fail("duplicate the tap")(&error))?;
        let spec = VmSpec {
            id: id.clone(),
            vcpus: wired.sizing.vcpus,
            memory_mib: wired.sizing.memory_mib,
            tap,
            mac: wired.wire.as_ref().map_or([0; 6], Wire::mac),
            run_dir: self.directory(),
            cgroup_procs: procs,
        };
        let start = Instant::now();
        let mut settings =
            self.0.config.vmm().map_err(|error| fail("configure the VMM")(&error))?;
        settings.home.clone_from(&self.0.boot.home);
        let started =
            vmm::start(&settings, spec).await.map_err(|error| fail("start the VM")(&error))?;
        let name = if started.cloned { "clone" } else { "boot" };
        self.0.timeline.machine(name, start, &started.phases);
        let vm: Arc<dyn Vm> = started.vm.into();
        let pid = u32::try_from(vm.pid()).unwrap_or(0);
        self.table().vmm_pid = pid;
        self.record(|record| {
            record.vmm = ProcessId::of(pid).ok();
            record.cloned = Some(started.cloned);
        })?;
        let socket = vm.take_channel().map_err(|error| fail("take the channel")(&error))?;
        let channel =
            GuestChannel::connect(socket).map_err(|error| fail("open the channel")(&error))?;
        if !started.cloned {
            let start = Instant::now();
            channel
                .client
                .hello(deadline::HELLO_COLD)
                .await
                .map_err(|source| SandboxError::Guest { id: id.clone(), source })?;
            self.0.timeline.host("kernel", "", start);
        }
        let machine = Machine { vm, channel, disks: Arc::default(), disk: None };
        let Wired { wire, disk_mib, services, in_guest, .. } = wired;
        Ok(Launched { wire, machine, disk_mib, services, in_guest })
    }

    /// Brings the pod's services into its guest, all that are known now first.
    fn bring_services(&self, guest: &Guest, mut source: services::follow::Source) -> Opening {
        let (handle, client) = (self.clone(), guest.client.clone());
        Opening::beside(async move {
            let start = Instant::now();
            source.carry(&client).await?;
            handle.0.timeline.host("services", "", start);
            let watches = handle.0.volumes.watches();
            tokio::spawn(services::follow::follow(source, client, watches));
            Ok::<_, services::follow::FollowError>(())
        })
    }

    /// Makes the clone itself. Nothing of it is optional.
    async fn identify(&self, wanted: &Wanted, launched: Launched) -> Result<Guest, SandboxError> {
        let id = &self.0.boot.id;
        let Launched { wire, machine, disk_mib, services, in_guest } = launched;
        let Machine { vm, channel, disks, disk } = machine;
        let mut secret = [0_u8; ENTROPY_BYTES + MACHINE_ID_BYTES];
        crate::sys::random(&mut secret)
            .map_err(|error| SandboxError::host(id, "read the host's entropy", error))?;
        let (entropy, machine_id) = secret.split_at(ENTROPY_BYTES);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = api::StartSandboxRequest {
            protocol_version: PROTOCOL_VERSION,
            sandbox_id: id.clone(),
            hostname: wanted.hostname.clone(),
            wall_clock_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
            entropy: entropy.to_vec(),
            machine_id: machine_id.to_vec(),
            network: wire.as_ref().map(Wire::network).into(),
            sysctls: wanted.sysctls.iter().cloned().collect(),
            mesh: in_guest.into(),
            ..Default::default()
        };
        failpoint::reach(&self.0.config.run_dir, "start.identity").await;
        let start = Instant::now();
        let reply = channel
            .client
            .start_sandbox(&request)
            .await
            .and_then(|reply| {
                let (call, checked) = ("start_sandbox", identity::check(&request, &reply));
                checked.map(|()| reply).map_err(|reason| GuestError::BadReply { call, reason })
            })
            .map_err(|source| SandboxError::Guest { id: id.clone(), source })?;
        self.0.timeline.answered(Pid::from_raw(vm.pid()));
        let inside =
            reply.phases.iter().fold(0, |sum: u64, phase| sum.saturating_add(phase.nanoseconds));
        self.0.timeline.call("agent", "identity", start, Duration::from_nanos(inside));
        self.note_phases("", &reply.phases);
        failpoint::reach(&self.0.config.run_dir, "start.identified").await;
        wire.as_ref()
            .map_or(Ok(()), Wire::open)
            .map_err(|error| SandboxError::host(id, "open the pod's network to its VM", error))?;
        self.record(|record| {
            record.machine_id = identity::hex(&reply.machine_id);
            record.boot_id.clone_from(&reply.boot_id);
        })?;
        let (client, streams) = (channel.client, channel.streams);
        let (pod_disk, none) = (Opening::done(), Opening::done());
        let mut guest = Guest { client, streams, vm, disks, pod_disk, services: none };
        if let Some(source) = services {
            guest.services = self.bring_services(&guest, source);
        }
        self.limit_disks(&guest, &wanted.annotations).await?;
        if disk.is_none_or(|disk| disk.mib() != disk_mib) {
            let directory = self.0.config.disk_dir();
            let disk = PodDisk::attach(&guest, &directory, disk_mib, disk)
                .await
                .map_err(|error| SandboxError::Refused(format!("sandbox {id}: {error}")))?;
            let (handle, client) = (self.clone(), guest.client.clone());
            guest.pod_disk = Opening::beside(async move {
                failpoint::reach(&handle.0.config.run_dir, "start.disk").await;
                let start = Instant::now();
                let phases = disk.open(&client).await?;
                handle.0.timeline.host("pod-disk", "", start);
                handle.note_phases("", &phases);
                Ok::<_, PodDiskError>(())
            });
        }
        if let Some(netns) = &wanted.netns {
            forward::serve(id, &guest, netns, channel.lost.clone());
        }
        self.watch(guest.clone(), channel.events, channel.lost);
        Ok(guest)
    }
}

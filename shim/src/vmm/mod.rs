//! The virtual machine behind a small interface: QEMU, and a double for tests.
//!
//! [`start`] clones a template where there is a good one, else boots cold and has a template built by
//! a process beside it. A template is never needed for a sandbox to start.

pub mod accel;
pub mod error;
pub mod fake;
pub mod qemu;
pub mod template;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

pub use self::error::VmmError;
use self::qemu::args::{Machine, Mode, arguments};
use self::qemu::{Launch, QemuVm};
use self::template::{Template, TemplateError, TemplateStore};
use crate::host::jail::{IdRange, Jail};
use crate::{failpoint, sys};

/// What was measured while a machine started.
pub type Phases = Vec<(&'static str, Duration)>;

/// A node's VMM, guest image and templates.
#[derive(Debug, Clone)]
pub struct VmmConfig {
    /// The QEMU binary.
    pub qemu: PathBuf,
    /// Directory with `vmlinuz`, `initrd` and `manifest.json`.
    pub guest_dir: PathBuf,
    /// Directory of the templates.
    pub templates_dir: PathBuf,
    /// Directory on tmpfs for what lasts until the node boots again.
    pub run_dir: PathBuf,
    /// Whether sandboxes are cloned at all.
    pub use_templates: bool,
    /// User and group ids the VMMs run as.
    pub ids: IdRange,
    /// The operator's tool, with the arguments that make it build a template; `--vcpus N --memory M` and
    /// `--cgroup` for each of `home` are added. None: nothing is built in the background.
    pub builder: Option<Vec<String>>,
    /// Control groups of what outlives the sandbox that has it built.
    pub home: Vec<PathBuf>,
}

/// One sandbox's machine.
#[derive(Debug)]
pub struct VmSpec {
    /// The sandbox.
    pub id: String,
    /// Processors.
    pub vcpus: u32,
    /// Memory.
    pub memory_mib: u32,
    /// The pod's tap, with `IFF_VNET_HDR`; none: a network that leads nowhere.
    pub tap: Option<OwnedFd>,
    /// MAC of the pod's interface; the guest sets it for itself.
    pub mac: [u8; 6],
    /// The sandbox's directory, for the console's log and as the jail's mount point.
    pub run_dir: PathBuf,
    /// Open `cgroup.procs` that the VMM joins before it runs.
    pub cgroup_procs: Vec<OwnedFd>,
}

/// A machine that was started.
pub struct Started {
    /// The machine.
    pub vm: Box<dyn Vm>,
    /// Whether it continues from a template.
    pub cloned: bool,
    /// What took how long.
    pub phases: Phases,
}

/// What a disk consists of, one after the other.
#[derive(Debug)]
pub struct Disk {
    /// Files and block devices, open.
    pub files: Vec<OwnedFd>,
    /// Parts of the files that make up the disk; none: the only file as it is.
    pub extents: Vec<Extent>,
    /// Whether its content need not outlast the machine: nothing is ever synced.
    pub ephemeral: bool,
}

/// Bytes of a file, as part of a disk. All numbers are multiples of 512.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Index of the file.
    pub file: usize,
    /// First byte within the file.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}

/// How much a machine may ask of all its disks together, a second; 0: as much as it wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Bytes that are read.
    pub read_bytes: u64,
    /// Bytes that are written.
    pub write_bytes: u64,
    /// Requests to read.
    pub read_operations: u64,
    /// Requests to write.
    pub write_operations: u64,
}

impl From<OwnedFd> for Disk {
    fn from(file: OwnedFd) -> Self {
        Self { files: vec![file], extents: Vec::new(), ephemeral: false }
    }
}

/// What the sandbox may do with its machine. Dropping it ends the machine.
pub trait Vm: Send + Sync {
    /// The VMM's process.
    fn pid(&self) -> i32;
    /// The byte channel to the agent; once.
    fn take_channel(&self) -> Result<UnixStream, VmmError>;
    /// Puts a disk into a slot: read-only disks into the first, writable into the last slots
    /// ([`qemu::args::slot_is_writable`]).
    fn attach_disk<'a>(
        &'a self,
        slot: u32,
        disk: &'a Disk,
        read_only: bool,
    ) -> BoxFuture<'a, Result<(), VmmError>>;
    /// Empties a slot; succeeds if it is empty.
    fn detach_disk(&self, slot: u32) -> BoxFuture<'_, Result<(), VmmError>>;
    /// Gives the writable disk in a slot another size.
    fn resize_disk(&self, slot: u32, bytes: u64) -> BoxFuture<'_, Result<(), VmmError>>;
    /// Limits what the disks do from now on, on the host's side.
    fn limit_disks(&self, limits: DiskLimits) -> BoxFuture<'_, Result<(), VmmError>>;
    /// Stops the processors.
    fn pause(&self) -> BoxFuture<'_, Result<(), VmmError>>;
    /// Lets them run again.
    fn resume(&self) -> BoxFuture<'_, Result<(), VmmError>>;
    /// Ends the machine at once; [`Vm::exited`] tells when it is gone.
    fn kill(&self);
    /// Waits for the VMM's end and says how it ended.
    fn exited(&self) -> BoxFuture<'_, String>;
}

/// Starts a sandbox's machine. It runs when this returns; the agent answers soon after.
pub async fn start(config: &VmmConfig, spec: VmSpec) -> Result<Started, VmmError> {
    let mut phases = Phases::new();
    let begun = Instant::now();
    let store = TemplateStore::new(config)?;
    let key = store.key(spec.vcpus, spec.memory_mib)?;
    if !config.use_templates {
        return cold(config, &store, spec, phases).await;
    }
    let template = match open(config, &store, &key).await {
        Ok(template) => template,
        Err(error) => {
            tracing::warn!("sandbox {}: boots cold: {error}", spec.id);
            if error.is_damage() {
                store.condemn(&key);
            }
            build_beside(config, spec.vcpus, spec.memory_mib);
            return cold(config, &store, spec, phases).await;
        }
    };
    phases.push(("template", begun.elapsed()));
    let again = copy_of(&spec)?;
    match clone(config, &store, &template, spec, &mut phases).await {
        Ok(vm) => Ok(Started { vm: Box::new(vm), cloned: true, phases }),
        Err(error) => {
            tracing::warn!("sandbox {}: cloning failed, boots cold: {error}", again.id);
            if error.is_templates_fault() {
                store.condemn(&key);
                build_beside(config, again.vcpus, again.memory_mib);
            } else {
                store.doubt(&key);
            }
            cold(config, &store, again, phases).await
        }
    }
}

/// Opens a template; a check of its content, which takes a while, leaves this thread to others.
async fn open(
    config: &VmmConfig,
    store: &TemplateStore<'_>,
    key: &str,
) -> Result<Template, TemplateError> {
    if let Some(template) = store.open_known(key) {
        return Ok(template);
    }
    let (config, key) = (config.clone(), key.to_owned());
    let (working, done) = oneshot::channel::<()>();
    let thread = std::thread::spawn(move || {
        let store = TemplateStore::new(&config);
        let store = store.map_err(|_| TemplateError::Missing(key.clone()));
        let opened = store.and_then(|store| store.open(&key));
        drop(working);
        opened
    });
    let _ = done.await;
    // Gone for good: the VMM is forked off, and there must be no other thread then.
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn copy_of(spec: &VmSpec) -> Result<VmSpec, VmmError> {
    let copy = |fd: &OwnedFd| fd.try_clone().map_err(VmmError::io("copying a descriptor"));
    Ok(VmSpec {
        id: spec.id.clone(),
        tap: spec.tap.as_ref().map(copy).transpose()?,
        run_dir: spec.run_dir.clone(),
        cgroup_procs: spec.cgroup_procs.iter().map(copy).collect::<Result<_, _>>()?,
        ..*spec
    })
}

async fn clone(
    config: &VmmConfig,
    store: &TemplateStore<'_>,
    template: &Template,
    spec: VmSpec,
    phases: &mut Phases,
) -> Result<QemuVm, VmmError> {
    let launch = if let Some(process) = template.open_process()? {
        continued(config, spec, process)?
    } else {
        let paths = Paths {
            kernel: template.kernel(),
            initrd: None,
            memory: Some(template.memory()),
            vmm: template.vmm(),
        };
        let state = template.open_state()?;
        prepare(config, store, Mode::Clone, spec, &paths, Some(state))?
    };
    let vm = QemuVm::start(launch, phases).await?;
    failpoint::reach(&config.run_dir, "vmm.spawned").await;
    let begun = Instant::now();
    vm.restored().await?;
    phases.push(("vmm_restored", begun.elapsed()));
    Ok(vm)
}

async fn cold(
    config: &VmmConfig,
    store: &TemplateStore<'_>,
    spec: VmSpec,
    mut phases: Phases,
) -> Result<Started, VmmError> {
    let paths = Paths {
        kernel: config.guest_dir.join("vmlinuz"),
        initrd: Some(config.guest_dir.join("initrd")),
        memory: None,
        vmm: None,
    };
    let launch = prepare(config, store, Mode::Cold, spec, &paths, None)?;
    let vm = QemuVm::start(launch, &mut phases).await?;
    Ok(Started { vm: Box::new(vm), cloned: false, phases })
}

/// Files of the node that QEMU opens.
pub(crate) struct Paths {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) memory: Option<PathBuf>,
    /// What is executed as the configured QEMU; none: that itself.
    pub(crate) vmm: Option<PathBuf>,
}

/// Command line, jail and descriptors of one machine.
pub(crate) fn prepare<'a>(
    config: &'a VmmConfig,
    store: &TemplateStore<'_>,
    mode: Mode,
    spec: VmSpec,
    paths: &Paths,
    state: Option<OwnedFd>,
) -> Result<Launch<'a>, VmmError> {
    let machine = Machine {
        mode,
        kvm: store.acceleration().kvm,
        tsc_khz: store.acceleration().tsc_khz,
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        kernel: Path::new("/vmlinuz"),
        initrd: paths.initrd.as_ref().map(|_| Path::new("/initrd")),
        memory: paths.memory.as_ref().map(|_| Path::new("/memory")),
    };
    let mut launch = launch(config, spec)?;
    let id = launch.id.clone();
    let jailing =
        |source: io::Error| VmmError::Spawn { id: id.clone(), step: "preparing the jail", source };
    launch.arguments = arguments(&machine);
    launch.state = state;
    let jail = &mut launch.jail;
    jail.system().map_err(jailing)?;
    let vmm = paths.vmm.as_ref().unwrap_or(&config.qemu);
    jail.program(vmm, &config.qemu).map_err(jailing)?;
    let files = [
        (Some(&paths.kernel), "/vmlinuz", false),
        (paths.initrd.as_ref(), "/initrd", false),
        (paths.memory.as_ref(), "/memory", mode == Mode::Build),
    ];
    for (source, target, writable) in files {
        if let Some(source) = source {
            jail.bind(source, Path::new(target), writable)
                .map_err(|error| VmmError::Guest { path: source.clone(), source: error })?;
        }
    }
    Ok(launch)
}

/// A machine that goes on from a checkpoint, and for that needs nothing of the node but descriptors.
pub(crate) fn continued(
    config: &VmmConfig,
    spec: VmSpec,
    process: OwnedFd,
) -> Result<Launch<'_>, VmmError> {
    Ok(Launch { state: Some(process), continues: true, ..launch(config, spec)? })
}

/// What every machine has: a jail, which is empty yet, and a network.
fn launch(config: &VmmConfig, spec: VmSpec) -> Result<Launch<'_>, VmmError> {
    let root = spec.run_dir.join("jail");
    fs::create_dir_all(&root).map_err(VmmError::io(format!("making {}", root.display())))?;
    let jail = Jail::new(&root, config.ids.of(&spec.id), spec.cgroup_procs);
    let jail = jail.map_err(|source| VmmError::Spawn {
        id: spec.id.clone(),
        step: "preparing the jail",
        source,
    })?;
    let tap = match spec.tap {
        Some(tap) => tap,
        None => tap_to_nowhere().map_err(VmmError::io("making a tap"))?,
    };
    Ok(Launch {
        program: &config.qemu,
        arguments: Vec::new(),
        jail,
        tap,
        state: None,
        continues: false,
        console_log: spec.run_dir.join("console.log"),
        id: spec.id,
    })
}

/// A tap in a network namespace that nothing else is in; both are gone with the descriptor.
fn tap_to_nowhere() -> io::Result<OwnedFd> {
    let make = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        let tun = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        let tun = OwnedFd::from(tun);
        sys::make_tap(std::os::fd::AsFd::as_fd(&tun), "tap0")?;
        Ok(tun)
    };
    // Only the thread changes its namespace, and it ends here.
    std::thread::spawn(make)
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread that makes the tap panicked")))
}

/// Has a template built by another process; whether it works is the next sandbox's business.
fn build_beside(config: &VmmConfig, vcpus: u32, memory_mib: u32) {
    let Some((program, arguments)) = config.builder.as_deref().and_then(<[String]>::split_first)
    else {
        return;
    };
    // The last builder's words, if it had any.
    let log = fs::File::create(config.run_dir.join("template-build.log"));
    let spawned = tokio::process::Command::new(program)
        .args(arguments)
        .args(["--vcpus", &vcpus.to_string(), "--memory", &memory_mib.to_string()])
        // In the pod's groups it would end with the pod.
        .args(config.home.iter().flat_map(|group| [OsStr::new("--cgroup"), group.as_os_str()]))
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(log.map_or_else(|_| std::process::Stdio::null(), Into::into))
        .process_group(0)
        .spawn();
    if let Err(error) = spawned {
        tracing::warn!("starting {program} to build a template: {error}");
    }
}

//! A container's OCI specification, as the guest gets it: mounts of the host replaced by volumes that
//! are copied in, host-only parts removed, and everything that a VM pod cannot have refused by name.
//!
//! Pure but for one look at each mount's source, which the caller lends ([`Facts::look`]).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use joey_protocol::limits::MAX_SPEC;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespaceType, Mount, Spec,
};
use sha2::{Digest as _, Sha256};

use super::kubelet::{self, Origin};
use crate::volumes::direct::{Direct, MountInfoError};

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// Annotations that ask for devices of the Container Device Interface.
const CDI: &str = "cdi.k8s.io/";
/// What the kubelet reads of a termination message (its MaxContainerTerminationMessageLength).
const TERMINATION_MESSAGE: u64 = 4096;
/// Files that CRI gives every container; a container may change its pod's copies.
const POD_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];
/// File systems that the guest mounts by itself.
const GUEST_TYPES: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];
/// Devices that every container has anyway.
const STANDARD_DEVICES: [&str; 6] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];

/// What a path of the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Socket, FIFO or device.
    Special,
    /// Not there.
    Missing,
}

/// What the plan needs to know of the sandbox and the host.
pub struct Facts<'a> {
    /// The VMM's process, whose namespaces CRI names when it means the pod's.
    pub vmm_pid: u32,
    /// Content of pod files that containerd does not make (Sandbox API).
    pub pod_files: &'a BTreeMap<String, Vec<u8>>,
    /// Tells what a path of the host is, following links.
    pub look: &'a dyn Fn(&Path) -> Kind,
    /// Tells which path of its file system is mounted at a path.
    pub mounted: &'a dyn Fn(&Path) -> Option<PathBuf>,
    /// Finds what a CSI driver has left for a path: a disk that the guest mounts itself.
    pub direct: &'a dyn Fn(&Path) -> Result<Option<Direct>, MountInfoError>,
    /// Finds the description of the disk, if the mount at this path is one of joey-snapshotter's.
    pub described: &'a dyn Fn(&Path) -> Option<PathBuf>,
}

/// Where a volume's content comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file or directory of the host.
    Host(PathBuf),
    /// Given here.
    Inline(Vec<u8>),
    /// A file or directory of the host, live.
    Shared(Shared),
    /// A disk of the host, on which there is a file system.
    Direct(Direct),
    /// An empty directory in the guest, of owner and mode as this one of the host, which stays empty.
    Empty(PathBuf),
}

/// What a share serves.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shared {
    /// The file or directory, with everything mounted below it.
    pub path: PathBuf,
    /// Whether the guest may not write, whatever it tries.
    pub read_only: bool,
    /// Whether the guest sees what the host mounts below it later (`HostToContainer`).
    pub live_mounts: bool,
}

/// Content that the guest gets before the container is created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name in the guest: the same for the same source, so that a restarted container does not
    /// pile copies up.
    pub id: String,
    /// Its content.
    pub source: Source,
    /// The mount it serves, for errors.
    pub destination: PathBuf,
}

impl Volume {
    /// How a mount of the guest's specification names it.
    fn mount_source(&self) -> PathBuf {
        PathBuf::from(format!("joey-volume:{}", self.id))
    }
}

/// Where the content of a mount is in the guest.
enum Place {
    /// At the same path of the guest's own.
    Guest,
    /// Under this name of the agent's.
    Named(String),
    /// In a volume, at a path below it.
    Volume(Volume, PathBuf),
}

/// A file that is brought back to the host when the container ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteBack {
    /// The volume that is this file.
    pub volume: String,
    /// Where it goes.
    pub host: PathBuf,
    /// At most so many bytes.
    pub limit: u64,
}

/// Why a container cannot be a VM pod's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} {value:?}: {reason}")]
pub struct Refusal {
    /// Field of the specification.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// Why not, and what to do.
    pub reason: String,
}

fn refuse(field: &'static str, value: impl ToString, reason: impl ToString) -> Refusal {
    Refusal { field, value: value.to_string(), reason: reason.to_string() }
}

/// What is to be done for a container.
#[derive(Debug)]
pub struct Plan {
    /// The specification for the guest, JSON.
    pub spec: Vec<u8>,
    /// Whether the root is mounted read-only.
    pub read_only_root: bool,
    /// What is copied in or shared.
    pub volumes: Vec<Volume>,
    /// Images as volumes: their names for the guest, and descriptions of their disks.
    pub images: Vec<(String, PathBuf)>,
    /// Block devices of the host that the container has.
    pub devices: Vec<BlockDevice>,
    /// What is brought back.
    pub write_back: Vec<WriteBack>,
}

/// A block device of the host that is given to a container (`volumeDevices`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Its numbers on the host, major and minor.
    pub numbers: (i64, i64),
    /// Whether the container may write to it.
    pub writable: bool,
}

impl Plan {
    /// Plans a container.
    ///
    /// # Errors
    /// [`Refusal`] names the field and the value.
    pub fn new(spec: &Spec, facts: &Facts<'_>) -> Result<Self, Refusal> {
        let mut spec = spec.clone();
        check_hooks(&spec)?;
        check_annotations(&spec)?;
        check_namespaces(&spec, facts)?;
        let devices = host_devices(&mut spec)?;
        let mut plan = Self {
            spec: Vec::new(),
            read_only_root: spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false),
            volumes: Vec::new(),
            images: Vec::new(),
            devices,
            write_back: Vec::new(),
        };
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in &mut mounts {
            plan.mount(mount, facts)?;
        }
        mounts.extend(plan.pod_files(&mounts, facts));
        spec.set_mounts(Some(mounts));
        plan.spec = serde_json::to_vec(&spec)
            .map_err(|error| refuse("config.json", "", format!("cannot be encoded: {error}")))?;
        if plan.spec.len() > MAX_SPEC {
            return Err(refuse(
                "config.json",
                format!("{} bytes", plan.spec.len()),
                format!("larger than {MAX_SPEC} bytes: shorten arguments or environment"),
            ));
        }
        Ok(plan)
    }

    /// Mounts for the pod files that the specification leaves out: with the Sandbox API containerd
    /// mounts only those it has made itself.
    fn pod_files(&mut self, known: &[Mount], facts: &Facts<'_>) -> Vec<Mount> {
        let missing = facts
            .pod_files
            .iter()
            .filter(|(path, _)| known.iter().all(|mount| mount.destination() != Path::new(path)));
        let mut mounts = Vec::new();
        for (path, content) in missing {
            let mut mount = Mount::default();
            mount
                .set_destination(PathBuf::from(path))
                .set_typ(Some("bind".to_owned()))
                .set_options(Some(vec!["bind".to_owned()]));
            let volume = Volume {
                id: volume_id(Path::new(path)),
                source: Source::Inline(content.clone()),
                destination: PathBuf::from(path),
            };
            mount.set_source(Some(volume.mount_source()));
            self.volumes.push(volume);
            mounts.push(mount);
        }
        mounts
    }

    fn mount(&mut self, mount: &mut Mount, facts: &Facts<'_>) -> Result<(), Refusal> {
        let options = mount.options().clone().unwrap_or_default();
        let has = |name: &str| options.iter().any(|option| option == name);
        let typ = mount.typ().clone().unwrap_or_default();
        let destination = mount.destination().clone();
        let shown = destination.display().to_string();
        if let Some(shared) = options.iter().find(|o| *o == "shared" || *o == "rshared") {
            return Err(refuse(
                "mount",
                shown,
                format!("propagation {shared:?} would reach out of the virtual machine"),
            ));
        }
        let source = mount.source().clone().unwrap_or_default();
        if destination == Path::new("/dev/shm") && is_pod_shm(&source) {
            mount.set_source(Some(PathBuf::from("joey-shm:")));
            if typ == "tmpfs" {
                mount.set_typ(Some("bind".to_owned())).set_options(Some(vec!["rbind".to_owned()]));
            }
            return Ok(());
        }
        if typ != "bind" && !has("bind") && !has("rbind") {
            if GUEST_TYPES.contains(&typ.as_str()) {
                return Ok(());
            }
            return Err(refuse("mount", shown, format!("file system {typ:?} is not supported")));
        }
        if has("idmap") || has("ridmap") {
            return Err(refuse("mount", shown, "ID-mapped mounts are not available in a VM pod"));
        }
        let inside = match self.volume(&source, &destination, &has, facts)? {
            Place::Guest => source,
            Place::Named(name) => name.into(),
            Place::Volume(volume, below) => {
                let mut inside = volume.mount_source().into_os_string();
                if below != Path::new("") {
                    inside.push("/");
                    inside.push(below);
                }
                if !self.volumes.iter().any(|known| known.id == volume.id) {
                    self.volumes.push(volume);
                }
                inside.into()
            }
        };
        mount.set_source(Some(inside));
        Ok(())
    }

    /// Decides how the content of a bind mount gets into the guest.
    fn volume(
        &mut self,
        source: &Path,
        destination: &Path,
        has: &dyn Fn(&str) -> bool,
        facts: &Facts<'_>,
    ) -> Result<Place, Refusal> {
        let shown = format!("{} (from {})", destination.display(), source.display());
        let no = |reason: &str| Err(refuse("mount", &shown, reason));
        let pod_file = destination.to_str().filter(|path| POD_FILES.contains(path));
        let volume = |path: &Path, source| Volume {
            id: volume_id(path),
            source,
            destination: destination.to_owned(),
        };
        let whole = |volume| Ok(Place::Volume(volume, PathBuf::new()));
        let copied = || whole(volume(source, Source::Host(source.to_owned())));
        let direct = kubelet::direct(source, facts);
        if let Some(direct) = direct.map_err(|reason| refuse("mount", &shown, reason))? {
            let kubelet::DirectVolume { folder, direct, below } = direct;
            return Ok(Place::Volume(volume(&folder, Source::Direct(direct)), below));
        }
        let kind = (facts.look)(source);
        match (kubelet::origin(source, destination, facts), kind, pod_file) {
            (Origin::Kernel, _, _) => Ok(Place::Guest),
            (Origin::EmptyDir { folder, below }, Kind::Directory, _) => {
                Ok(Place::Volume(volume(&folder, Source::Empty(folder.clone())), below))
            }
            // What the image has there is in its root, and what is written on top goes with it.
            (Origin::ImageVolume, Kind::Directory, _) => {
                Ok(Place::Named(format!("joey-scratch:{}", volume_id(source))))
            }
            (Origin::Image, Kind::Directory, _)
                if let Some(description) = (facts.described)(source) =>
            {
                let name = volume_id(source);
                self.images.push((name.clone(), description));
                Ok(Place::Named(format!("joey-disk:{name}")))
            }
            // It shows the users of the image, and nothing else of it.
            (Origin::Image, _, _)
                if (facts.mounted)(source).is_some_and(|root| root.ends_with("users")) =>
            {
                no(
                    "the image's disk is not described on this node any more (disk.json): pull it again",
                )
            }
            (_, Kind::File, Some(_)) => copied(),
            (_, Kind::Missing, Some(path)) if facts.pod_files.contains_key(path) => {
                whole(volume(Path::new(path), Source::Inline(facts.pod_files[path].clone())))
            }
            (_, Kind::Missing, _) => no("its source does not exist on the host"),
            (_, Kind::Special, _) => {
                no("sockets, FIFOs and devices of the host cannot be shared with a virtual machine")
            }
            (Origin::Published, _, _) => copied(),
            (Origin::TerminationLog, Kind::File, _) if !has("ro") => {
                // The kubelet names the file anew at each restart; its directory stays.
                let stable = source.parent().unwrap_or(source).join("termination-log");
                let volume = volume(&stable, Source::Host(source.to_owned()));
                self.write_back.push(WriteBack {
                    volume: volume.id.clone(),
                    host: source.to_owned(),
                    limit: TERMINATION_MESSAGE,
                });
                whole(volume)
            }
            _ => {
                let shared = Shared {
                    path: source.to_owned(),
                    read_only: has("ro"),
                    live_mounts: has("rslave") || has("slave"),
                };
                // One share for each way of sharing: what is read-only is so on the host's side.
                let mut name = source.as_os_str().to_owned();
                for (word, given) in [("\0ro", shared.read_only), ("\0live", shared.live_mounts)] {
                    name.push(if given { word } else { "" });
                }
                whole(volume(Path::new(&name), Source::Shared(shared)))
            }
        }
    }
}

/// The pod's shared memory: CRI's mount of it, or the tmpfs that the Sandbox API leaves it at. Not a
/// volume of that name.
fn is_pod_shm(source: &Path) -> bool {
    source.ends_with("shm") && source.components().all(|part| part.as_os_str() != "volumes")
}

/// Name of the volume for a source: short, valid, the same each time.
fn volume_id(source: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let hash = Sha256::digest(source.as_os_str().as_bytes());
    hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Devices of the Container Device Interface are the host's. containerd turns such a request into devices,
/// mounts and hooks, each of which is looked at for itself; what it has left to the runtime is seen here.
fn check_annotations(spec: &Spec) -> Result<(), Refusal> {
    let annotations = spec.annotations().iter().flatten();
    match annotations.into_iter().find(|(key, _)| key.starts_with(CDI)) {
        Some((key, devices)) => Err(refuse(
            "annotation",
            format!("{key}: {devices}"),
            "CDI devices are the host's, and not available in a virtual machine",
        )),
        None => Ok(()),
    }
}

fn check_hooks(spec: &Spec) -> Result<(), Refusal> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    let kinds = [
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (kind, hooks) in kinds {
        if let Some(hook) = hooks.iter().flatten().next() {
            return Err(refuse(
                "hooks",
                format!("{kind}: {}", hook.path().display()),
                "OCI hooks run on the host, where a VM pod has no processes",
            ));
        }
    }
    Ok(())
}

fn check_namespaces(spec: &Spec, facts: &Facts<'_>) -> Result<(), Refusal> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    let missing = |typ| all.iter().all(|namespace| namespace.typ() != typ);
    if missing(LinuxNamespaceType::Pid) {
        return Err(refuse("hostPID", "true", "a VM pod cannot see the host's processes"));
    }
    if missing(LinuxNamespaceType::Network) {
        return Err(refuse(
            "hostNetwork",
            "true",
            "host network is not supported: the pod's network is its virtual machine's own",
        ));
    }
    if missing(LinuxNamespaceType::Ipc) {
        return Err(refuse(
            "hostIPC",
            "true",
            "host IPC is not supported: the pod's shared memory, semaphores and message queues are its \
             virtual machine's own",
        ));
    }
    let pod = format!("/proc/{}/ns/pid", facts.vmm_pid);
    let target = all.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Pid);
    if let Some(path) = target.and_then(|namespace| namespace.path().as_ref())
        && path != Path::new(&pod)
    {
        return Err(refuse(
            "process namespace",
            path.display(),
            "joining another container's processes (targetContainerName) is not supported; use \
             shareProcessNamespace",
        ));
    }
    Ok(())
}

/// Host devices: block devices are volumes. A privileged container, which is given all that the host has, gets
/// the guest's own instead; others are refused.
fn host_devices(spec: &mut Spec) -> Result<Vec<BlockDevice>, Refusal> {
    let Some(mut linux) = spec.linux().clone() else { return Ok(Vec::new()) };
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().clone()).unwrap_or_default();
    let may = |rule: &LinuxDeviceCgroup, what| {
        rule.allow() && rule.access().as_deref().is_none_or(|access| access.contains(what))
    };
    let privileged = rules.iter().any(|rule| {
        may(rule, 'm')
            && rule.major().is_none()
            && rule.minor().is_none()
            && rule.typ().is_none_or(|typ| typ == LinuxDeviceType::A)
    });
    let devices = linux.devices().clone().unwrap_or_default();
    let standard = |device: &&LinuxDevice| {
        device.path().to_str().is_some_and(|path| STANDARD_DEVICES.contains(&path))
    };
    let foreign: Vec<_> = devices.iter().filter(|device| !standard(device)).collect();
    if privileged && !foreign.is_empty() {
        linux.set_devices(Some(Vec::new()));
        spec.set_linux(Some(linux));
        return Ok(Vec::new());
    }
    let mut blocks: Vec<BlockDevice> = Vec::new();
    for device in foreign {
        if device.typ() != LinuxDeviceType::B {
            return Err(refuse(
                "device",
                device.path().display(),
                "character devices of the host are not available in a virtual machine",
            ));
        }
        let numbers = (device.major(), device.minor());
        let ruled = |rule: &&LinuxDeviceCgroup| {
            rule.typ() == Some(LinuxDeviceType::B)
                && rule.major().zip(rule.minor()) == Some(numbers)
        };
        let writable = rules.iter().filter(ruled).any(|rule| may(rule, 'w'));
        if blocks.iter().all(|known| known.numbers != numbers) {
            blocks.push(BlockDevice { numbers, writable });
        }
    }
    Ok(blocks)
}

/// Whether this is CRI's sandbox container.
#[must_use]
pub fn is_sandbox(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    annotations.and_then(|all| all.get(CONTAINER_TYPE)).is_some_and(|typ| typ == "sandbox")
}

/// The sysctls of the sandbox container: the pod's.
#[must_use]
pub fn sandbox_sysctls(spec: &Spec) -> Vec<(String, String)> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.sysctl().clone()).unwrap_or_default();
    all.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(mounts: Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.1.0",
            "process": {"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["true"]},
            "root": {"path": "rootfs", "readonly": true},
            "mounts": mounts,
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"},
                {"type": "network", "path": "/var/run/netns/cni-1"},
                {"type": "ipc", "path": "/proc/7/ns/ipc"}]},
        }))
        .unwrap()
    }

    fn bind(destination: &str, source: &str, options: &[&str]) -> Value {
        json!({"destination": destination, "source": source, "type": "bind", "options": options})
    }

    fn plan(spec: &Spec) -> Result<Plan, Refusal> {
        let files = BTreeMap::from([("/etc/hosts".to_owned(), b"127.0.0.1 localhost\n".to_vec())]);
        let look = |path: &Path| match path.to_str() {
            Some(path) if path.contains("gone") => Kind::Missing,
            Some(path) if path.ends_with(".sock") => Kind::Special,
            Some(path) if path.ends_with("dir") => Kind::Directory,
            _ => Kind::File,
        };
        let mounted = |path: &Path| {
            Some(PathBuf::from(if path.ends_with("lost-dir") { "/disks/d/users" } else { "/sub" }))
        };
        Plan::new(
            spec,
            &Facts {
                vmm_pid: 7,
                pod_files: &files,
                look: &look,
                mounted: &mounted,
                direct: &|path| match path.to_str() {
                    Some(path) if path.ends_with("csi-bad") => Err(MountInfoError::File {
                        path: "/x/mountInfo.json".into(),
                        reason: "not JSON".to_owned(),
                    }),
                    Some(path) if path.ends_with("~csi/pv/mount") => Ok(Some(direct())),
                    _ => Ok(None),
                },
                described: &|path| path.ends_with("known-dir").then(|| "/disks/d/disk.json".into()),
            },
        )
    }

    fn direct() -> Direct {
        Direct {
            device: "/dev/sdd".into(),
            file_system: "ext4".to_owned(),
            read_only: false,
            options: Vec::new(),
            group: None,
        }
    }

    #[test]
    fn what_a_driver_leaves_to_the_guest_is_a_disk_and_its_parts_are_of_it() {
        let source = "/pods/u/volumes/kubernetes.io~csi/pv/mount";
        let part = "/pods/u/volume-subpaths/pv/app/0";
        let mounts =
            json!([bind("/whole", source, &["rbind", "ro"]), bind("/part", part, &["rbind"])]);
        let plan = plan(&spec(mounts)).unwrap();
        let disks = plan.volumes.iter().filter(|it| it.source == Source::Direct(direct()));
        assert_eq!(disks.count(), 1);
        let sent: Spec = serde_json::from_slice(&plan.spec).unwrap();
        let sources: Vec<_> =
            sent.mounts().iter().flatten().map(|it| it.source().clone()).collect();
        assert_eq!(sources[1].as_ref().unwrap(), &sources[0].as_ref().unwrap().join("sub"));
        let bad = error(json!([bind("/bad", "/x/csi-bad", &["rbind"])]));
        assert!(bad.contains("/bad") && bad.contains("/x/mountInfo.json: not JSON"), "{bad}");
    }

    fn error(mounts: Value) -> String {
        plan(&spec(mounts)).unwrap_err().to_string()
    }

    #[test]
    fn what_cri_gives_every_container_is_copied() {
        let spec = spec(json!([
            {"destination": "/proc", "source": "proc", "type": "proc", "options": []},
            bind("/dev/shm", "/run/x/shm", &["rbind", "ro"]),
            bind("/etc/hosts", "/gone/hosts", &["rbind", "rprivate", "rw"]),
            bind("/etc/resolv.conf", "/x/resolv.conf", &["rbind", "rw"]),
            bind("/dev/log", "/kubelet/pods/u/containers/app/0a1b2c3d", &["rbind", "rw"]),
            bind("/config", "/pods/u/volumes/kubernetes.io~secret/dir", &["rbind", "ro"]),
        ]));
        let plan = plan(&spec).unwrap();
        assert!(plan.read_only_root);
        assert_eq!(plan.volumes.len(), 4);
        assert_eq!(plan.volumes[0].source, Source::Inline(b"127.0.0.1 localhost\n".to_vec()));
        assert_eq!(plan.write_back.len(), 1);
        assert_eq!(plan.write_back[0].volume, plan.volumes[2].id);
        let sent: Spec = serde_json::from_slice(&plan.spec).unwrap();
        let sources: Vec<String> = sent
            .mounts()
            .iter()
            .flatten()
            .map(|mount| mount.source().clone().unwrap_or_default().display().to_string())
            .collect();
        assert_eq!(sources[1], "joey-shm:");
        assert!(
            sources[2..].iter().all(|source| source.starts_with("joey-volume:")),
            "{sources:?}"
        );
    }

    #[test]
    fn an_empty_dir_is_the_guests_own() {
        let source = "/kubelet/pods/u/volumes/kubernetes.io~empty-dir/cache-dir";
        for mode in ["rw", "ro"] {
            let plan = plan(&spec(json!([bind("/cache", source, &["rbind", mode])]))).unwrap();
            assert_eq!(plan.volumes[0].source, Source::Empty(source.into()));
        }
        let part = "/kubelet/pods/u/volume-subpaths/cache-dir/app/0-dir";
        let plan = plan(&spec(json!([bind("/part", part, &["rbind", "ro"])]))).unwrap();
        assert_eq!(plan.volumes[0].source, Source::Empty(source.into()));
        let sent: Spec = serde_json::from_slice(&plan.spec).unwrap();
        let mount = sent.mounts().iter().flatten().next().unwrap();
        assert!(mount.source().as_ref().unwrap().ends_with("sub"), "{mount:?}");
    }

    #[test]
    fn what_is_the_hosts_is_shared_live_each_way_apart() {
        let kubelet = "/kubelet/pods/u/volumes/kubernetes.io~configmap/settings-dir";
        let plan = plan(&spec(json!([
            bind("/a", "/host/dir", &["rbind", "rprivate", "rw"]),
            bind("/b", "/host/dir", &["rbind", "rprivate", "ro"]),
            bind("/c", "/host/dir", &["rbind", "rslave", "rw"]),
            bind("/d", "/host/dir", &["rbind", "rprivate", "rw"]),
            bind("/e", "/host/file", &["rbind", "rprivate", "ro"]),
            bind("/f", kubelet, &["rbind", "rprivate", "ro"]),
            bind("/g", "/dev/fuse", &["rbind", "rprivate", "rw"]),
        ])))
        .unwrap();
        let shared = |path: &str, read_only, live_mounts| {
            Source::Shared(Shared { path: path.into(), read_only, live_mounts })
        };
        let sources: Vec<_> = plan.volumes.iter().map(|volume| volume.source.clone()).collect();
        assert_eq!(
            sources[..5],
            [
                shared("/host/dir", false, false),
                shared("/host/dir", true, false),
                shared("/host/dir", false, true),
                shared("/host/file", true, false),
                Source::Host(kubelet.into()),
            ]
        );
        let sent: Spec = serde_json::from_slice(&plan.spec).unwrap();
        let source = |n: usize| sent.mounts().as_ref().unwrap()[n].source().clone().unwrap();
        assert_eq!(source(0), source(3));
        assert_eq!(source(6), Path::new("/dev/fuse"), "the guest's");
    }

    #[test]
    fn a_restarted_container_finds_its_volumes_again() {
        let log = |name: &str| {
            let source = format!("/kubelet/pods/u/containers/app/{name}");
            let mounts = json!([bind("/dev/termination-log", &source, &["rbind", "rw"])]);
            plan(&spec(mounts)).unwrap().volumes[0].id.clone()
        };
        assert_eq!(log("00000001"), log("00000002"));
    }

    #[test]
    fn what_a_vm_cannot_have_is_refused_by_name() {
        let socket = error(json!([bind("/s", "/run/docker.sock", &["rbind", "ro"])]));
        assert!(socket.contains("/run/docker.sock"), "{socket}");
        let shared = error(json!([bind("/m", "/host/dir", &["rbind", "rshared"])]));
        assert!(shared.contains("rshared"), "{shared}");
        let typ = error(json!([{"destination": "/n", "source": "x", "type": "nfs"}]));
        assert!(typ.contains("nfs"), "{typ}");
        let gone = error(json!([bind("/g", "/gone", &["rbind", "ro"])]));
        assert!(gone.contains("/gone"), "{gone}");
    }

    #[test]
    fn cdi_devices_are_refused_by_name() {
        let mut value = serde_json::to_value(spec(json!([]))).unwrap();
        value["annotations"] = json!({"cdi.k8s.io/gpus": "vendor.com/gpu=all"});
        let text = plan(&serde_json::from_value(value).unwrap()).unwrap_err().to_string();
        assert!(text.contains("cdi.k8s.io/gpus") && text.contains("vendor.com/gpu=all"), "{text}");
    }

    #[test]
    fn an_image_whose_disk_is_not_described_is_refused() {
        let images = "/run/containerd/io.containerd.grpc.v1.cri/image-volumes/s1";
        let of =
            |name: &str| json!([bind("/i", &format!("{images}/{name}-dir"), &["rbind", "ro"])]);
        let undescribed = error(of("lost"));
        assert!(undescribed.contains("/i (from ") && undescribed.contains("disk.json"));
        let stock = plan(&spec(of("stock"))).unwrap();
        assert!(matches!(stock.volumes[0].source, Source::Shared(_)), "another snapshotter's");
        let described = plan(&spec(of("known"))).unwrap();
        assert_eq!(described.images[0].1, Path::new("/disks/d/disk.json"));
    }

    #[test]
    fn host_namespaces_and_devices_are_refused() {
        let mut value = serde_json::to_value(spec(json!([]))).unwrap();
        value["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}]);
        let host: Spec = serde_json::from_value(value.clone()).unwrap();
        assert!(plan(&host).unwrap_err().to_string().contains("host network"));
        value["linux"]["namespaces"] = json!([{"type": "pid", "path": "/proc/99/ns/pid"}, {"type": "network"}, {"type": "ipc"}]);
        let target: Spec = serde_json::from_value(value.clone()).unwrap();
        assert!(plan(&target).unwrap_err().to_string().contains("/proc/99/ns/pid"));
        value["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "network"}]);
        let host: Spec = serde_json::from_value(value.clone()).unwrap();
        assert!(plan(&host).unwrap_err().to_string().contains("hostIPC"));
        value["linux"]["namespaces"] =
            json!([{"type": "pid"}, {"type": "network"}, {"type": "ipc"}]);
        value["linux"]["devices"] =
            json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]);
        for (access, writable) in [("rwm", true), ("r", false)] {
            let rule =
                json!({"allow": true, "type": "b", "major": 8, "minor": 0, "access": access});
            value["linux"]["resources"] = json!({"devices": [rule]});
            let device: Spec = serde_json::from_value(value.clone()).unwrap();
            let given = BlockDevice { numbers: (8, 0), writable };
            assert_eq!(plan(&device).unwrap().devices, [given]);
        }
        value["linux"]["devices"] =
            json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]);
        let device: Spec = serde_json::from_value(value.clone()).unwrap();
        assert!(plan(&device).unwrap_err().to_string().contains("/dev/kvm"));
        value["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
        let privileged: Spec = serde_json::from_value(value).unwrap();
        assert!(plan(&privileged).is_ok());
    }
}

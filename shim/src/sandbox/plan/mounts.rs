//! How the content of each mount gets into the guest.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use sha2::{Digest as _, Sha256};

use super::super::kubelet::{self, Origin};
use super::{Facts, Kind, Plan, Refusal, refuse};
use crate::volumes::direct::Direct;

/// What the kubelet reads of a termination message (its MaxContainerTerminationMessageLength).
const TERMINATION_MESSAGE: u64 = 4096;
/// Files that CRI gives every container; a container may change its pod's copies.
const POD_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];
/// File systems that the guest mounts by itself.
const GUEST_TYPES: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

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
    /// An empty directory in the guest, of owner and mode as this one of the host, which stays empty; and if it is on
    /// the pod's disk, the most bytes in it, 0 for no limit but the disk's.
    Empty(PathBuf, u64),
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

impl Plan {
    /// Mounts for the pod files that the specification leaves out: with the Sandbox API containerd
    /// mounts only those it has made itself.
    pub(super) fn pod_files(&mut self, known: &[Mount], facts: &Facts<'_>) -> Vec<Mount> {
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

    /// Replaces a mount's source by what it is in the guest.
    pub(super) fn mount(&mut self, mount: &mut Mount, facts: &Facts<'_>) -> Result<(), Refusal> {
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
        let read_only = has("ro") || has("rro");
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
            (Origin::EmptyDir { folder, below: Some(below) }, Kind::Directory, _) => {
                let name = folder.file_name().and_then(|name| name.to_str());
                let limit = name.and_then(|name| facts.empty_dirs.get(name)).copied().unwrap_or(0);
                Ok(Place::Volume(volume(&folder, Source::Empty(folder.clone(), limit)), below))
            }
            (Origin::EmptyDir { below: None, .. }, Kind::Directory, _) => no(kubelet::NO_PART),
            // What the image has there is in its root, and what is written on top goes with it.
            (Origin::ImageVolume, Kind::Directory, _) => {
                Ok(Place::Named(format!("joey-scratch:{}", volume_id(source))))
            }
            (Origin::Image, Kind::Directory, _)
                if let Some(description) = (facts.described)(source) =>
            {
                let name = volume_id(source);
                // A pod may mount one image at several places.
                if self.images.iter().all(|(known, _)| *known != name) {
                    self.images.push((name.clone(), description));
                }
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
            (Origin::TerminationLog, Kind::File, _) if !read_only => {
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
                    read_only,
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

//! The kubelet's and containerd's folders on the host: what kind of volume a mount's source is.
//!
//! ```text
//! …/pods/UID/volumes/kubernetes.io~PLUGIN/NAME           a volume
//! …/pods/UID/volumes/kubernetes.io~csi/NAME/mount        one of a CSI driver's
//! …/pods/UID/volume-subpaths/NAME/CONTAINER/INDEX        a part of one (subPath), mounted there
//! …/pods/UID/containers/CONTAINER/xxxxxxxx               a termination message
//! ```
//! and those of containerd's CRI:
//! ```text
//! …/containers/ID/volumes/NAME                           an image's VOLUME
//! …/image-volumes/SANDBOX/IMAGE                          an image as a volume
//! ```

use std::path::{Path, PathBuf};

use super::plan::{Facts, Kind};
use crate::volumes::direct::Direct;

const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
const CSI: &str = "kubernetes.io~csi";
/// Directory of containerd's CRI plugin, in its root and in its state.
const CRI: &str = "io.containerd.grpc.v1.cri";
/// Volumes whose content the kubelet writes itself.
const PUBLISHED: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// Where the node's own devices, processes and kernel are, of which a virtual machine has its own.
pub(crate) const KERNEL_PLACES: [&str; 3] = ["/dev", "/proc", "/sys"];

/// What a path of the host is to the kubelet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// An emptyDir, and the path below it that is meant, if that is known.
    EmptyDir { folder: PathBuf, below: Option<PathBuf> },
    /// Content that the kubelet has written: configMap, secret, downwardAPI, projected.
    Published,
    /// The file for a container's last words.
    TerminationLog,
    /// A directory that containerd has made on the host for an image's `VOLUME`.
    ImageVolume,
    /// An image as a volume, which containerd has mounted on the host: the snapshot, as it says it is.
    Image,
    /// The node's own devices, processes and kernel, of which a virtual machine has its own.
    Kernel,
    /// Anything else of the host.
    Other,
}

/// Tells what `source` is, which is mounted at `destination`.
pub(super) fn origin(source: &Path, destination: &Path, facts: &Facts<'_>) -> Origin {
    if KERNEL_PLACES.iter().any(|root| source.starts_with(root)) {
        return Origin::Kernel;
    }
    let named = |places: &[(usize, &str)]| {
        let is = |(n, name): &(usize, &str)| {
            source.ancestors().nth(*n).is_some_and(|above| above.ends_with(name))
        };
        places.iter().all(is)
    };
    if named(&[(1, "volumes"), (3, "containers"), (4, CRI)]) {
        return Origin::ImageVolume;
    }
    if named(&[(2, "image-volumes"), (3, CRI)]) {
        return Origin::Image;
    }
    if is_termination_log(source, destination) {
        return Origin::TerminationLog;
    }
    let plugin = |folder: &Path| folder.parent().and_then(Path::file_name).map(ToOwned::to_owned);
    let in_volumes =
        |folder: &Path| folder.ancestors().nth(2).is_some_and(|it| it.ends_with("volumes"));
    if in_volumes(source) {
        return match plugin(source) {
            Some(name) if name == EMPTY_DIR => {
                Origin::EmptyDir { folder: source.to_owned(), below: Some(PathBuf::new()) }
            }
            Some(name) if PUBLISHED.iter().any(|known| name == *known) => Origin::Published,
            _ => Origin::Other,
        };
    }
    let Some((volumes, name)) = volume_of_part(source) else { return Origin::Other };
    let folder = |plugin: &str| Some(volumes.join(plugin).join(&name));
    let there = |folder: &PathBuf| (facts.look)(folder) == Kind::Directory;
    if let Some(folder) = folder(EMPTY_DIR).filter(there) {
        let below =
            (facts.mounted)(source).map(|root| below(&root, &Path::new(EMPTY_DIR).join(&name)));
        return Origin::EmptyDir { folder, below };
    }
    match PUBLISHED.iter().filter_map(|plugin| folder(plugin)).any(|folder| there(&folder)) {
        true => Origin::Published,
        false => Origin::Other,
    }
}

/// Why it is not known which part of a volume is meant: the whole must not be shown for it.
pub(super) const NO_PART: &str = "the kubelet has mounted no part of a volume here";

/// A volume that a CSI driver leaves to the guest.
pub(super) struct DirectVolume {
    /// The volume's path on the host.
    pub(super) folder: PathBuf,
    /// What is to be mounted.
    pub(super) direct: Direct,
    /// The path below it that is meant (subPath).
    pub(super) below: PathBuf,
}

/// Tells whether `source` is such a volume, or a part of one.
///
/// # Errors
/// What the driver has left is not usable, or it is not known which part is meant.
pub(super) fn direct(source: &Path, facts: &Facts<'_>) -> Result<Option<DirectVolume>, String> {
    let find = |path: &Path| (facts.direct)(path).map_err(|error| error.to_string());
    if let Some(direct) = find(source)? {
        let (folder, below) = (source.to_owned(), PathBuf::new());
        return Ok(Some(DirectVolume { folder, direct, below }));
    }
    let Some((volumes, name)) = volume_of_part(source) else { return Ok(None) };
    let place = Path::new(CSI).join(name).join("mount");
    let folder = volumes.join(&place);
    let Some(direct) = find(&folder)? else { return Ok(None) };
    let root = (facts.mounted)(source).ok_or(NO_PART)?;
    Ok(Some(DirectVolume { folder, direct, below: below(&root, &place) }))
}

/// For a part of a volume that the kubelet has mounted: the pod's `volumes` and the volume's name.
fn volume_of_part(source: &Path) -> Option<(PathBuf, PathBuf)> {
    let volume = source.parent()?.parent()?;
    let pod = volume.parent().filter(|above| above.ends_with("volume-subpaths"))?.parent()?;
    Some((pod.join("volumes"), volume.file_name()?.into()))
}

/// The path below a volume whose folder ends so, from the path in its file system: of the host's disk, or of a
/// tmpfs that is the volume itself.
fn below(root: &Path, volume: &Path) -> PathBuf {
    let folder = root.ancestors().filter(|it| it.ends_with(volume)).last();
    let folder = folder.unwrap_or(Path::new("/"));
    root.strip_prefix(folder).unwrap_or(Path::new("")).to_owned()
}

/// The kubelet's file for the termination message, wherever the pod wants it mounted.
fn is_termination_log(source: &Path, destination: &Path) -> bool {
    let name = source.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let above = source.parent().and_then(Path::parent).and_then(Path::file_name);
    let by_kubelet = name.len() == 8
        && name.bytes().all(|byte| byte.is_ascii_hexdigit())
        && above.is_some_and(|above| above == "containers");
    by_kubelet || destination == Path::new("/dev/termination-log")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn of(source: &str) -> Origin {
        let look = |path: &Path| match path.to_str() {
            Some(path) if path.ends_with("empty-dir/cache") => Kind::Directory,
            Some(path) if path.ends_with("configmap/settings") => Kind::Directory,
            _ => Kind::Missing,
        };
        let mounted = |path: &Path| {
            let part = "kubelet/pods/u/volumes/kubernetes.io~empty-dir/cache/a/b";
            match path.file_name()?.to_str()? {
                "0" => Some(format!("/disk/{part}").into()),
                "1" => Some("/a".into()),
                _ => None,
            }
        };
        let files = BTreeMap::new();
        let described = |_: &Path| None;
        let facts = Facts {
            vmm_pid: 1,
            pod_files: &files,
            empty_dirs: &BTreeMap::new(),
            look: &look,
            mounted: &mounted,
            direct: &|_| Ok(None),
            described: &described,
        };
        origin(Path::new(source), Path::new("/x"), &facts)
    }

    #[test]
    fn the_kubelets_folders_are_known() {
        let pod = "/var/lib/kubelet/pods/u";
        let volume =
            |plugin: &str, name: &str| of(&format!("{pod}/volumes/kubernetes.io~{plugin}/{name}"));
        let empty = |below: &str| Origin::EmptyDir {
            folder: format!("{pod}/volumes/kubernetes.io~empty-dir/cache").into(),
            below: Some(below.into()),
        };
        assert_eq!(volume("empty-dir", "cache"), empty(""));
        for plugin in ["configmap", "secret", "projected", "downward-api"] {
            assert_eq!(volume(plugin, "v"), Origin::Published, "{plugin}");
        }
        assert_eq!(volume("csi", "v"), Origin::Other);
        assert_eq!(volume("csi", "v/mount"), Origin::Other);
        let part =
            |name: &str, index: u32| of(&format!("{pod}/volume-subpaths/{name}/app/{index}"));
        assert_eq!(part("cache", 0), empty("a/b"));
        assert_eq!(part("cache", 1), empty("a"), "in a tmpfs");
        assert!(matches!(part("cache", 2), Origin::EmptyDir { below: None, .. }), "not the whole");
        assert_eq!(part("settings", 0), Origin::Published);
        assert_eq!(part("disk", 0), Origin::Other);
        let containerd = "/var/lib/containerd/io.containerd.grpc.v1.cri";
        assert_eq!(of(&format!("{containerd}/containers/c1/volumes/ab12")), Origin::ImageVolume);
        let image = "/run/containerd/io.containerd.grpc.v1.cri/image-volumes/s1/ab12";
        assert_eq!(of(image), Origin::Image);
        assert_eq!(of("/dev/fuse"), Origin::Kernel);
        assert_eq!(of("/devices"), Origin::Other);
        assert_eq!(of(&format!("{pod}/containers/app/0a1b2c3d")), Origin::TerminationLog);
    }
}

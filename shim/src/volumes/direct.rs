//! File systems on disks that the guest mounts in place of the host (Kata's "direct-assigned volumes").
//!
//! A CSI driver that knows of virtual machines does not mount its device on the host. It leaves a file that
//! says what to mount, in a folder named after the path that the kubelet gives to containers:
//!
//! ```text
//! DIRECT_VOLUMES_DIR/base64url(PATH)/mountInfo.json
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use joey_protocol::api;
use serde::Deserialize;
use tokio::sync::Mutex;

use crate::guest::GuestError;
use crate::host::block;
use crate::host::patience::{self, PATIENCE};
use crate::rootfs::{FileSystem, Image};
use crate::sandbox::Guest;
use crate::sandbox::disks::DiskError;
use crate::sandbox::plan::Volume;

const FILE: &str = "mountInfo.json";
/// Most bytes of that file.
const FILE_BYTES: u64 = 64 << 10;
const GROUP: &str = "fsGroup";
const GROUP_POLICY: &str = "fsGroupChangePolicy";
/// What Kata has drivers ask for and is not done here; other metadata is the driver's own.
const NOT_DONE: [&str; 3] = ["encryptionKey", "createFilesystem", "create_filesystem"];
/// Options that say nothing but what is so anyway.
const IDLE: [&str; 5] = ["defaults", "rw", "async", "suid", "exec"];
const COMMON: [&str; 13] = [
    "noatime",
    "nodiratime",
    "relatime",
    "strictatime",
    "nosuid",
    "nodev",
    "noexec",
    "sync",
    "dirsync",
    "discard",
    "nodiscard",
    "noquota",
    "norecovery",
];
const EXT4: [&str; 12] = [
    "data=journal",
    "data=ordered",
    "data=writeback",
    "errors=continue",
    "errors=remount-ro",
    "barrier",
    "nobarrier",
    "noload",
    "acl",
    "noacl",
    "user_xattr",
    "nouser_xattr",
];
const XFS: [&str; 5] = ["nouuid", "inode64", "largeio", "nolargeio", "attr2"];

/// Why a volume's file is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MountInfoError {
    /// It cannot be read, or is not what it should be: the parser's words name the field.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A field.
    #[error("{path}: {field} {value:?}: {reason}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// Why it cannot be.
        reason: &'static str,
    },
}

/// Why a volume is not mounted in the guest.
#[derive(Debug, thiserror::Error)]
pub enum DirectError {
    /// The device.
    #[error("mount {destination}: open {device}: {source}")]
    Open {
        /// The mount.
        destination: PathBuf,
        /// The device.
        device: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No slot for it.
    #[error("mount {destination}: attach {device}: {source}")]
    Attach {
        /// The mount.
        destination: PathBuf,
        /// The device.
        device: PathBuf,
        /// Why.
        source: DiskError,
    },
    /// The guest does not mount it.
    #[error("mount {destination}: {device}: {source}")]
    Guest {
        /// The mount.
        destination: PathBuf,
        /// The device.
        device: PathBuf,
        /// Its words.
        source: GuestError,
    },
}

/// The group that a volume's files are given to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsGroup {
    /// Its number.
    pub gid: u32,
    /// Only if the volume's root is not that group's already (`OnRootMismatch`).
    pub on_root_mismatch: bool,
}

/// A device, and how the guest mounts what is on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Direct {
    /// Block device, or file, of the host.
    pub device: PathBuf,
    /// What is on it.
    pub file_system: String,
    /// Whether neither the guest nor its machine may write to it.
    pub read_only: bool,
    /// Mount options, checked.
    pub options: Vec<String>,
    /// Whom its files are given to.
    pub group: Option<FsGroup>,
}

/// The file as drivers write it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MountInfo {
    #[serde(rename = "volume-type")]
    volume_type: String,
    device: String,
    fstype: String,
    metadata: Option<BTreeMap<String, String>>,
    options: Option<Vec<String>>,
}

/// Finds what a driver has left for a path, if it has.
///
/// # Errors
/// [`MountInfoError`] names the file, the field and its value.
pub fn find(folder: &Path, path: &Path) -> Result<Option<Direct>, MountInfoError> {
    let file = folder.join(URL_SAFE.encode(path.as_os_str().as_bytes())).join(FILE);
    let failed = |reason: String| MountInfoError::File { path: file.clone(), reason };
    let mut text = Vec::new();
    match File::open(&file) {
        Ok(open) => open.take(FILE_BYTES + 1).read_to_end(&mut text),
        // A name that is too long is no driver's either.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENAMETOOLONG)) => {
            return Ok(None);
        }
        Err(error) => Err(error),
    }
    .map_err(|error| failed(error.to_string()))?;
    if text.len() as u64 > FILE_BYTES {
        return Err(failed(format!("larger than {FILE_BYTES} bytes")));
    }
    let info = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
    check(&file, info).map(Some)
}

fn check(file: &Path, info: MountInfo) -> Result<Direct, MountInfoError> {
    let refuse = |field: &str, value: &str, reason| {
        let (field, value) = (field.to_owned(), value.to_owned());
        Err(MountInfoError::Field { path: file.to_owned(), field, value, reason })
    };
    if !["block", "directvol"].contains(&info.volume_type.as_str()) {
        return refuse("volume-type", &info.volume_type, "only block and directvol are supported");
    }
    if !Path::new(&info.device).is_absolute() {
        return refuse("device", &info.device, "must be an absolute path");
    }
    let own = match info.fstype.as_str() {
        "ext4" => &EXT4[..],
        "xfs" => &XFS[..],
        _ => return refuse("fstype", &info.fstype, "only ext4 and xfs are supported"),
    };
    let mut options = info.options.unwrap_or_default();
    let read_only = options.iter().any(|option| option == "ro");
    options.retain(|option| option != "ro" && !IDLE.contains(&option.as_str()));
    let seconds = |option: &str| {
        let seconds = option.strip_prefix("commit=").filter(|_| info.fstype == "ext4");
        seconds.is_some_and(|text| text.parse::<u16>().is_ok())
    };
    let known = |option: &str| COMMON.contains(&option) || own.contains(&option) || seconds(option);
    if let Some(option) = options.iter().find(|option| !known(option)) {
        return refuse(
            "options",
            option,
            "is not a mount option that a volume in a guest can have",
        );
    }
    let metadata = info.metadata.unwrap_or_default();
    if let Some(key) = NOT_DONE.iter().find(|key| metadata.contains_key(**key)) {
        // Its value may be a secret.
        return refuse("metadata", key, "is not supported");
    }
    let on_root_mismatch = match metadata.get(GROUP_POLICY).map(String::as_str) {
        None | Some("" | "Always") => false,
        Some("OnRootMismatch") => true,
        Some(other) => {
            let field = format!("metadata.{GROUP_POLICY}");
            return refuse(&field, other, "must be Always or OnRootMismatch");
        }
    };
    let group = match metadata.get(GROUP).map(|text| (text, text.parse())) {
        None => None,
        Some((_, Ok(gid))) => Some(FsGroup { gid, on_root_mismatch }),
        Some((text, Err(_))) => {
            return refuse(&format!("metadata.{GROUP}"), text, "is not a group's number");
        }
    };
    let (device, file_system) = (info.device.into(), info.fstype);
    Ok(Direct { device, file_system, read_only, options, group })
}

/// Such volumes of a sandbox that the guest has mounted, by name.
#[derive(Debug, Default)]
pub(crate) struct DirectVolumes(Mutex<HashMap<String, Used>>);

#[derive(Debug)]
struct Used {
    slot: u32,
    /// Containers that have it. 0: the guest may have it still.
    users: usize,
}

impl DirectVolumes {
    /// Has the guest mount a volume, or counts one more container that has it.
    pub(crate) async fn open(
        &self,
        guest: &Guest,
        volume: &Volume,
        direct: &Direct,
    ) -> Result<(), DirectError> {
        let mut table = self.0.lock().await;
        if let Some(used) = table.get_mut(&volume.id) {
            used.users += 1;
            return Ok(());
        }
        let (destination, device) = (volume.destination.clone(), direct.device.clone());
        let (path, writable) = (device.clone(), !direct.read_only);
        let opened = patience::within(PATIENCE, move || block::open_path(&path, writable)).await;
        let opened = match opened.and_then(|opened| opened) {
            Ok(opened) => opened,
            Err(source) => return Err(DirectError::Open { destination, device, source }),
        };
        let image = Image {
            disk: opened.file.into(),
            verity: None,
            description: None,
            file_system: FileSystem::None,
            writable,
            key: opened.key,
            lock: None,
        };
        let slot = match guest.disks.attach(guest.vm.as_ref(), image).await {
            Ok(slot) => slot,
            Err(source) => return Err(DirectError::Attach { destination, device, source }),
        };
        let group = direct.group.map(|group| api::FsGroup {
            gid: group.gid,
            on_root_mismatch: group.on_root_mismatch,
            ..Default::default()
        });
        let file_system = direct.file_system.clone();
        let request = api::MountVolumeRequest {
            volume_id: volume.id.clone(),
            disk: Some(api::Disk { slot, file_system, writable, ..Default::default() }).into(),
            bytes: opened.bytes,
            options: direct.options.clone(),
            fs_group: group.into(),
            ..Default::default()
        };
        if let Err(source) = guest.client.mount_volume(&request).await {
            let refused = matches!(source, GuestError::Refused { .. });
            if refused {
                guest.disks.release(guest.vm.as_ref(), slot).await;
            } else {
                // It may yet mount it: the slot stays the volume's.
                table.insert(volume.id.clone(), Used { slot, users: 0 });
            }
            return Err(DirectError::Guest { destination, device, source });
        }
        table.insert(volume.id.clone(), Used { slot, users: 1 });
        Ok(())
    }

    /// Gives a container's claim back; the last one has the guest write out and unmount the volume, and
    /// takes its device away.
    pub(crate) async fn release(&self, guest: &Guest, id: &str) {
        let mut table = self.0.lock().await;
        let Some(used) = table.get_mut(id) else { return };
        used.users = used.users.saturating_sub(1);
        if used.users > 0 {
            return;
        }
        let slot = used.slot;
        let request = api::UnmountVolumeRequest { volume_id: id.to_owned(), ..Default::default() };
        match guest.client.unmount_volume(&request).await {
            Ok(()) => {
                table.remove(id);
                guest.disks.release(guest.vm.as_ref(), slot).await;
            }
            // The device stays where it is, and the next container finds it mounted.
            Err(error) => tracing::warn!(volume = id, %error, "volume not unmounted in the guest"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(info: &Value) -> Result<Option<Direct>, MountInfoError> {
        let folder = tempfile::tempdir().unwrap();
        let path = Path::new("/pods/u/volumes/kubernetes.io~csi/pv?/mount");
        // base64's alphabet for names of files, with padding, as Go's URLEncoding.
        let name = "L3BvZHMvdS92b2x1bWVzL2t1YmVybmV0ZXMuaW9-Y3NpL3B2Py9tb3VudA==";
        std::fs::create_dir(folder.path().join(name)).unwrap();
        let file = folder.path().join(name).join(FILE);
        std::fs::write(&file, info.to_string()).unwrap();
        assert_eq!(find(folder.path(), Path::new("/other")), Ok(None));
        let long = format!("/{}", "x".repeat(300));
        assert_eq!(find(folder.path(), Path::new(&long)), Ok(None));
        find(folder.path(), path)
    }

    fn info() -> Value {
        json!({"volume-type": "block", "device": "/dev/sdd", "fstype": "ext4"})
    }

    #[test]
    fn what_drivers_write_is_read() {
        let plain = of(&info()).unwrap().unwrap();
        let expected = Direct {
            device: "/dev/sdd".into(),
            file_system: "ext4".to_owned(),
            read_only: false,
            options: Vec::new(),
            group: None,
        };
        assert_eq!(plain, expected);
        let mut full = info();
        full["volume-type"] = "directvol".into();
        full["fstype"] = "xfs".into();
        full["options"] = json!(["ro", "defaults", "nouuid", "noatime"]);
        full["metadata"] =
            json!({"fsGroup": "3000", "fsGroupChangePolicy": "OnRootMismatch", "volume": "v1"});
        let full = of(&full).unwrap().unwrap();
        assert!(full.read_only);
        assert_eq!(full.options, ["nouuid", "noatime"]);
        assert_eq!(full.group, Some(FsGroup { gid: 3000, on_root_mismatch: true }));
    }

    #[test]
    fn what_cannot_be_is_refused_by_file_field_and_value() {
        for (field, value, named) in [
            ("volume-type", json!("spdkvol"), "volume-type \"spdkvol\""),
            ("device", json!("sdd"), "device \"sdd\""),
            ("fstype", json!("ntfs"), "fstype \"ntfs\""),
            ("options", json!(["loop=/dev/loop0"]), "options \"loop=/dev/loop0\""),
            ("options", json!(["commit=x"]), "options \"commit=x\""),
            ("options", json!(["nouuid"]), "options \"nouuid\""),
            ("options", json!("ro"), "invalid type: string \"ro\""),
            ("metadata", json!({"fsGroup": "-1"}), "metadata.fsGroup \"-1\""),
            ("metadata", json!({"fsGroupChangePolicy": "x"}), "metadata.fsGroupChangePolicy \"x\""),
            ("metadata", json!({"encryptionKey": "s3"}), "metadata \"encryptionKey\""),
            ("fsType", json!("ext4"), "unknown field `fsType`"),
        ] {
            let mut info = info();
            info[field] = value;
            let error = of(&info).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("/mountInfo.json: "), "{error}");
            assert!(!error.contains("s3"), "{error}");
        }
        let error = of(&json!({"device": "/dev/sdd"})).unwrap_err().to_string();
        assert!(error.contains("volume-type"), "{error}");
        assert!(of(&json!("x".repeat(70_000))).unwrap_err().to_string().contains("larger than"));
    }
}

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
            empty_dirs: &BTreeMap::from([("cache-dir".to_owned(), 5)]),
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
    let mounts = json!([bind("/whole", source, &["rbind", "ro"]), bind("/part", part, &["rbind"])]);
    let plan = plan(&spec(mounts)).unwrap();
    let disks = plan.volumes.iter().filter(|it| it.source == Source::Direct(direct()));
    assert_eq!(disks.count(), 1);
    let sent: Spec = serde_json::from_slice(&plan.spec).unwrap();
    let sources: Vec<_> = sent.mounts().iter().flatten().map(|it| it.source().clone()).collect();
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
    assert!(sources[2..].iter().all(|source| source.starts_with("joey-volume:")), "{sources:?}");
}

#[test]
fn an_empty_dir_is_the_guests_own() {
    let source = "/kubelet/pods/u/volumes/kubernetes.io~empty-dir/cache-dir";
    for mode in ["rw", "ro"] {
        let plan = plan(&spec(json!([bind("/cache", source, &["rbind", mode])]))).unwrap();
        assert_eq!(plan.volumes[0].source, Source::Empty(source.into(), 5));
    }
    let part = "/kubelet/pods/u/volume-subpaths/cache-dir/app/0-dir";
    let plan = plan(&spec(json!([bind("/part", part, &["rbind", "ro"])]))).unwrap();
    assert_eq!(plan.volumes[0].source, Source::Empty(source.into(), 5));
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
        bind("/h", "/host/other/dir", &["rbind", "rprivate", "rro"]),
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
    assert_eq!(sources[5], shared("/host/other/dir", true, false), "recursively");
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
fn profiles_of_the_host_are_refused_but_containerds_own() {
    let with = |profile: &str| {
        let mut value = serde_json::to_value(spec(json!([]))).unwrap();
        value["process"]["apparmorProfile"] = json!(profile);
        plan(&serde_json::from_value(value).unwrap())
    };
    assert!(with("cri-containerd.apparmor.d").is_ok());
    let refused = with("localhost-profile").unwrap_err().to_string();
    assert!(
        refused.contains("apparmorProfile") && refused.contains("localhost-profile"),
        "{refused}"
    );
}

#[test]
fn an_image_whose_disk_is_not_described_is_refused() {
    let images = "/run/containerd/io.containerd.grpc.v1.cri/image-volumes/s1";
    let of = |name: &str| json!([bind("/i", &format!("{images}/{name}-dir"), &["rbind", "ro"])]);
    let undescribed = error(of("lost"));
    assert!(undescribed.contains("/i (from ") && undescribed.contains("disk.json"));
    let stock = plan(&spec(of("stock"))).unwrap();
    assert!(matches!(stock.volumes[0].source, Source::Shared(_)), "another snapshotter's");
    let known = format!("{images}/known-dir");
    let twice = json!([bind("/i", &known, &["rbind", "ro"]), bind("/j", &known, &["rbind", "ro"])]);
    let described = plan(&spec(twice)).unwrap();
    assert_eq!(described.images.len(), 1, "one disk, however often it is mounted");
    assert_eq!(described.images[0].1, Path::new("/disks/d/disk.json"));
}

#[test]
fn host_namespaces_and_devices_are_refused() {
    let mut value = serde_json::to_value(spec(json!([]))).unwrap();
    value["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}]);
    let host: Spec = serde_json::from_value(value.clone()).unwrap();
    assert!(plan(&host).unwrap_err().to_string().contains("host network"));
    value["linux"]["namespaces"] =
        json!([{"type": "pid", "path": "/proc/99/ns/pid"}, {"type": "network"}, {"type": "ipc"}]);
    let target: Spec = serde_json::from_value(value.clone()).unwrap();
    assert!(plan(&target).unwrap_err().to_string().contains("/proc/99/ns/pid"));
    value["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "network"}]);
    let host: Spec = serde_json::from_value(value.clone()).unwrap();
    assert!(plan(&host).unwrap_err().to_string().contains("hostIPC"));
    value["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "network"}, {"type": "ipc"}]);
    value["linux"]["devices"] = json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]);
    for (access, writable) in [("rwm", true), ("r", false)] {
        let rule = json!({"allow": true, "type": "b", "major": 8, "minor": 0, "access": access});
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

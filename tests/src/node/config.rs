//! The configuration files of a test node: containerd 1.7 and 2.1, CNI, Joey. Pure text.

use std::path::Path;

use crate::paths;

/// containerd releases the tests run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 1.7, the long-term release of Debian 13.
    V1_7,
    /// 2.1, of Debian's next release.
    V2_1,
}

impl Version {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::V1_7, Self::V2_1];

    /// As on the command line: `1.7`.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
        }
    }
}

impl std::str::FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|version| version.name() == text)
            .ok_or_else(|| format!("containerd {text} is not one of 1.7, 2.1"))
    }
}

/// Name of the image that holds a pod's namespaces with handler runc.
pub const PAUSE: &str = "localhost/pause:1";

/// The handler whose containers have the limits of [`limits`].
pub const LIMITED: &str = "joey-limited";
/// Its base specification, below the node's folder.
pub const LIMITS: &str = "limits.json";

/// containerd's own default specification with resource limits of processes.
pub fn limits(default: &str) -> serde_json::Result<String> {
    let mut spec: serde_json::Value = serde_json::from_str(default)?;
    let limit = |name: &str, soft: u64, hard: u64| serde_json::json!({"type": format!("RLIMIT_{name}"), "soft": soft, "hard": hard});
    spec["process"]["rlimits"] = serde_json::json!([
        limit("NOFILE", 1234, 4321),
        limit("CORE", 0, 0),
        limit("MEMLOCK", 65536, 131_072)
    ]);
    serde_json::to_string(&spec)
}

/// containerd's own snapshotter.
pub const OVERLAYFS: &str = "overlayfs";

/// containerd's configuration for a node in `dir`, with this snapshotter for whatever names none.
pub fn containerd(version: Version, dir: &Path, default: &str) -> String {
    let dir = dir.display();
    let common = format!(
        r#"root = "{dir}/root"
state = "{dir}/state"
[grpc]
address = "{dir}/c.sock"
[ttrpc]
address = "{dir}/c.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
path = "{dir}/opt"
[plugins."io.containerd.nri.v1.nri"]
disable = true
[plugins."io.containerd.grpc.v1.cri"]
stream_server_address = "127.0.0.1"
stream_server_port = "0"
disable_tcp_service = false
"#
    );
    let plugins = snapshotter_plugins(version, &dir.to_string());
    match version {
        Version::V1_7 => {
            let cri = r#"plugins."io.containerd.grpc.v1.cri""#;
            format!(
                "version = 2\n{common}sandbox_image = \"{PAUSE}\"\nrestrict_oom_score_adj = true\n\
                 [{cri}.cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = \"{dir}/cni\"\n\
                 [{cri}.containerd]\ndefault_runtime_name = \"runc\"\nsnapshotter = \"{default}\"\n{}",
                runtimes(&format!("{cri}.containerd.runtimes"), version, &dir.to_string())
            ) + &plugins
        }
        Version::V2_1 => {
            let cri = r#"plugins."io.containerd.cri.v1.runtime""#;
            format!(
                "version = 3\n{common}\
                 [plugins.\"io.containerd.cri.v1.images\"]\nsnapshotter = \"{default}\"\n\
                 [plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"{PAUSE}\"\n\
                 [{cri}]\nrestrict_oom_score_adj = true\n\
                 [{cri}.cni]\nbin_dirs = [\"/usr/lib/cni\"]\nconf_dir = \"{dir}/cni\"\n\
                 [{cri}.containerd]\ndefault_runtime_name = \"runc\"\n{}",
                runtimes(&format!("{cri}.containerd.runtimes"), version, &dir.to_string())
            ) + &plugins
        }
    }
}

/// joey-snapshotter's configuration.
pub fn snapshotter(dir: &Path) -> String {
    format!(
        "root = \"{0}/snapshots\"\nsocket = \"{0}/s.sock\"\ncontainerd = \"{0}/c.sock\"\nrun_dir = \"{0}/jrun\"\n",
        dir.display()
    )
}

/// joey-snapshotter beside containerd's own: for what asks for it by name.
fn snapshotter_plugins(version: Version, dir: &str) -> String {
    let mut text = format!(
        r#"
[proxy_plugins.joey]
type = "snapshot"
address = "{dir}/s.sock"
exports = {{ root = "{dir}/snapshots" }}
[proxy_plugins.joey-diff]
type = "diff"
address = "{dir}/s.sock"
[plugins."io.containerd.service.v1.diff-service"]
default = ["joey-diff", "walking"]
"#
    );
    if version == Version::V2_1 {
        for (snapshotter, differ) in [("overlayfs", "walking"), ("joey", "joey-diff")] {
            text += &format!(
                "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n\
                 platform = \"linux/amd64\"\nsnapshotter = \"{snapshotter}\"\n\
                 differ = \"{differ}\"\n"
            );
        }
        let others = ["runc", "joey-overlayfs", "joey-sandboxed"].map(|it| (it, OVERLAYFS));
        for (handler, snapshotter) in
            [("joey", "joey"), (LIMITED, "joey")].into_iter().chain(others)
        {
            text += &format!(
                "[plugins.\"io.containerd.cri.v1.images\".runtime_platforms.{handler}]\n\
                 platform = \"linux/amd64\"\nsnapshotter = \"{snapshotter}\"\n"
            );
        }
    }
    text
}

fn runtimes(section: &str, version: Version, dir: &str) -> String {
    let shim = paths::shim();
    let joey = |name: &str, more: &str| {
        format!(
            "[{section}.{name}]\nruntime_type = \"io.containerd.joey.v2\"\nruntime_path = \"{}\"\n\
             pod_annotations = [\"io.joey.*\", \"tenancy.x-k8s.io/*\", \"kubernetes.io/*-bandwidth\", \
             \"traffic.sidecar.istio.io/*\"]\n{more}",
            shim.display()
        )
    };
    // With a sandboxer of its own containerd 2.1 takes every runtime's options for runc's: there the
    // configuration comes by JOEY_CONFIG alone.
    let options = format!(
        "snapshotter = \"joey\"\n[{section}.joey.options]\nConfigPath = \"{dir}/joey.toml\"\n"
    );
    let overlayfs = format!("snapshotter = \"{OVERLAYFS}\"\n");
    let mut text =
        format!("[{section}.runc]\nruntime_type = \"io.containerd.runc.v2\"\n{overlayfs}");
    text += &joey("joey", &options);
    // The shim's own conversion of what containerd's own snapshotter has unpacked.
    text += &joey("joey-overlayfs", &overlayfs);
    text += &joey(
        LIMITED,
        &format!("snapshotter = \"joey\"\nbase_runtime_spec = \"{dir}/{LIMITS}\"\n"),
    );
    if version == Version::V2_1 {
        text += &joey("joey-sandboxed", &format!("{overlayfs}sandboxer = \"shim\"\n"));
    }
    text
}

/// A bridge network with IPv4 and IPv6 addresses.
pub fn cni(dir: &Path) -> String {
    serde_json::json!({
        "cniVersion": "0.4.0",
        "name": "joey-test",
        "plugins": [{
            "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": dir.join("ipam"),
                "ranges": [
                    [{ "subnet": "10.88.0.0/16", "gateway": "10.88.0.1" }],
                    [{ "subnet": "fd88::/64", "gateway": "fd88::1" }]
                ],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]
            }
        }]
    })
    .to_string()
}

/// What all tenants of a test node may reach: the node itself, at the pods' router.
pub const POLICY: &str = r#"apiVersion: joey.io/v1
kind: NodePolicy
metadata: {name: test-node}
spec:
  services:
  - name: node
    addresses: [10.88.0.1, "fd88::1"]
    ports: [any]
"#;

/// Joey's configuration: every folder moved below the node's.
pub fn joey(dir: &Path) -> String {
    let guest = paths::guest();
    format!(
        "state_dir = \"{0}/joey\"\nrun_dir = \"{0}/jrun\"\nguest_dir = \"{1}\"\n\
         direct_volumes_dir = \"{0}/direct-volumes\"\n",
        dir.display(),
        guest.display()
    )
}

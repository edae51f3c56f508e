//! CRI's `PodSandboxConfig`, as far as a sandbox needs it: containerd's Sandbox API passes it whole.
//!
//! Decoded by hand with protobuf's reader: nine fields of a message whose generated code would be
//! larger than the rest of the shim's API. Field numbers are those of `cri-api`'s `runtime.v1`.

use std::collections::{BTreeMap, HashMap};

use protobuf::{CodedInputStream, Error};

use crate::host;
use crate::sandbox::lifecycle::SandboxRequest;

/// CRI's NamespaceMode: the node's own.
const NODE: u64 = 2;
/// Annotations that containerd's pause containers carry; the Sandbox API leaves them to the shim.
const NAME: &str = "io.kubernetes.cri.sandbox-name";
const NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PodConfig {
    hostname: String,
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
    annotations: HashMap<String, String>,
    cgroup_parent: String,
    sysctls: HashMap<String, String>,
    cpu_period: u64,
    cpu_quota: u64,
    cpu_shares: u64,
    memory: u64,
    network_mode: u64,
    pid_mode: u64,
    ipc_mode: u64,
}

/// Calls `field` for each field of a message: its number and the reader placed at its value.
fn fields(
    bytes: &[u8],
    mut field: impl FnMut(u32, &mut CodedInputStream<'_>) -> Result<bool, Error>,
) -> Result<(), Error> {
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        if !field(tag >> 3, &mut input)? {
            protobuf::rt::skip_field_for_tag(tag, &mut input)?;
        }
    }
    Ok(())
}

/// Reads one entry of a `map<string, string>`.
fn pair(bytes: &[u8]) -> Result<(String, String), Error> {
    let (mut key, mut value) = (String::new(), String::new());
    fields(bytes, |number, input| {
        match number {
            1 => key = input.read_string()?,
            2 => value = input.read_string()?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok((key, value))
}

/// Decodes a PodSandboxConfig.
///
/// # Errors
/// It is not a protobuf message of that form.
pub fn decode(bytes: &[u8]) -> Result<PodConfig, Error> {
    let mut pod = PodConfig::default();
    fields(bytes, |number, input| {
        match number {
            1 => pod.metadata(&input.read_bytes()?)?,
            2 => pod.hostname = input.read_string()?,
            4 => pod.dns(&input.read_bytes()?)?,
            7 => pod.annotations.extend([pair(&input.read_bytes()?)?]),
            8 => pod.linux(&input.read_bytes()?)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(pod)
}

impl PodConfig {
    fn metadata(&mut self, bytes: &[u8]) -> Result<(), Error> {
        fields(bytes, |number, input| {
            let key = match number {
                1 => NAME,
                3 => NAMESPACE,
                _ => return Ok(false),
            };
            self.annotations.insert(key.to_owned(), input.read_string()?);
            Ok(true)
        })
    }

    fn dns(&mut self, bytes: &[u8]) -> Result<(), Error> {
        fields(bytes, |number, input| {
            let list = match number {
                1 => &mut self.servers,
                2 => &mut self.searches,
                3 => &mut self.options,
                _ => return Ok(false),
            };
            list.push(input.read_string()?);
            Ok(true)
        })
    }

    fn linux(&mut self, bytes: &[u8]) -> Result<(), Error> {
        fields(bytes, |number, input| {
            match number {
                1 => self.cgroup_parent = input.read_string()?,
                2 => self.security(&input.read_bytes()?)?,
                3 => self.sysctls.extend([pair(&input.read_bytes()?)?]),
                5 => self.resources(&input.read_bytes()?)?,
                _ => return Ok(false),
            }
            Ok(true)
        })
    }

    fn security(&mut self, bytes: &[u8]) -> Result<(), Error> {
        fields(bytes, |number, input| {
            if number != 1 {
                return Ok(false);
            }
            let options = input.read_bytes()?;
            fields(&options, |number, input| {
                match number {
                    1 => self.network_mode = input.read_uint64()?,
                    2 => self.pid_mode = input.read_uint64()?,
                    3 => self.ipc_mode = input.read_uint64()?,
                    _ => return Ok(false),
                }
                Ok(true)
            })?;
            Ok(true)
        })
    }

    fn resources(&mut self, bytes: &[u8]) -> Result<(), Error> {
        fields(bytes, |number, input| {
            match number {
                1 => self.cpu_period = input.read_uint64()?,
                2 => self.cpu_quota = input.read_uint64()?,
                3 => self.cpu_shares = input.read_uint64()?,
                4 => self.memory = input.read_uint64()?,
                _ => return Ok(false),
            }
            Ok(true)
        })
    }

    /// What the sandbox is to be; the network namespace is told beside it. What it cannot have is refused when it
    /// is started.
    pub fn into_request(mut self) -> SandboxRequest {
        self.hostname = host::pod_name(Some(self.hostname));
        let files = self.files();
        let mut annotations = self.annotations;
        let resources = [
            ("cpu-period", self.cpu_period),
            ("cpu-quota", self.cpu_quota),
            ("cpu-shares", self.cpu_shares),
            ("memory", self.memory),
        ];
        for (name, value) in resources.into_iter().filter(|(_, value)| *value > 0) {
            // The kubelet's "no quota" is -1, which the wire format shows as its two's complement.
            let signed = i64::from_ne_bytes(value.to_ne_bytes());
            annotations.insert(format!("io.kubernetes.cri.sandbox-{name}"), signed.to_string());
        }
        SandboxRequest {
            netns: None,
            host_network: self.network_mode == NODE,
            host_ipc: self.ipc_mode == NODE,
            host_pid: self.pid_mode == NODE,
            hostname: self.hostname,
            cgroup_parent: self.cgroup_parent,
            sysctls: self.sysctls.into_iter().collect(),
            annotations,
            files,
        }
    }

    /// The pod's /etc files, as containerd's pause mode writes them.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut resolv = String::new();
        if !self.searches.is_empty() {
            resolv.push_str(&format!("search {}\n", self.searches.join(" ")));
        }
        for server in &self.servers {
            resolv.push_str(&format!("nameserver {server}\n"));
        }
        if !self.options.is_empty() {
            resolv.push_str(&format!("options {}\n", self.options.join(" ")));
        }
        if resolv.is_empty() {
            // As in a pod without dnsConfig: the node's own.
            resolv = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        }
        let hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
        BTreeMap::from([
            ("/etc/hostname".to_owned(), format!("{}\n", self.hostname).into_bytes()),
            ("/etc/hosts".to_owned(), hosts.as_bytes().to_vec()),
            ("/etc/resolv.conf".to_owned(), resolv.into_bytes()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Encodes a length-delimited field.
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        out.extend_from_slice(bytes);
        out
    }

    #[test]
    fn the_hosts_namespaces_are_noticed() {
        for (number, host) in [(1, "network"), (2, "pid"), (3, "ipc"), (4, "")] {
            let pod = field(8, &field(2, &field(1, &[number << 3, 2])));
            let request = decode(&pod).unwrap().into_request();
            let found = (request.host_network, request.host_pid, request.host_ipc);
            assert_eq!(found, (host == "network", host == "pid", host == "ipc"));
        }
    }

    #[test]
    fn the_fields_of_a_pod_are_found_and_the_rest_skipped() {
        let metadata = [field(1, b"web"), field(2, b"uid-1"), field(3, b"shop")].concat();
        let dns = [field(1, b"10.0.0.10"), field(2, b"svc.local")].concat();
        let linux = [field(1, b"/kubepods/pod1"), vec![5 << 3 | 2, 3, 4 << 3, 0x80, 0x08]].concat();
        let bytes = [
            field(1, &metadata),
            field(2, b"web-0"),
            field(3, b"/var/log"),
            field(4, &dns),
            field(7, &[field(1, b"io.joey.vcpus"), field(2, b"2")].concat()),
            field(8, &linux),
        ]
        .concat();
        let request = decode(&bytes).unwrap().into_request();
        assert_eq!(request.hostname, "web-0");
        assert_eq!(request.cgroup_parent, "/kubepods/pod1");
        assert_eq!(request.annotations["io.joey.vcpus"], "2");
        assert_eq!(request.annotations[NAMESPACE], "shop");
        assert_eq!(request.annotations["io.kubernetes.cri.sandbox-memory"], "1024");
        let resolv = String::from_utf8(request.files["/etc/resolv.conf"].clone()).unwrap();
        assert_eq!(resolv, "search svc.local\nnameserver 10.0.0.10\n");
    }

    #[test]
    fn a_pod_without_a_host_name_has_the_nodes() {
        let request = decode(&[]).unwrap().into_request();
        assert!(!request.hostname.is_empty());
        assert_eq!(request.files["/etc/hostname"], format!("{}\n", request.hostname).as_bytes());
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        assert!(decode(&[0xff, 0xff, 0xff]).is_err());
        let host = field(8, &field(2, &field(1, &[1 << 3, 2])));
        assert!(decode(&host).unwrap().into_request().host_network);
    }
}

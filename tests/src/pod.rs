//! Pods and containers as a kubelet makes them, for tests: short to write, everything overridable.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatus, DnsConfig, ImageSpec,
    KeyValue, LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata,
};

use crate::cri::Output;
use crate::image;
use crate::node::{Node, cgroups};
use crate::stream::{Forwarded, Session};

/// How long tests wait for what should come quickly.
pub const SOON: Duration = Duration::from_secs(60);

/// Another number each time, for names.
pub fn serial() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A pod's configuration with the kubelet's defaults.
pub fn config(node: &Node, name: &str) -> PodSandboxConfig {
    let uid = format!("{name}-{}-{}", std::process::id(), serial());
    let namespaces = NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..NamespaceOption::default()
    };
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: uid.clone(),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory: node.dir().join("logs").join(&uid).display().to_string(),
        dns_config: Some(DnsConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["default.svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        }),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: format!("{}/pod-{uid}", node.cgroup()),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

/// The same for a pod of a namespace, with annotations.
pub fn annotated(
    node: &Node,
    name: &str,
    namespace: &str,
    annotations: &[(&str, &str)],
) -> PodSandboxConfig {
    let mut config = config(node, name);
    namespace.clone_into(&mut config.metadata.get_or_insert_default().namespace);
    let annotations = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    config.annotations.extend(annotations);
    config
}

/// A container's configuration that runs `command` in the busybox image.
pub fn container(name: &str, command: &[&str]) -> ContainerConfig {
    let security = LinuxContainerSecurityContext {
        namespace_options: Some(NamespaceOption {
            pid: NamespaceMode::Container.into(),
            ..NamespaceOption::default()
        }),
        ..LinuxContainerSecurityContext::default()
    };
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(ImageSpec { image: image::BUSYBOX.into(), ..ImageSpec::default() }),
        command: command.iter().map(ToString::to_string).collect(),
        log_path: format!("{name}-{}.log", serial()),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources::default()),
            security_context: Some(security),
        }),
        ..ContainerConfig::default()
    }
}

/// A container that runs a shell script.
pub fn script(name: &str, text: &str) -> ContainerConfig {
    container(name, &["sh", "-c", text])
}

/// Adds an environment variable.
pub fn with_env(mut config: ContainerConfig, key: &str, value: &str) -> ContainerConfig {
    config.envs.push(KeyValue { key: key.into(), value: value.into() });
    config
}

/// The part of a container's configuration that says how it is confined.
pub fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

/// The part of a container's configuration that limits it.
pub fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    config.linux.get_or_insert_default().resources.get_or_insert_default()
}

/// A running sandbox; removed when dropped.
pub struct Pod<'n> {
    node: &'n Node,
    /// containerd's id.
    pub id: String,
    /// How it was asked for.
    pub config: PodSandboxConfig,
    removed: bool,
}

impl<'n> Pod<'n> {
    /// Runs a pod with the kubelet's defaults.
    pub fn run(node: &'n Node, handler: &str, name: &str) -> Result<Self> {
        Self::run_with(node, handler, config(node, name))
    }

    /// Runs a pod with this configuration.
    pub fn run_with(node: &'n Node, handler: &str, config: PodSandboxConfig) -> Result<Self> {
        let cgroup = config.linux.as_ref().map(|linux| linux.cgroup_parent.clone());
        let cgroup = cgroup.unwrap_or_default();
        cgroups::make(&cgroup)?;
        fs::create_dir_all(&config.log_directory)?;
        match node.cri.run_pod(handler, &config) {
            Ok(id) => Ok(Self { node, id, config, removed: false }),
            Err(error) => {
                cgroups::remove(&cgroup);
                let _ = fs::remove_dir_all(&config.log_directory);
                Err(error)
            }
        }
    }

    /// The pod's cgroup on the host.
    pub fn cgroup(&self) -> &str {
        self.config.linux.as_ref().map_or("", |linux| &linux.cgroup_parent)
    }

    /// The pod's addresses, the first one's family first.
    pub fn addresses(&self) -> Result<Vec<String>> {
        let network = self.node.cri.pod_status(&self.id)?.network.unwrap_or_default();
        let more = network.additional_ips.into_iter().map(|address| address.ip);
        Ok(std::iter::once(network.ip).chain(more).collect())
    }

    /// Talks to a port of the pod's localhost.
    pub fn forward(&self, port: i32) -> Result<Forwarded> {
        Forwarded::open(self.node, &self.node.cri.forward_url(&self.id, port)?)
    }

    /// Creates a container.
    pub fn create(&self, config: &ContainerConfig) -> Result<Container<'n>> {
        let id = self.node.cri.create(&self.id, &self.config, config)?;
        let log = PathBuf::from(&self.config.log_directory).join(&config.log_path);
        Ok(Container { node: self.node, id, log })
    }

    /// Creates and starts a container.
    pub fn start(&self, config: &ContainerConfig) -> Result<Container<'n>> {
        let container = self.create(config)?;
        self.node.cri.start(&container.id)?;
        Ok(container)
    }

    /// Runs a script to its end; its log and exit code.
    pub fn script(&self, text: &str) -> Result<Output> {
        self.finish(&script(&format!("script{}", serial()), text))
    }

    /// Runs a container to its end; its log and exit code.
    pub fn finish(&self, config: &ContainerConfig) -> Result<Output> {
        let container = self.start(config)?;
        let status = container.wait(SOON)?;
        let (stdout, stderr) = container.logs()?;
        self.node.cri.remove(&container.id)?;
        Ok(Output { stdout, stderr, code: status.exit_code })
    }

    /// Stops and removes the pod and its cgroup.
    pub fn remove(mut self) -> Result<()> {
        self.removed = true;
        self.node.cri.stop_pod(&self.id)?;
        self.node.cri.remove_pod(&self.id)?;
        cgroups::remove(self.cgroup());
        fs::remove_dir_all(&self.config.log_directory)?;
        Ok(())
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if !self.removed {
            let _ = self.node.cri.stop_pod(&self.id);
            let _ = self.node.cri.remove_pod(&self.id);
            cgroups::remove(self.cgroup());
            let _ = fs::remove_dir_all(&self.config.log_directory);
        }
    }
}

/// A container in a pod.
pub struct Container<'n> {
    node: &'n Node,
    /// containerd's id.
    pub id: String,
    /// Its log file on the node.
    pub log: PathBuf,
}

impl Container<'_> {
    /// Its state.
    pub fn status(&self) -> Result<ContainerStatus> {
        self.node.cri.status(&self.id)
    }

    /// Waits for its end.
    pub fn wait(&self, deadline: Duration) -> Result<ContainerStatus> {
        let end = Instant::now() + deadline;
        loop {
            let status = self.status()?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!("container {} still runs after {deadline:?}", self.id);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until its standard output holds `text`.
    pub fn wait_output(&self, text: &str, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            let (stdout, stderr) = self.logs()?;
            if String::from_utf8_lossy(&stdout).contains(text) {
                return Ok(());
            }
            if Instant::now() > end {
                let seen = String::from_utf8_lossy(&stdout).into_owned();
                let errors = String::from_utf8_lossy(&stderr).into_owned();
                bail!("no {text:?} in the output within {deadline:?}; {seen:?}, errors {errors:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it wrote so far: standard output and standard error.
    pub fn logs(&self) -> Result<(Vec<u8>, Vec<u8>)> {
        Ok(parse_log(&fs::read(&self.log).unwrap_or_default()))
    }

    /// Runs a command in it.
    pub fn exec(&self, command: &[&str]) -> Result<Output> {
        self.node.cri.exec(&self.id, command, SOON)
    }

    /// Runs a command in it that may take long.
    pub fn exec_for(&self, command: &[&str], deadline: Duration) -> Result<Output> {
        self.node.cri.exec(&self.id, command, deadline)
    }

    /// Runs a shell command in it.
    pub fn sh(&self, text: &str) -> Result<Output> {
        self.exec(&["sh", "-c", text])
    }

    /// Runs a command in it and talks to it.
    pub fn exec_live(&self, command: &[&str], tty: bool) -> Result<Session> {
        Session::open(self.node, &self.node.cri.exec_url(&self.id, command, tty)?)
    }

    /// Talks to its first process.
    pub fn attach(&self, tty: bool) -> Result<Session> {
        Session::open(self.node, &self.node.cri.attach_url(&self.id, tty)?)
    }

    /// Stops and removes it.
    pub fn remove(self, grace: Duration) -> Result<()> {
        self.node.cri.stop(&self.id, grace)?;
        self.node.cri.remove(&self.id)
    }
}

/// Splits a log in CRI's format: `time stream P|F text`.
fn parse_log(bytes: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let mut streams: HashMap<&[u8], Vec<u8>> = HashMap::new();
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let mut fields = line.splitn(4, |byte| *byte == b' ');
        let (Some(_), Some(stream), Some(tag), Some(text)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let text = if tag == b"P" { text.strip_suffix(b"\n").unwrap_or(text) } else { text };
        streams.entry(stream).or_default().extend_from_slice(text);
    }
    let mut take = |name: &[u8]| streams.remove(name).unwrap_or_default();
    (take(b"stdout"), take(b"stderr"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_are_joined_by_stream() {
        let log = b"t stdout P ab\nt stderr F oops now\nt stdout F cd\nt stdout F e\n";
        assert_eq!(parse_log(log), (b"abcd\ne\n".to_vec(), b"oops now\n".to_vec()));
    }
}

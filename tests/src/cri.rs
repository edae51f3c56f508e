//! The kubelet's runtime interface, as blocking calls with a deadline on each.

use std::future::Future;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    AttachRequest, ContainerConfig, ContainerStats, ContainerStatsRequest, ContainerStatus,
    ContainerStatusRequest, CreateContainerRequest, ExecRequest, ExecSyncRequest, FilesystemUsage,
    ImageFsInfoRequest, ImageSpec, ListContainersRequest, ListImagesRequest, ListPodSandboxRequest,
    PodSandboxConfig, PodSandboxStatus, PodSandboxStatusRequest, PortForwardRequest,
    PullImageRequest, RemoveContainerRequest, RemoveImageRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
    UpdateContainerResourcesRequest, VersionRequest,
};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// Longest any call may take before the harness gives up.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// What a command run by `exec_sync` left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// Its exit code.
    pub code: i32,
}

impl Output {
    /// Standard output as text without the last line's end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }
}

/// A connection to containerd's CRI service; clones share it.
#[derive(Clone)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

/// The runtime that carries all blocking calls.
pub fn executor() -> Result<&'static Runtime> {
    static EXECUTOR: OnceLock<std::io::Result<Runtime>> = OnceLock::new();
    let build =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    EXECUTOR.get_or_init(build).as_ref().map_err(|error| anyhow!("start tokio: {error}"))
}

pub(crate) fn wait<T>(
    what: &str,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T> {
    let bounded = async { tokio::time::timeout(DEADLINE, call).await };
    match executor()?.block_on(bounded) {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(anyhow!("{what}: {:?}: {}", status.code(), status.message())),
        Err(_) => Err(anyhow!("{what}: no answer within {DEADLINE:?}")),
    }
}

impl Cri {
    /// Connects to the socket, now and again when the connection was lost.
    pub fn connect(socket: &Path) -> Result<Self> {
        let address = format!("unix://{}", socket.display());
        let _guard = executor()?.enter();
        let channel = Endpoint::from_shared(address).context("address")?.connect_lazy();
        let limit = 64 << 20;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(limit),
            images: ImageServiceClient::new(channel),
        })
    }

    /// The runtime's name and version: proof that it answers.
    pub fn version(&self) -> Result<String> {
        let request = VersionRequest { version: "v1".into() };
        let version = wait("Version", self.runtime.clone().version(request))?;
        Ok(format!("{} {}", version.runtime_name, version.runtime_version))
    }

    /// Runs a pod's sandbox; returns its id.
    pub fn run_pod(&self, handler: &str, config: &PodSandboxConfig) -> Result<String> {
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let answer = wait("RunPodSandbox", self.runtime.clone().run_pod_sandbox(request))?;
        Ok(answer.pod_sandbox_id)
    }

    /// Ends a sandbox; repeating it is no error.
    pub fn stop_pod(&self, pod: &str) -> Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: pod.into() };
        wait("StopPodSandbox", self.runtime.clone().stop_pod_sandbox(request)).map(drop)
    }

    /// Removes a stopped sandbox and its containers.
    pub fn remove_pod(&self, pod: &str) -> Result<()> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: pod.into() };
        wait("RemovePodSandbox", self.runtime.clone().remove_pod_sandbox(request)).map(drop)
    }

    /// A sandbox's state and addresses.
    pub fn pod_status(&self, pod: &str) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.into(), verbose: false };
        let answer = wait("PodSandboxStatus", self.runtime.clone().pod_sandbox_status(request))?;
        answer.status.context("PodSandboxStatus without a status")
    }

    /// Ids of all sandboxes.
    pub fn pods(&self) -> Result<Vec<String>> {
        let request = ListPodSandboxRequest { filter: None };
        let answer = wait("ListPodSandbox", self.runtime.clone().list_pod_sandbox(request))?;
        Ok(answer.items.into_iter().map(|pod| pod.id).collect())
    }

    /// Ids of all containers.
    pub fn containers(&self) -> Result<Vec<String>> {
        let request = ListContainersRequest { filter: None };
        let answer = wait("ListContainers", self.runtime.clone().list_containers(request))?;
        Ok(answer.containers.into_iter().map(|container| container.id).collect())
    }

    /// Names of all images.
    pub fn images(&self) -> Result<Vec<String>> {
        let request = ListImagesRequest { filter: None };
        let answer = wait("ListImages", self.images.clone().list_images(request))?;
        Ok(answer.images.into_iter().flat_map(|image| image.repo_tags).collect())
    }

    /// Pulls an image for pods of a runtime handler, as the kubelet does for its first such pod.
    pub fn pull(&self, name: &str, handler: &str) -> Result<()> {
        // Of the image since containerd 2, of the pod before.
        const HANDLER: &str = "io.containerd.cri.runtime-handler";
        let image =
            ImageSpec { image: name.into(), runtime_handler: handler.into(), ..Default::default() };
        let mut pod = PodSandboxConfig::default();
        pod.annotations.insert(HANDLER.to_owned(), handler.to_owned());
        let request = PullImageRequest {
            image: Some(image),
            sandbox_config: Some(pod),
            ..Default::default()
        };
        wait("PullImage", self.images.clone().pull_image(request)).map(drop)
    }

    /// Removes an image.
    pub fn remove_image(&self, name: &str) -> Result<()> {
        let image = Some(ImageSpec { image: name.into(), ..ImageSpec::default() });
        let request = RemoveImageRequest { image };
        wait("RemoveImage", self.images.clone().remove_image(request)).map(drop)
    }

    /// Creates a container; returns its id.
    pub fn create(
        &self,
        pod: &str,
        pod_config: &PodSandboxConfig,
        config: &ContainerConfig,
    ) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config.clone()),
            sandbox_config: Some(pod_config.clone()),
        };
        let answer = wait("CreateContainer", self.runtime.clone().create_container(request))?;
        Ok(answer.container_id)
    }

    /// Starts a created container.
    pub fn start(&self, container: &str) -> Result<()> {
        let request = StartContainerRequest { container_id: container.into() };
        wait("StartContainer", self.runtime.clone().start_container(request)).map(drop)
    }

    /// Stops a container: its stop signal, then SIGKILL after `grace`.
    pub fn stop(&self, container: &str, grace: Duration) -> Result<()> {
        let timeout = i64::try_from(grace.as_secs())?;
        let request = StopContainerRequest { container_id: container.into(), timeout };
        wait("StopContainer", self.runtime.clone().stop_container(request)).map(drop)
    }

    /// Removes a container.
    pub fn remove(&self, container: &str) -> Result<()> {
        let request = RemoveContainerRequest { container_id: container.into() };
        wait("RemoveContainer", self.runtime.clone().remove_container(request)).map(drop)
    }

    /// A container's state.
    pub fn status(&self, container: &str) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: container.into(), verbose: false };
        let answer = wait("ContainerStatus", self.runtime.clone().container_status(request))?;
        answer.status.context("ContainerStatus without a status")
    }

    /// A container's figures.
    pub fn stats(&self, container: &str) -> Result<ContainerStats> {
        let request = ContainerStatsRequest { container_id: container.into() };
        let answer = wait("ContainerStats", self.runtime.clone().container_stats(request))?;
        answer.stats.context("ContainerStats without figures")
    }

    /// Bytes that the file system of images at a path has in use, if there is one.
    pub fn image_bytes(&self, root: &Path) -> Result<Option<u64>> {
        let answer = wait("ImageFsInfo", self.images.clone().image_fs_info(ImageFsInfoRequest {}))?;
        let is = |usage: &FilesystemUsage| {
            usage.fs_id.as_ref().is_some_and(|id| Path::new(&id.mountpoint) == root)
        };
        let found = answer.image_filesystems.into_iter().find(is);
        Ok(found.map(|found| found.used_bytes.unwrap_or_default().value))
    }

    /// Runs a command in a container to its end.
    pub fn exec(&self, container: &str, command: &[&str], timeout: Duration) -> Result<Output> {
        let request = ExecSyncRequest {
            container_id: container.into(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: i64::try_from(timeout.as_secs())?,
        };
        let answer = wait("ExecSync", self.runtime.clone().exec_sync(request))?;
        Ok(Output { stdout: answer.stdout, stderr: answer.stderr, code: answer.exit_code })
    }

    /// URL at which a command in a container can be talked to; stdin is open.
    pub fn exec_url(&self, container: &str, command: &[&str], tty: bool) -> Result<String> {
        let request = ExecRequest {
            container_id: container.into(),
            cmd: command.iter().map(ToString::to_string).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        Ok(wait("Exec", self.runtime.clone().exec(request))?.url)
    }

    /// URL at which a container's first process can be talked to.
    pub fn attach_url(&self, container: &str, tty: bool) -> Result<String> {
        let request = AttachRequest {
            container_id: container.into(),
            stdin: true,
            tty,
            stdout: true,
            stderr: !tty,
        };
        Ok(wait("Attach", self.runtime.clone().attach(request))?.url)
    }

    /// URL at which a port of a pod's localhost can be talked to.
    pub fn forward_url(&self, pod: &str, port: i32) -> Result<String> {
        let request = PortForwardRequest { pod_sandbox_id: pod.into(), port: vec![port] };
        Ok(wait("PortForward", self.runtime.clone().port_forward(request))?.url)
    }

    /// Changes a running container's limits.
    pub fn update(&self, request: UpdateContainerResourcesRequest) -> Result<()> {
        let mut client = self.runtime.clone();
        wait("UpdateContainerResources", client.update_container_resources(request)).map(drop)
    }
}

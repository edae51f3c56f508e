//! containerd's controller of sandboxes (2.x), for what CRI does not tell.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use prost::Message as _;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::Endpoint;
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

use crate::cri;

// Those fields of containerd's messages that are asked for.

#[derive(Clone, PartialEq, prost::Message)]
struct MetricsRequest {
    #[prost(string, tag = "1")]
    sandbox_id: String,
    #[prost(string, tag = "10")]
    sandboxer: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MetricsResponse {
    #[prost(message, tag = "1")]
    metrics: Option<Metric>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Metric {
    #[prost(string, tag = "2")]
    id: String,
    #[prost(message, tag = "3")]
    data: Option<Any>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `io.containerd.cgroups.v2.Metrics`.
#[derive(Clone, PartialEq, prost::Message)]
struct Metrics {
    #[prost(message, tag = "2")]
    cpu: Option<Cpu>,
    #[prost(message, tag = "4")]
    memory: Option<Memory>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Cpu {
    #[prost(uint64, tag = "1")]
    usage_usec: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Memory {
    #[prost(uint64, tag = "32")]
    usage: u64,
}

/// What the containers of a sandbox have used together.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Processor time in microseconds.
    pub cpu_usec: u64,
    /// Bytes of memory, now.
    pub memory: u64,
}

/// Asks a containerd, by its socket, what a sandbox that its shim keeps uses.
pub fn metrics(socket: &Path, sandbox: &str) -> Result<Usage> {
    let address = format!("unix://{}", socket.display());
    let _guard = cri::executor()?.enter();
    let mut client =
        Grpc::new(Endpoint::from_shared(address).context("containerd's socket")?.connect_lazy());
    let request = MetricsRequest { sandbox_id: sandbox.into(), sandboxer: "shim".into() };
    let mut request = Request::new(request);
    let namespace = MetadataValue::from_static("k8s.io");
    request.metadata_mut().insert("containerd-namespace", namespace);
    let path = PathAndQuery::from_static("/containerd.services.sandbox.v1.Controller/Metrics");
    let answer: MetricsResponse = cri::wait("Metrics of a sandbox", async {
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        client.unary(request, path, ProstCodec::default()).await
    })?;
    let metric = answer.metrics.context("no metrics of the sandbox")?;
    ensure!(metric.id == sandbox, "metrics of {:?} instead of {sandbox:?}", metric.id);
    let data = metric.data.context("metrics without data")?;
    ensure!(data.type_url == "io.containerd.cgroups.v2.Metrics", "metrics as {}", data.type_url);
    let metrics = Metrics::decode(&data.value[..]).context("metrics")?;
    Ok(Usage {
        cpu_usec: metrics.cpu.unwrap_or_default().usage_usec,
        memory: metrics.memory.unwrap_or_default().usage,
    })
}

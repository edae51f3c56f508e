//! `joey limit`: how much a running sandbox may ask of its disks and its network, told to its shim as an update
//! of its task.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use containerd_shim::protos::api::UpdateTaskRequest;
use containerd_shim::protos::shim_async::TaskClient;
use joey_shim::config::Config;
use joey_shim::net_limits::{NET_LIMITS, NetLimits};
use joey_shim::sizing::{self, DISK_LIMITS};
use joey_shim::vmm::DiskLimits;

/// How long the shim may take.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Args)]
pub(crate) struct Limit {
    /// The sandbox's id, or the beginning of it
    id: String,
    /// Bytes read in a second, as 50Mi; 0: no limit
    #[arg(long)]
    read_bytes: Option<String>,
    /// Bytes written in a second
    #[arg(long)]
    write_bytes: Option<String>,
    /// Requests to read in a second
    #[arg(long)]
    read_operations: Option<String>,
    /// Requests to write in a second
    #[arg(long)]
    write_operations: Option<String>,
    /// Bits a second that leave the pod, as 10M; 0: no limit
    #[arg(long)]
    egress_bits: Option<String>,
    /// Bits a second that reach the pod
    #[arg(long)]
    ingress_bits: Option<String>,
    /// Packets a second that leave the pod
    #[arg(long)]
    egress_packets: Option<String>,
    /// Packets a second that reach the pod
    #[arg(long)]
    ingress_packets: Option<String>,
}

pub(crate) fn run(config: &Config, limit: &Limit, json: bool) -> Result<()> {
    let disks =
        [&limit.read_bytes, &limit.write_bytes, &limit.read_operations, &limit.write_operations];
    let network =
        [&limit.egress_bits, &limit.ingress_bits, &limit.egress_packets, &limit.ingress_packets];
    let annotations: HashMap<String, String> = DISK_LIMITS
        .into_iter()
        .zip(disks)
        .chain(NET_LIMITS.into_iter().zip(network))
        .filter_map(|(name, value)| Some((name.to_owned(), value.clone()?)))
        .collect();
    ensure!(!annotations.is_empty(), "no limit is given; see `joey limit --help`");
    sizing::disk_limits(&annotations, DiskLimits::default())?;
    NetLimits::default().annotated(&annotations)?;
    let record = super::sandboxes::find(config, &limit.id)?;
    let request = UpdateTaskRequest { id: record.id.clone(), annotations, ..Default::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let address = format!("unix://{}", record.socket.display());
        let shim = ttrpc::r#async::Client::connect(&address).await;
        let shim = shim.with_context(|| format!("reach the shim of {} at {address}", record.id))?;
        let deadline = i64::try_from(PATIENCE.as_nanos()).unwrap_or(i64::MAX);
        let context = ttrpc::context::with_timeout(deadline);
        TaskClient::new(shim).update(context, &request).await?;
        if json {
            println!("{}", serde_json::json!({"sandbox": record.id, "limited": true}));
        } else {
            println!("sandbox {}: limited", record.id);
        }
        Ok(())
    })
}

//! `joey limit`: what a running sandbox may ask of its disks, told to its shim as an update of its task.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use containerd_shim::protos::api::UpdateTaskRequest;
use containerd_shim::protos::shim_async::TaskClient;
use joey_shim::config::Config;
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
}

pub(crate) fn run(config: &Config, limit: &Limit, json: bool) -> Result<()> {
    let given =
        [&limit.read_bytes, &limit.write_bytes, &limit.read_operations, &limit.write_operations];
    let annotations: HashMap<String, String> = DISK_LIMITS
        .into_iter()
        .zip(given)
        .filter_map(|(name, value)| Some((name.to_owned(), value.clone()?)))
        .collect();
    ensure!(!annotations.is_empty(), "no limit is given; see `joey limit --help`");
    sizing::disk_limits(&annotations, DiskLimits::default())?;
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

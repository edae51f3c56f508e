//! `joey network`: the node's daemon for what pods' packets are told of.

use anyhow::Result;
use clap::{Args, Subcommand};
use joey_shim::config::Config;
use joey_shim::flows::daemon;

#[derive(Subcommand)]
pub(crate) enum Task {
    /// Serve flows, metrics and identities until told to end
    Serve(Serve),
}

#[derive(Args)]
pub(crate) struct Serve {
    /// Where Prometheus finds metrics: unix:PATH or HOST:PORT
    #[arg(long)]
    metrics: Option<String>,
}

pub(crate) fn run(config: &Config, serve: &Serve) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let served = runtime.block_on(daemon::serve(config.clone(), serve.metrics.as_deref()));
    // A change that is being compiled is not waited for: what it writes is atomic.
    runtime.shutdown_background();
    served
}

//! `joey ebpf load`: the packet programs of this node, with the policy that was applied last.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use joey_shim::config::Config;
use joey_shim::policy::apply::restore;
use joey_shim::policy::versions::remove_unused;

/// Loads and pins what is not there. Maps that were just made, as after a boot, get the policy that was applied
/// last before any pod can start; if that cannot be, none does.
pub(crate) fn load(config: &Config) -> Result<PathBuf> {
    let fill = || match config.isolation {
        true => restore(config).map(drop).map_err(|error| error.to_string()),
        false => Ok(()),
    };
    let path = joey_ebpf::loader::load(&config.bpf_dir, fill)
        .context("applying a policy anew (`joey policy apply`) mends one that cannot be read")?;
    if let Err(error) = remove_unused(config) {
        tracing::warn!(%error, "maps of another version are left");
    }
    Ok(path)
}

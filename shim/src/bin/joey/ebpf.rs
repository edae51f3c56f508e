//! `joey ebpf load`: the packet programs of this node, with the policy that was applied last.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use joey_ebpf::policy::maps::others;
use joey_shim::config::Config;
use joey_shim::policy::apply::restore;
use joey_shim::sandbox::record::Record;

/// Removes what versions with another layout have pinned, once no pod has it any more.
fn remove_others(config: &Config) -> Result<()> {
    let records = Record::all(&config.run_dir)?;
    let used = |path: &PathBuf| {
        records.iter().filter_map(|record| record.network.as_ref()).any(|it| it.maps == *path)
    };
    for directory in others(&config.bpf_dir).into_iter().filter(|path| !used(path)) {
        std::fs::remove_dir_all(&directory)
            .with_context(|| format!("remove {}", directory.display()))?;
    }
    Ok(())
}

/// Loads and pins what is not there. Maps that were just made, as after a boot, get the policy that was applied
/// last before any pod can start; if that cannot be, none does.
pub(crate) fn load(config: &Config) -> Result<PathBuf> {
    let fill = || match config.isolation {
        true => restore(config).map(drop).map_err(|error| error.to_string()),
        false => Ok(()),
    };
    let path = joey_ebpf::loader::load(&config.bpf_dir, fill)
        .context("applying a policy anew (`joey policy apply`) mends one that cannot be read")?;
    if let Err(error) = remove_others(config) {
        tracing::warn!(%error, "maps of another version are left");
    }
    Ok(path)
}

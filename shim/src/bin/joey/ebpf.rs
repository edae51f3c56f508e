//! `joey ebpf load`: the packet programs of this node, with the policy that was applied last.

use anyhow::Result;
use joey_ebpf::policy::maps::Maps;
use joey_shim::config::Config;
use joey_shim::policy::apply::restore;

/// The epoch of maps that are as they were made.
const MADE: u32 = 1;

/// Loads and pins what is not there. Maps that were just made, as after a boot, get the policy that was applied
/// last; if that cannot be, pods still have their own tenant and nothing else, and the warning says why.
pub(crate) fn load(config: &Config) -> Result<std::path::PathBuf> {
    let path = joey_ebpf::loader::load(&config.bpf_dir)?;
    if config.isolation && Maps::open(&config.bpf_dir)?.active()?.epoch == MADE {
        match restore(config) {
            Ok(applied) => tracing::info!(epoch = applied.epoch, "the policy is in force again"),
            Err(error) => tracing::error!(
                %error,
                "the policy that was applied last is not in force: pods reach their own tenant only; apply it anew"
            ),
        }
    }
    Ok(path)
}

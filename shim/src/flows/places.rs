//! Takes back what pods have that are gone without having given it back: where a shim was killed and containerd does
//! not call `delete`, its address would be a pod's that is not there.

use std::time::Duration;

use crate::config::Config;
use crate::host::net::{Strays, shims};
use crate::sandbox::orphans::Watch;

/// How often is looked.
const EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
struct Keeper {
    orphans: Watch,
    strays: Strays,
}

impl Keeper {
    fn look(&mut self, config: &Config) {
        match self.orphans.look(&config.run_dir) {
            Err(error) => tracing::warn!(%error, "looking for orphaned sandboxes"),
            Ok(orphans) => crate::sandbox::orphans::tell(&orphans),
        }
        // The shims first: one that starts now has its record before it has a place.
        let found = shims()
            .map_err(anyhow::Error::from)
            .and_then(|shims| Ok(self.strays.look(&config.bpf_dir, &config.run_dir, &shims)?));
        match found {
            Err(error) => {
                tracing::warn!(error = %format!("{error:#}"), "looking for places without a record");
            }
            Ok(gone) if gone.is_empty() => {}
            Ok(gone) => tracing::warn!(?gone, "places in the policy had no record; given back"),
        }
    }
}

/// Looks now and then. Never ends.
pub async fn keep(config: Config) {
    let mut keeper = Keeper::default();
    loop {
        tokio::time::sleep(EVERY).await;
        let config = config.clone();
        let look = move || {
            keeper.look(&config);
            keeper
        };
        keeper = match tokio::task::spawn_blocking(look).await {
            Ok(keeper) => keeper,
            Err(error) => {
                tracing::error!(%error, "looking for pods that are gone");
                Keeper::default()
            }
        };
    }
}

//! Who is reached: by TCP and datagrams, IPv4 and IPv6.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use super::{Context, Peer, Services, among, at, service};
use crate::context::same;

/// TCP to a service's addresses reaches its endpoints, each of them, and is told of the service.
pub fn tcp(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let services = Services::new(ctx);
    services.feed(&[service("red", "none", 9, &[])])?;
    let one = Peer::run(ctx, "one", "red")?;
    let two = Peer::run(ctx, "two", "red")?;
    let client = Peer::run(ctx, "client", "red")?;
    services.feed(&[service("red", "web", 1, &[&one, &two]), service("red", "none", 9, &[])])?;
    for service in at(1, 80) {
        let mut seen = BTreeSet::new();
        for _ in 0..16 {
            let found = client.asks(&service)?;
            among(&service, &found, &["one", "two"])?;
            seen.extend(found);
        }
        same(&format!("who answers at {service}"), seen.len(), 2)?;
        let told = client.connects(&service, 4)?;
        ensure!(told.iter().all(|(peer, _)| *peer == service), "{told:?}");
    }
    for service in at(9, 80) {
        let told = client.connects(&service, 1)?;
        same(&format!("{service}, which has no endpoints"), &told[0].0, "ConnectionRefused")?;
    }
    client.remove()?;
    two.remove()?;
    one.remove()
}

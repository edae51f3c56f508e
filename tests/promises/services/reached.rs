//! Who is reached: by TCP and datagrams, IPv4 and IPv6.

use std::collections::BTreeSet;

use std::time::Duration;

use anyhow::{Result, ensure};
use joey_tests::pod;
use k8s_cri::v1::Int64Value;
use serde_json::json;

use super::{Context, GUEST, Peer, Services, among, at, service};
use crate::context::{holds, same};
use crate::volumes::probed;

/// TCP to a service's addresses reaches its endpoints, each of them, and is told of the service.
pub fn tcp(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let services = Services::with_none(ctx)?;
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

/// Datagrams likewise, by sockets that are connected and others; and they come from the service.
pub fn datagrams(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let services = Services::with_none(ctx)?;
    let one = Peer::run(ctx, "one", "red")?;
    let two = Peer::run(ctx, "two", "red")?;
    let client = Peer::run(ctx, "client", "red")?;
    services.feed(&[service("red", "web", 1, &[&one, &two]), service("red", "none", 9, &[])])?;
    for how in ["", "connected"] {
        for service in at(1, 53) {
            let mut seen = BTreeSet::new();
            for _ in 0..12 {
                let told = client.sends(&service, how)?;
                holds(&format!("datagram {how}"), &told, &format!(" from {service}"))?;
                seen.extend(told.split(' ').next().map(str::to_owned));
            }
            let both = BTreeSet::from(["one", "two"].map(str::to_owned));
            same(&format!("who answers at {service}"), seen, both)?;
        }
        for service in at(9, 53) {
            same(&service, client.sends(&service, how)?.as_str(), refused(how))?;
        }
    }
    // The endpoint of a socket goes: its next datagram reaches another.
    let [address, _] = at(1, 53);
    let mut asking =
        client.shell.exec_live(&["/probe", "services", "question", &address], false)?;
    asking.send(b"?\n")?;
    asking.wait_for("1: ")?;
    asking.wait_for(&format!(" from {address}\n"))?;
    services.feed(&[service("red", "web", 1, &[&two])])?;
    for number in 2..5 {
        asking.send(b"?\n")?;
        asking.wait_for(&format!("{number}: two from {address}\n"))?;
    }
    services.feed(&[service("red", "web", 1, &[&one])])?;
    asking.send(b"?\n")?;
    asking.wait_for(&format!("5: one from {address}\n"))?;
    drop(asking);
    client.remove()?;
    two.remove()?;
    one.remove()
}

/// How a datagram to a service without endpoints ends: where the socket is connected, that fails.
fn refused(how: &str) -> &'static str {
    match how {
        "connected" => "",
        _ => "ConnectionRefused",
    }
}

/// A client stays where it is while that is an endpoint, until it was away for the service's time.
pub fn affinity(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let services = Services::with_none(ctx)?;
    let one = Peer::run(ctx, "one", "red")?;
    let two = Peer::run(ctx, "two", "red")?;
    let client = Peer::run(ctx, "client", "red")?;
    let keeping = |peers: &[&Peer<'_>], seconds: u32| {
        let mut keeping = service("red", "web", 1, peers);
        keeping["affinity_seconds"] = json!(seconds);
        keeping
    };
    services.feed(&[keeping(&[&one, &two], 3600)])?;
    for service in at(1, 80) {
        let first = client.asks(&service)?;
        among(&service, &first, &["one", "two"])?;
        for _ in 0..8 {
            same(&format!("who answers at {service}"), client.asks(&service)?, first.clone())?;
        }
        let (stays, name) =
            if first.as_deref() == Some("one") { (&two, "two") } else { (&one, "one") };
        services.feed(&[keeping(&[stays], 3600)])?;
        for _ in 0..3 {
            same("the one that is left", client.asks(&service)?.as_deref(), Some(name))?;
        }
        services.feed(&[keeping(&[&one, &two], 3600)])?;
        for _ in 0..8 {
            same("where it was last", client.asks(&service)?.as_deref(), Some(name))?;
        }
    }
    services.feed(&[keeping(&[&one, &two], 1)])?;
    let [address, _] = at(1, 80);
    let mut seen = BTreeSet::new();
    for _ in 0..12 {
        std::thread::sleep(Duration::from_millis(2100));
        seen.extend(client.asks(&address)?);
        if seen.len() == 2 {
            break;
        }
    }
    same("who answers after the time", seen.len(), 2)?;
    client.remove()?;
    two.remove()?;
    one.remove()
}

/// A pod that is its service's endpoint reaches itself by it.
pub fn itself(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let services = Services::with_none(ctx)?;
    let own = Peer::run(ctx, "own", "red")?;
    services.feed(&[service("red", "web", 1, &[&own])])?;
    for service in at(1, 80) {
        same(&service, own.asks(&service)?.as_deref(), Some("own"))?;
    }
    for service in at(1, 53) {
        for how in ["", "connected"] {
            same(how, own.sends(&service, how)?, format!("own from {service}"))?;
        }
    }
    // A port that is none of the service's is nobody's, and the address itself is not a pod's.
    ensure!(own.asks(&at(1, 81)[0])?.is_none(), "a port that is no service's answers");
    own.remove()
}

/// A sidecar learns that a container connects to a service; its own connection to that is translated.
pub fn behind_a_sidecar(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let services = Services::with_none(ctx)?;
    let one = Peer::run(ctx, "one", "red")?;
    let meshed = Peer::annotated(ctx, "meshed", "red", &[GUEST, ("io.joey.mesh", "sidecar")])?;
    services.feed(&[service("red", "web", 1, &[&one])])?;
    for service in at(1, 80) {
        let told = meshed.connects(&service, 1)?;
        same("without a sidecar", told[0].0.as_str(), "ConnectionRefused")?;
    }
    let command = ["/probe", "sidecar", "tells", "15001", "15006"];
    let mut sidecar = probed(pod::container("sidecar", &command));
    // The user that Istio's proxy runs as.
    pod::security(&mut sidecar).run_as_user = Some(Int64Value { value: 1337 });
    let sidecar = meshed.pod.start(&sidecar)?;
    sidecar.wait_output("sidecar is up", pod::SOON)?;
    for service in at(1, 80) {
        same(&service, meshed.asks(&service)?.as_deref(), Some("one"))?;
        sidecar.wait_output(&format!(" for {service};"), pod::SOON)?;
        let told = meshed.connects(&service, 1)?;
        same("the peer", told[0].0.as_str(), service.as_str())?;
    }
    meshed.remove()?;
    one.remove()
}

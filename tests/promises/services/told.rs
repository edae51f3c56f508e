//! What a pod's guest is told of services, when, and by whom.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use joey_tests::pod::{self, Pod};
use serde_json::json;

use super::{Context, GUEST, Peer, Services, at, service};
use crate::context::{holds, refused, same};
use crate::volumes::probed;

/// A tenant's services are its own: another's are not translated, and nothing is behind their addresses. Shared
/// ones are everybody's, once the node's policy says so.
pub fn tenants_apart(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let services = Services::with_none(ctx)?;
    let red = Peer::run(ctx, "red", "red")?;
    let blue = Peer::run(ctx, "blue", "blue")?;
    let said = Peer::annotated(ctx, "said", "elsewhere", &[GUEST, ("io.joey.tenant", "red")])?;
    services.feed(&[service("red", "web", 1, &[&red])])?;
    for service in at(1, 80) {
        same("its own", red.asks(&service)?.as_deref(), Some("red"))?;
        same("its tenant's", said.asks(&service)?.as_deref(), Some("red"))?;
        let told = blue.connects(&service, 1)?;
        ensure!(told[0].0 == "TimedOut", "{service} from another tenant: {told:?}");
    }
    // Both tenants have a service at one address.
    services.feed(&[service("red", "web", 1, &[&red]), service("blue", "web", 1, &[&blue])])?;
    for service in at(1, 80) {
        same("red's", red.asks(&service)?.as_deref(), Some("red"))?;
        same("blue's", blue.asks(&service)?.as_deref(), Some("blue"))?;
    }
    // Shared: the guest translates, and the policy lets the endpoint's packets pass.
    services.feed(&[service("red", "web", 1, &[&red]), service("blue", "own", 2, &[&blue])])?;
    services.policy(
        "  sharedServices: [red/web]\n  allow:\n  - {from: blue, to: red, ports: [8080/tcp]}\n",
    )?;
    for service in at(1, 80) {
        same("what is shared", blue.asks(&service)?.as_deref(), Some("red"))?;
        same("what is shared, to its own", red.asks(&service)?.as_deref(), Some("red"))?;
    }
    services.policy("")?;
    ensure!(blue.asks(&at(1, 80)[0])?.is_none(), "what is not shared any more");
    said.remove()?;
    blue.remove()?;
    red.remove()
}

/// Changes are in running guests soon; pods that did not ask for it are left alone.
pub fn changes(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let services = Services::new(ctx);
    services.feed(&[service("red", "web", 1, &[])])?;
    let one = Peer::run(ctx, "one", "red")?;
    let host = Peer::annotated(ctx, "host", "red", &[])?;
    let [address, _] = at(1, 80);
    let mut told =
        one.shell.exec_live(&["/probe", "services", "until", &address, "Connected"], false)?;
    told.wait_for("ready")?;
    let mut refused = one
        .shell
        .exec_live(&["/probe", "services", "until", &address, "ConnectionRefused"], false)?;
    refused.wait_for("ready")?;
    let mut slowest = Duration::ZERO;
    for number in 1..6 {
        for (session, end, peers) in
            [(&mut told, "Connected", &[&one][..]), (&mut refused, "ConnectionRefused", &[])]
        {
            session.send(b"?\n")?;
            std::thread::sleep(Duration::from_millis(50));
            let begun = Instant::now();
            services.feed(&[service("red", "web", 1, peers)])?;
            session.wait_for(&format!("{number}: {end}"))?;
            slowest = slowest.max(begun.elapsed());
        }
    }
    ensure!(slowest < Duration::from_secs(2), "a change took {slowest:?}");
    drop((told, refused));
    services.feed(&[service("red", "web", 1, &[&one])])?;
    ensure!(
        host.asks(&address)?.is_none(),
        "a pod whose node is to translate is translated by its guest"
    );
    // The same by the other way of telling, and what is shown.
    services.told("apply", &json!([service("red", "other", 2, &[&one])]))?;
    same("after apply", one.asks(&at(2, 80)[0])?.as_deref(), Some("one"))?;
    let shown = ctx.node.joey(&["services", "show"])?;
    holds("services show", &shown, "red/other")?;
    let shown = ctx.node.joey(&["services", "show", "--tenant", "red"])?;
    holds("services show --tenant", &shown, "10.96.0.2:80")?;
    host.remove()?;
    one.remove()
}

/// The first instruction of the first container finds all services there; where they are not known at all the pod
/// does not start.
pub fn before_the_first_container(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let services = Services::new(ctx);
    // As before anybody has told of services.
    for path in ["jrun/services", "joey/network/services.json"] {
        let path = ctx.node.dir().join(path);
        let removed = if path.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        ensure!(removed.is_ok() || !path.exists(), "{path:?} is still there");
    }
    let begun = Instant::now();
    let denied = Peer::run(ctx, "early", "red").map(drop);
    refused("a pod without services", denied, "joey services apply")?;
    ensure!(begun.elapsed() < Duration::from_secs(10), "told after {:?}", begun.elapsed());
    services.feed(&[service("red", "none", 9, &[])])?;
    let server = Peer::run(ctx, "server", "red")?;
    let mut all: Vec<_> = (10..3000)
        .map(|number| service("red", &format!("s{number}"), number, &[&server]))
        .collect();
    all.push(service("red", "web", 1, &[&server]));
    services.feed(&all)?;
    let [address, _] = at(1, 80);
    for number in 0..4 {
        let config = pod::annotated(ctx.node, &format!("first{number}"), "red", &[GUEST]);
        let pod = Pod::run_with(ctx.node, ctx.handler, config)?;
        let first = pod::container("first", &["/probe", "services", "connect", &address, "1"]);
        let told = pod.finish(&probed(first))?.text();
        ensure!(told.starts_with(&address), "the first connection of a pod: {told}");
        pod.remove()?;
    }
    server.remove()
}

//! What is refused, and what a dead daemon changes.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, ensure};
use joey_tests::process;
use serde_json::{Value, json};

use super::{Context, Peer, Services, at, service};
use crate::context::{holds, refused, same};
use crate::kills::Point;

/// What the daemon answers to a line.
fn said(ctx: &Context<'_>, line: &[u8]) -> Result<String> {
    let mut socket = UnixStream::connect(ctx.node.dir().join("jrun/network.sock"))?;
    socket.write_all(line)?;
    let mut answer = String::new();
    BufReader::new(socket).read_line(&mut answer)?;
    Ok(answer)
}

fn put(services: &[Value]) -> Vec<u8> {
    let mut line = json!({"services": {"put": services}}).to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Garbage, services that are none, and more than fits a guest are refused whole; what was in force still is.
pub fn refused_whole(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let services = Services::with_none(ctx)?;
    let one = Peer::run(ctx, "one", "red")?;
    services.feed(&[service("red", "web", 1, &[&one])])?;
    let [address, _] = at(1, 80);
    let works = |what: &str| same(what, one.asks(&address)?.as_deref(), Some("one"));
    works("before")?;
    let strange = service("red", "x y", 2, &[]);
    let taken = service("red", "other", 1, &[]);
    for (line, words) in [
        (b"\x00\xff{services\n".to_vec(), "error"),
        (b"{\"services\":{\"replace\":[7]}}\n".to_vec(), "invalid type"),
        (b"{\"services\":{}}\n".to_vec(), "nothing to change"),
        (put(&[strange]), "red/x y"),
        (put(&[taken]), "already"),
    ] {
        holds("the daemon", &said(ctx, &line)?, words)?;
        works(words)?;
    }
    let mut large = service("red", "large", 3, &[]);
    let endpoints: Vec<_> = (0..140_000_u32)
        .map(|n| json!({"address": std::net::Ipv4Addr::from(0x0a10_0000 + n), "port": 1}))
        .collect();
    large["ports"][0]["endpoints"] = endpoints.into();
    let answer = said(ctx, &put(&[large]))?;
    holds("too many endpoints", &answer, "131072")?;
    works("after too many endpoints")?;
    let many: Vec<_> = (100..17_000).map(|n| service("red", &format!("s{n}"), n, &[])).collect();
    refused("too many addresses", services.feed(&many), "65536 fit")?;
    works("after too many addresses")?;
    let pod = Peer::annotated(ctx, "bad", "red", &[("io.joey.services", "yes")]).map(drop);
    refused("the annotation", pod, "must be guest or host")?;
    one.remove()
}

/// The daemon is killed at each of its writes: pods go on with what they had, new ones start, and what is told
/// afterwards is in force.
pub fn daemon_killed(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let services = Services::with_none(ctx)?;
    let one = Peer::run(ctx, "one", "red")?;
    services.feed(&[service("red", "web", 1, &[&one])])?;
    let [address, _] = at(1, 80);
    for (number, point) in
        ["services-append", "services-written", "services-base", "services-rename"]
            .into_iter()
            .enumerate()
    {
        let number = u16::try_from(number)? + 20;
        let what = |when: &str| format!("{when} the daemon was killed at {point}");
        // A new log is begun for a tenant that had none.
        let tenant =
            if point.contains("base") || point.contains("rename") { "green" } else { "red" };
        let change = service(tenant, &format!("s{number}"), number, &[&one]);
        let armed = Point::arm(ctx, point)?;
        let mut socket = UnixStream::connect(ctx.node.dir().join("jrun/network.sock"))?;
        socket.write_all(&put(&[change]))?;
        let held = armed.reached(|| false).with_context(|| what("nobody came by where"))?;
        process::kill(held)?;
        drop((armed, socket));
        same(&what("a pod, after"), one.asks(&address)?.as_deref(), Some("one"))?;
        let new = Peer::run(ctx, &format!("new{number}"), "red").with_context(|| what("after"))?;
        same(&what("a new pod, after"), new.asks(&address)?.as_deref(), Some("one"))?;
        ctx.node.kill_network()?;
        ctx.node.start_network()?;
        let later = service("red", "later", number + 100, &[&one]);
        holds(&what("told after"), &said(ctx, &put(&[later]))?, "generation")?;
        for peer in [&one, &new] {
            let found = peer.asks(&at(number + 100, 80)[0])?;
            same(&what("what was told after"), found.as_deref(), Some("one"))?;
            same(&what("what was before"), peer.asks(&address)?.as_deref(), Some("one"))?;
        }
        let removed = json!({"services": {"remove": ["red/later"]}}).to_string() + "\n";
        ensure!(said(ctx, removed.as_bytes())?.contains("generation"));
        new.remove()?;
    }
    one.remove()
}

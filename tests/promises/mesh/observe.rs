//! Observe mode: connections go where they would, and are told of.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_tests::pod::{self, Pod, SOON};
use serde_json::Value;

use super::sidecar::{Server, dial, from_node, of_user};
use crate::context::{Context, holds, same};
use crate::volumes::probed;

fn observed<'n>(ctx: &Context<'n>, name: &str) -> Result<Pod<'n>> {
    let mut config = pod::config(ctx.node, name);
    config.annotations.insert("io.joey.mesh".to_owned(), "observe".to_owned());
    Pod::run_with(ctx.node, ctx.handler, config)
}

/// What `joey connections` says.
fn told(ctx: &Context<'_>, pod: &Pod<'_>, more: &[&str]) -> Result<String> {
    ctx.node.joey(&[&["connections", &pod.id], more].concat())
}

fn events(ctx: &Context<'_>, pod: &Pod<'_>) -> Result<Vec<Value>> {
    let text = told(ctx, pod, &["--json"])?;
    text.lines().map(|line| serde_json::from_str(line).context("joey connections")).collect()
}

/// Waits for an event with these fields.
fn find(ctx: &Context<'_>, pod: &Pod<'_>, fields: &Value) -> Result<Value> {
    let end = Instant::now() + Duration::from_secs(15);
    let fields = fields.as_object().context("fields")?;
    loop {
        let all = events(ctx, pod)?;
        let fits =
            |event: &&Value| fields.iter().all(|(name, value)| event.get(name) == Some(value));
        if let Some(found) = all.iter().find(fits) {
            return Ok(found.clone());
        }
        let seen: Vec<String> = all.iter().map(ToString::to_string).collect();
        ensure!(Instant::now() < end, "no event with {fields:?} in {}", seen.join("\n"));
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub(super) fn connections(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let _server = Server::start(ctx, 7171)?;
    let pod = observed(ctx, "observed")?;
    let app = pod.start(&of_user(probed(pod::script("app", "/probe answer [::]:8080")), 1000))?;
    app.wait_output("answers", SOON)?;
    let addresses = pod.addresses()?;
    for node in ["10.88.0.1", "fd88::1"] {
        let family = |address: &&String| address.contains(':') == node.contains(':');
        let own = addresses.iter().find(family).context("the pod's address")?;
        let host = if node.contains(':') { format!("[{node}]") } else { node.to_owned() };
        // It goes where it would.
        holds("outbound", &dial(&app, &format!("{host}:7171"))?, &format!("node to {own}"))?;
        let known = serde_json::json!({
            "what": "opened", "direction": "out", "protocol": "tcp", "container": app.id, "uid": 1000,
            "command": "probe", "local_ip": own, "remote_ip": node, "remote_port": 7171,
        });
        let opened = find(ctx, &pod, &known)?;
        let ended = serde_json::json!({
            "what": "closed", "socket": opened["socket"], "pid": opened["pid"],
            "received": format!("node to {own}").len(),
        });
        find(ctx, &pod, &ended)?;
        holds("refused", &dial(&app, &format!("{host}:7"))?, "ConnectionRefused")?;
        let failed = serde_json::json!({"what": "failed", "remote_ip": node, "remote_port": 7});
        find(ctx, &pod, &failed)?;
        ensure!(from_node(ctx, own, 8080)?.is_some(), "inbound");
        let inbound = serde_json::json!({
            "what": "opened", "direction": "in", "container": app.id, "local_port": 8080,
            "local_ip": own, "remote_ip": node,
        });
        find(ctx, &pod, &inbound)?;
        app.exec(&["/probe", "query", &format!("{host}:5300")])?;
        let datagrams = serde_json::json!({
            "what": "opened", "direction": "out", "protocol": "udp", "remote_ip": node,
            "remote_port": 5300, "container": app.id,
        });
        find(ctx, &pod, &datagrams)?;
    }
    let table = told(ctx, &pod, &[])?;
    holds("table", &table, "10.88.0.1:7171")?;
    pod.remove()
}

/// What a guest says costs its own sandbox something, and nobody's terminal.
pub(super) fn hostile(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let _server = Server::start(ctx, 7171)?;
    let pod = observed(ctx, "hostile")?;
    let app = pod.start(&probed(pod::script("app", "sleep 10000")))?;
    // A command with control characters.
    let text = "cp /probe /tmp/$(printf 'x\\033[2Jy\\nz') && /tmp/x* dial 10.88.0.1:7171; \
        /probe connections 10.88.0.1:7171 3000";
    let begun = Instant::now();
    let output = app.exec_for(&["sh", "-c", text], SOON * 2)?;
    holds("flood", &output.text(), "failed 0 direct 3000")?;
    let table = told(ctx, &pod, &[])?;
    ensure!(!table.contains('\u{1b}'), "a control character comes through");
    holds("sprayed", &app.exec(&["/probe", "spray", "10.88.0.1", "20000"])?.text(), "sprayed")?;
    // As many as are remembered, and word of the others, once no more are on their way.
    let (mut all, mut before) = (events(ctx, &pod)?, 0);
    while all.len() != before {
        before = all.len();
        std::thread::sleep(Duration::from_secs(1));
        all = events(ctx, &pod)?;
    }
    let count = all.iter().filter(|event| event.get("what").is_some()).count();
    ensure!(count <= 4096, "{count} events are remembered");
    let lost: u64 = all.iter().filter_map(|event| event.get("lost")?.as_u64()).sum();
    println!("        {count} kept, {lost} lost in {:.1?}", begun.elapsed());
    ensure!(lost > 0, "26000 events were told of in no time");
    same("the pod is well", app.exec(&["echo", "well"])?.text().trim(), "well")?;
    pod.remove()
}

/// One that is not observed says nothing.
pub(super) fn only_where_wanted(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = ctx.pod("unobserved")?;
    let app = pod.start(&probed(pod::script("app", "sleep 10000")))?;
    let _server = Server::start(ctx, 7171)?;
    holds("outbound", &dial(&app, "10.88.0.1:7171")?, "said \"node to ")?;
    same("events", events(ctx, &pod)?.len(), 0)?;
    pod.remove()
}

//! Tenancy, the node's policy, NetworkPolicies: through the tool, and seen from inside the pods.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Context, Peer, Policy, only_joey, probe, url};
use crate::context::{refused, same};

/// The default: within a namespace everything, across nothing, and the node (a kubelet's probe) reaches all.
pub fn apart(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let (red, friend) = (Peer::run(ctx, "red", "red")?, Peer::run(ctx, "friend", "red")?);
    let blue = Peer::run(ctx, "blue", "blue")?;
    red.expect(&friend, 80, true)?;
    friend.expect(&red, 80, true)?;
    red.expect(&blue, 80, false)?;
    blue.expect(&red, 80, false)?;
    for address in &friend.addresses {
        ensure!(red.pings(address)?, "red does not get an echo from {address}");
        ensure!(!blue.pings(address)?, "blue gets an echo from {address}");
    }
    for address in red.addresses.iter().chain(&blue.addresses) {
        probe(ctx, address)?;
    }
    // Nobody who is known: neither the world nor a neighbour's free address.
    for stranger in ["192.0.2.1", "10.88.77.77", "2001:db8::1"] {
        ensure!(!red.reaches(stranger, 80)?, "{stranger} is reached");
    }
    // A pod that gets an address that another tenant had is the new one's.
    let gone = blue.addresses.clone();
    blue.remove()?;
    for address in gone {
        ensure!(!red.reaches(&address, 80)?, "{address} is reached after its pod");
    }
    friend.remove()?;
    red.remove()
}

/// A pod is whose its annotations say, where the node trusts them; and of a virtual cluster.
pub fn of_annotations(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let red = Peer::run(ctx, "red", "red")?;
    let said = Peer::annotated(ctx, "said", "elsewhere", &[("io.joey.tenant", "red")])?;
    red.expect(&said, 80, true)?;
    said.expect(&red, 80, true)?;
    said.remove()?;
    red.remove()?;
    let cluster = [("tenancy.x-k8s.io/cluster", "team-c0ffee")];
    let one = Peer::annotated(ctx, "one", "team-c0ffee-default", &cluster)?;
    let two = Peer::annotated(ctx, "two", "team-c0ffee-other", &cluster)?;
    one.expect(&two, 80, true)?;
    one.remove()?;
    two.remove()
}

/// What is allowed works, and only that; what is revoked ends, also where it runs; allowed again it goes on.
pub fn allowed_and_revoked(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let policy = Policy::new(ctx);
    let (red, blue) = (Peer::run(ctx, "red", "red")?, Peer::run(ctx, "blue", "blue")?);
    red.expect(&blue, 80, false)?;
    let allow = "  allow:\n  - {from: red, to: blue, ports: [80/tcp, 8080/tcp]}\n";
    policy.apply(allow)?;
    red.expect(&blue, 80, true)?;
    red.expect(&blue, 81, false)?;
    blue.expect(&red, 80, false)?;
    let _echo = blue.shell.exec(&["sh", "-c", "nc -ll -p 8080 -e cat >/dev/null 2>&1 &"])?;
    let mut talk = red.shell.exec_live(&["nc", &blue.addresses[0], "8080"], false)?;
    talk.send(b"one\n")?;
    talk.wait_for("one")?;
    policy.apply("")?;
    talk.send(b"two\n")?;
    std::thread::sleep(Duration::from_millis(700));
    let words = "what is not allowed";
    let denied = super::told(
        ctx,
        &["policy", "test", "--pod", "red/red", "--to", &blue.addresses[0], "--port", "8080/tcp"],
    );
    refused(words, denied, "")?;
    policy.apply(allow)?;
    // TCP sends it again.
    talk.wait_for("two")?;
    drop(talk);
    blue.remove()?;
    red.remove()
}

/// Kubernetes' own objects, with pods known by what `kubectl` prints.
pub fn network_policy(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let policy = Policy::new(ctx);
    let (server, client) = (Peer::run(ctx, "server", "red")?, Peer::run(ctx, "client", "red")?);
    let other = Peer::run(ctx, "other", "red")?;
    let pod = |peer: &Peer<'_>, name: &str, app: &str| {
        let ips: Vec<_> = peer.addresses.iter().map(|ip| json!({"ip": ip})).collect();
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "red", "labels": {"app": app}},
            "spec": {"containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 80}]}]},
            "status": {"phase": "Running", "podIP": peer.addresses[0], "podIPs": ips}
        })
    };
    let known = json!({"kind": "List", "apiVersion": "v1", "items": [
        pod(&server, "server", "server"),
        pod(&client, "client", "client"),
        pod(&other, "other", "other"),
    ]});
    let deny = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
        metadata: {name: deny, namespace: red}\nspec: {podSelector: {}, policyTypes: [Ingress]}\n";
    let allow = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
        metadata: {name: web, namespace: red}\nspec:\n  podSelector: {matchLabels: {app: server}}\n  \
        ingress:\n  - from: [{podSelector: {matchLabels: {app: client}}}]\n    ports: [{port: web}]\n";
    // Not known yet whether a policy selects them: closed.
    policy.apply(deny)?;
    client.expect(&server, 80, false)?;
    policy.identities(&known)?;
    client.expect(&server, 80, false)?;
    policy.apply(&format!("{deny}{allow}"))?;
    client.expect(&server, 80, true)?;
    client.expect(&server, 81, false)?;
    other.expect(&server, 80, false)?;
    server.expect(&client, 80, false)?;
    // The kubelet's probes are not narrowed.
    for address in &client.addresses {
        probe(ctx, address)?;
    }
    policy.apply("")?;
    other.expect(&server, 80, true)?;
    for peer in [server, client, other] {
        peer.remove()?;
    }
    Ok(())
}

/// A policy that cannot be is refused by the name of what is wrong, and what was in force stays.
pub fn bad_policies(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let policy = Policy::new(ctx);
    let before = super::told(ctx, &["policy", "show"])?;
    for (text, words) in [
        ("  allow:\n  - {from: red, to: blue, ports: [80/tpc]}\n", "tpc"),
        ("  allow:\n  - {from: red, too: blue}\n", "too"),
        ("  services:\n  - {name: x, addresses: [10.0.0.0/33], ports: [any]}\n", "services"),
        ("---\nkind: NetworkPolice\n", "NetworkPolice"),
        ("---\n[", ""),
    ] {
        refused(text, policy.apply(text), words)?;
    }
    let after = super::told(ctx, &["policy", "show"])?;
    same("what is in force", &after["epoch"], &before["epoch"])
}

/// A policy that is applied again and again, while pods talk: nothing allowed is held up, nothing denied passes.
pub fn applied_under_load(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let policy = Policy::new(ctx);
    let (red, friend) = (Peer::run(ctx, "red", "red")?, Peer::run(ctx, "friend", "red")?);
    let blue = Peer::run(ctx, "blue", "blue")?;
    let loops = |from: &Peer<'_>, to: &str| -> Result<()> {
        let text = format!(
            "(while :; do timeout 1 wget -qO- {} >/dev/null 2>&1 && echo yes >>/tmp/said || echo no >>/tmp/said; done) >/dev/null 2>&1 &",
            url(to, 80)
        );
        from.shell.exec(&["sh", "-c", &text]).map(drop)
    };
    loops(&red, &friend.addresses[0])?;
    loops(&blue, &friend.addresses[1])?;
    let end = Instant::now() + Duration::from_secs(8);
    let mut applied = 0;
    while Instant::now() < end {
        policy
            .apply(&format!("  allow:\n  - {{from: red, to: green{applied}, ports: [any]}}\n"))?;
        applied += 1;
    }
    let said = |peer: &Peer<'_>| peer.shell.sh("sort /tmp/said | uniq -c").map(|it| it.text());
    let (allowed, denied) = (said(&red)?, said(&blue)?);
    ensure!(allowed.contains("yes") && !allowed.contains("no"), "{applied} times: {allowed}");
    ensure!(denied.contains("no") && !denied.contains("yes"), "{applied} times: {denied}");
    ensure!(applied >= 10, "applied {applied} times only");
    for peer in [red, friend, blue] {
        peer.remove()?;
    }
    Ok(())
}

//! Services in the guest: pods whose guests translate connections to services' addresses.

mod failing;
mod reached;
mod told;

use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use joey_tests::node::config;
use joey_tests::pod::{self, Container, Pod};
use serde_json::{Value, json};

use crate::context::{Context, Test};
use crate::volumes::probed;

pub const TESTS: &[Test] = &[
    Test { name: "services::tcp", run: reached::tcp },
    Test { name: "services::datagrams", run: reached::datagrams },
    Test { name: "services::affinity", run: reached::affinity },
    Test { name: "services::itself", run: reached::itself },
    Test { name: "services::behind_a_sidecar", run: reached::behind_a_sidecar },
    Test { name: "services::tenants_apart", run: told::tenants_apart },
    Test { name: "services::changes", run: told::changes },
    Test { name: "services::before_the_first_container", run: told::before_the_first_container },
    Test { name: "services::refused", run: failing::refused_whole },
    Test { name: "services::daemon_killed", run: failing::daemon_killed },
];

/// The annotation.
const GUEST: (&str, &str) = ("io.joey.services", "guest");

/// A pod with a web server that says its name, a server of datagrams that does so too, and the probe.
struct Peer<'n> {
    pod: Pod<'n>,
    shell: Container<'n>,
    addresses: Vec<IpAddr>,
}

impl<'n> Peer<'n> {
    fn run(ctx: &Context<'n>, name: &str, namespace: &str) -> Result<Self> {
        Self::annotated(ctx, name, namespace, &[GUEST])
    }

    fn annotated(
        ctx: &Context<'n>,
        name: &str,
        namespace: &str,
        annotations: &[(&str, &str)],
    ) -> Result<Self> {
        let config = pod::annotated(ctx.node, name, namespace, annotations);
        let pod = Pod::run_with(ctx.node, ctx.handler, config)?;
        let serve = format!(
            "mkdir /own && echo {name} > /own/index.html && httpd -p '[::]:8080' -h /own && \
             {{ /probe services answer 5353 {name} & }} && echo up && sleep 10000"
        );
        let shell = pod.start(&probed(pod::script("server", &serve)))?;
        shell.wait_output("up", pod::SOON)?;
        let addresses =
            pod.addresses()?.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        Ok(Self { pod, shell, addresses })
    }

    /// Who answers this pod by HTTP; `None` if nobody.
    fn asks(&self, at: &str) -> Result<Option<String>> {
        let url = format!("http://{at}/");
        let answer = self.shell.exec(&["timeout", "2", "wget", "-qO-", &url])?;
        Ok((answer.code == 0).then(|| answer.text().trim().to_owned()))
    }

    /// What the probe says of so many connections: peer or kind of error, and microseconds.
    fn connects(&self, to: &str, times: u32) -> Result<Vec<(String, u64)>> {
        let answer =
            self.shell.exec(&["/probe", "services", "connect", to, &times.to_string()])?.text();
        let line = |line: &str| -> Result<_> {
            let (who, took) = line.split_once(' ').with_context(|| format!("{line:?}"))?;
            Ok((who.to_owned(), took.parse()?))
        };
        answer.lines().map(line).collect()
    }

    /// Who answers this pod by one datagram of a new socket, and from where; or the kind of error.
    fn sends(&self, to: &str, how: &str) -> Result<String> {
        let told = self.shell.sh(&format!("echo ? | /probe services question {to} {how}"))?.text();
        Ok(told.trim().strip_prefix("1: ").unwrap_or_default().to_owned())
    }

    fn remove(self) -> Result<()> {
        self.pod.remove()
    }
}

/// Endpoints of a port: the addresses of pods that are of the service's families.
fn endpoints(peers: &[&Peer<'_>], port: u16) -> Value {
    let all = peers.iter().flat_map(|peer| &peer.addresses);
    all.map(|address| json!({"address": address, "port": port})).collect()
}

/// A service of two addresses, with a web port 80 and a port 53 of datagrams.
fn service(namespace: &str, name: &str, number: u16, peers: &[&Peer<'_>]) -> Value {
    json!({
        "namespace": namespace, "name": name, "addresses": addresses(number),
        "ports": [
            {"name": "web", "port": 80, "endpoints": endpoints(peers, 8080)},
            {"name": "dns", "port": 53, "protocol": "UDP", "endpoints": endpoints(peers, 5353)},
        ]
    })
}

fn addresses(number: u16) -> [IpAddr; 2] {
    let [high, low] = number.to_be_bytes();
    [IpAddr::from([10, 96, high, low]), IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, number])]
}

/// Its addresses with a port, as programs take them.
fn at(number: u16, port: u16) -> [String; 2] {
    addresses(number).map(|address| SocketAddr::from((address, port)).to_string())
}

/// The node's services, as tests change them by the daemon; none again in the end.
struct Services<'a, 'n> {
    ctx: &'a Context<'n>,
}

impl<'a, 'n> Services<'a, 'n> {
    fn new(ctx: &'a Context<'n>) -> Self {
        Self { ctx }
    }

    /// With one that has no endpoints: the tenant's pods can start.
    fn with_none(ctx: &'a Context<'n>) -> Result<Self> {
        let services = Self::new(ctx);
        services.feed(&[service("red", "none", 9, &[])])?;
        Ok(services)
    }

    /// Has these be all services.
    fn feed(&self, services: &[Value]) -> Result<()> {
        self.told("feed", &json!(services))?;
        Ok(())
    }

    /// The node's own policy documents and more of the node policy.
    fn policy(&self, more: &str) -> Result<()> {
        let path = self.ctx.node.dir().join("more.yaml");
        fs::write(&path, format!("{}{more}", config::POLICY))?;
        self.ctx.node.joey(&["policy", "apply", "-f", &path.to_string_lossy()])?;
        Ok(())
    }

    fn told(&self, by: &str, list: &Value) -> Result<String> {
        let path = self.ctx.node.dir().join("services.json");
        fs::write(&path, list.to_string())?;
        let empty = if by == "apply" { &["--allow-empty"][..] } else { &[] };
        self.ctx.node.joey(&[&["services", by, "-f", &path.to_string_lossy()], empty].concat())
    }
}

impl Drop for Services<'_, '_> {
    fn drop(&mut self) {
        let _ = self.policy("");
        let _ = self.told("apply", &json!([]));
        for file in ["services.json", "more.yaml"] {
            let _ = fs::remove_file(self.ctx.node.dir().join(file));
        }
    }
}

/// Checks that an answer is one of those.
fn among(what: &str, found: &Option<String>, names: &[&str]) -> Result<()> {
    let known = found.as_deref().is_some_and(|found| names.contains(&found));
    ensure!(known, "{what}: {found:?} is none of {names:?}");
    Ok(())
}

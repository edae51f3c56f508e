//! Who reaches whom: tenants apart, the node's policy and NetworkPolicies, no gap whoever is killed, and all
//! of it seen.

mod gaps;
mod orphans;
mod policy;
pub(crate) mod seeing;
mod spoofing;

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use joey_tests::node::config;
use joey_tests::pod::{self, Container, Pod};

use crate::context::{Context, Test, holds, skip};
use crate::network;

pub const TESTS: &[Test] = &[
    Test { name: "tenants::apart", run: policy::apart },
    Test { name: "tenants::of_annotations", run: policy::of_annotations },
    Test { name: "tenants::allowed_and_revoked", run: policy::allowed_and_revoked },
    Test { name: "tenants::network_policy", run: policy::network_policy },
    Test { name: "tenants::bad_policies", run: policy::bad_policies },
    Test { name: "tenants::applied_under_load", run: policy::applied_under_load },
    Test { name: "tenants::spoofing", run: spoofing::spoofing },
    Test { name: "tenants::no_gap_at_the_start", run: gaps::at_the_start },
    Test { name: "tenants::no_gap_on_the_wire", run: gaps::on_the_wire },
    Test { name: "tenants::no_gap_by_kills", run: gaps::by_kills },
    Test { name: "tenants::no_gap_at_each_step", run: gaps::at_each_step },
    Test { name: "tenants::no_gap_after_a_boot", run: gaps::after_a_boot },
    Test { name: "tenants::orphans_collected", run: orphans::collected },
    Test { name: "tenants::counted_as_captured", run: seeing::counted_as_captured },
    Test { name: "tenants::flows", run: seeing::flows },
    Test { name: "tenants::limits", run: seeing::limits },
];

/// How long a refused connection is waited for, in seconds: nothing answers.
const PATIENCE: &str = "2";

/// A pod of a namespace, with a web server on both families and a shell to ask others from.
pub(crate) struct Peer<'n> {
    pub(crate) pod: Pod<'n>,
    pub(crate) shell: Container<'n>,
    pub(crate) addresses: Vec<String>,
}

impl<'n> Peer<'n> {
    pub(crate) fn run(ctx: &Context<'n>, name: &str, namespace: &str) -> Result<Self> {
        Self::annotated(ctx, name, namespace, &[])
    }

    pub(crate) fn annotated(
        ctx: &Context<'n>,
        name: &str,
        namespace: &str,
        annotations: &[(&str, &str)],
    ) -> Result<Self> {
        let config = pod::annotated(ctx.node, name, namespace, annotations);
        let pod = Pod::run_with(ctx.node, ctx.handler, config)?;
        let serve =
            "httpd -p '[::]:80' -h /www && httpd -p '[::]:81' -h /www && echo up && sleep 10000";
        let mut container = pod::script("server", serve);
        let capabilities = pod::security(&mut container).capabilities.get_or_insert_default();
        capabilities.add_capabilities = vec!["NET_ADMIN".into(), "NET_RAW".into()];
        let shell = pod.start(&container)?;
        shell.wait_output("up", pod::SOON)?;
        let addresses = pod.addresses()?;
        Ok(Self { pod, shell, addresses })
    }

    /// Whether this pod gets an answer from the web server at an address.
    pub(crate) fn reaches(&self, address: &str, port: u16) -> Result<bool> {
        let url = url(address, port);
        let answer = self.shell.exec(&["timeout", PATIENCE, "wget", "-qO-", &url])?;
        Ok(answer.code == 0 && answer.text().contains("hello from the pod"))
    }

    /// Whether an address answers this pod's ping.
    pub(crate) fn pings(&self, address: &str) -> Result<bool> {
        Ok(self.shell.exec(&["ping", "-c", "1", "-W", PATIENCE, address])?.code == 0)
    }

    /// Checks for both families whether this pod reaches another.
    pub(crate) fn expect(&self, other: &Peer<'_>, port: u16, expected: bool) -> Result<()> {
        for address in &other.addresses {
            let reached = self.reaches(address, port)?;
            ensure!(
                reached == expected,
                "{} {} {address} port {port}",
                self.addresses[0],
                if reached { "reaches" } else { "does not reach" }
            );
        }
        Ok(())
    }

    pub(crate) fn remove(self) -> Result<()> {
        self.pod.remove()
    }
}

/// Asks a pod's web server as a kubelet's probe does.
pub(crate) fn probe(ctx: &Context<'_>, address: &str) -> Result<()> {
    let answer = ctx.node.in_network(|| network::get(address, 80))??;
    holds("a probe", &answer, "hello from the pod")
}

fn url(address: &str, port: u16) -> String {
    match address.contains(':') {
        true => format!("http://[{address}]:{port}/"),
        false => format!("http://{address}:{port}/"),
    }
}

/// The node's policy as tests change it; the node's own is applied again in the end.
pub(crate) struct Policy<'a, 'n> {
    ctx: &'a Context<'n>,
}

impl<'a, 'n> Policy<'a, 'n> {
    pub(crate) fn new(ctx: &'a Context<'n>) -> Self {
        Self { ctx }
    }

    /// Applies the node's own documents and more.
    pub(crate) fn apply(&self, more: &str) -> Result<String> {
        let path = self.ctx.node.dir().join("more.yaml");
        fs::write(&path, format!("{}{more}", config::POLICY))?;
        self.ctx.node.joey(&["policy", "apply", "-f", &path.to_string_lossy()])
    }

    /// Says who peers are, in the words of `kubectl get … -o json`, to the daemon, as a feeder does.
    fn identities(&self, list: &serde_json::Value) -> Result<String> {
        self.told(&["identity", "feed"], list)
    }

    fn told(&self, arguments: &[&str], list: &serde_json::Value) -> Result<String> {
        let path = self.ctx.node.dir().join("pods.json");
        fs::write(&path, list.to_string())?;
        self.ctx.node.joey(&[arguments, &["-f", &path.to_string_lossy()]].concat())
    }
}

impl Drop for Policy<'_, '_> {
    fn drop(&mut self) {
        let _ = self.apply("");
        let nobody = serde_json::json!({"kind": "List", "items": []});
        let _ = self.told(&["identity", "apply", "--allow-empty"], &nobody);
        for file in ["more.yaml", "pods.json"] {
            let _ = fs::remove_file(self.ctx.node.dir().join(file));
        }
    }
}

/// What `joey` prints with `--json`, as it is.
pub(crate) fn told(ctx: &Context<'_>, arguments: &[&str]) -> Result<serde_json::Value> {
    let text = ctx.node.joey(&[arguments, &["--json"]].concat())?;
    serde_json::from_str(&text).with_context(|| format!("joey {arguments:?} printed {text}"))
}

/// Leaves the test unless the handler is Joey's.
pub(crate) fn only_joey(ctx: &Context<'_>) -> Result<()> {
    if ctx.handler == "runc" {
        return skip("runc's pods are on the CNI's network as it is");
    }
    if !ctx.node.dir().join("policy.yaml").exists() {
        bail!("the node has no policy");
    }
    Ok(())
}

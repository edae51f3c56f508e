//! Sidecar mode: a container's connections go by the pod's proxy, without a privilege for anybody.

use std::io::Write as _;
use std::net::{Ipv6Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use joey_tests::pod::{self, Container, Pod, SOON};
use k8s_cri::v1::{ContainerConfig, Int64Value};

use crate::context::{Context, holds, same};
use crate::volumes::probed;

/// The node as pods reach it.
const NODE: [&str; 2] = ["10.88.0.1", "[fd88::1]"];
/// The user that Istio's proxy runs as.
const PROXY: i64 = 1337;

/// Answers on a port of the node, both families, with who it says a connection is from.
struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(ctx: &Context<'_>, port: u16) -> Result<Self> {
        let bind = || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port));
        let listener = ctx.node.in_network(bind)?.context("bind")?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let serve = move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((mut stream, from)) => {
                        let from = from.ip().to_canonical();
                        let _ = stream.write_all(format!("node to {from}").as_bytes());
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        };
        Ok(Self { stop, thread: Some(std::thread::spawn(serve)) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A pod in sidecar mode, with more annotations.
fn meshed<'n>(ctx: &Context<'n>, name: &str, annotations: &[(&str, &str)]) -> Result<Pod<'n>> {
    let mut config = pod::config(ctx.node, name);
    let annotations = [("io.joey.mesh", "sidecar")].iter().chain(annotations);
    let annotations = annotations.map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    config.annotations.extend(annotations);
    Pod::run_with(ctx.node, ctx.handler, config)
}

/// A container of a user, without a capability.
fn of_user(mut config: ContainerConfig, user: i64) -> ContainerConfig {
    let security = pod::security(&mut config);
    security.run_as_user = Some(Int64Value { value: user });
    security.run_as_group = Some(Int64Value { value: user });
    security.no_new_privs = true;
    let capabilities = security.capabilities.get_or_insert_default();
    capabilities.drop_capabilities = vec!["ALL".into()];
    config
}

/// The proxy, listening.
fn proxy<'n>(pod: &Pod<'n>) -> Result<Container<'n>> {
    let config = pod::container("proxy", &["/probe", "sidecar", "15001", "15006"]);
    let proxy = pod.start(&of_user(probed(config), PROXY))?;
    proxy.wait_output("sidecar is up", SOON)?;
    Ok(proxy)
}

/// The application, which does what it is told by exec.
fn application<'n>(pod: &Pod<'n>) -> Result<Container<'n>> {
    pod.start(&of_user(probed(pod::script("app", "sleep 10000")), 1000))
}

/// What one connection comes to: who the other end says it is, and what it says.
fn dial(container: &Container<'_>, to: &str) -> Result<String> {
    let answer = container.exec(&["/probe", "dial", to])?;
    let errors = String::from_utf8_lossy(&answer.stderr).into_owned();
    Ok(format!("{} {errors}", answer.text()))
}

pub(super) fn outbound(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let _server = Server::start(ctx, 7171)?;
    let pod = meshed(ctx, "outbound", &[])?;
    let app = application(&pod)?;
    // Nothing listens: nothing leaves.
    holds("without a proxy", &dial(&app, "10.88.0.1:7171")?, "ConnectionRefused")?;
    holds("without a proxy", &dial(&app, "[fd88::1]:7171")?, "ConnectionRefused")?;
    let proxy = proxy(&pod)?;
    for node in NODE {
        let to = format!("{node}:7171");
        let answer = dial(&app, &to)?;
        holds("the peer is who was asked for", &answer, &format!("peer {to}"))?;
        holds("answer", &answer, "said \"node to ")?;
        proxy.wait_output(&format!(" for {to};"), SOON)?;
        // The proxy's own go where they go.
        holds("proxy's own", &dial(&proxy, &to)?, "said \"node to ")?;
    }
    let said = String::from_utf8_lossy(&proxy.logs()?.0).into_owned();
    same("redirected", said.matches("outbound from").count(), 2)?;
    pod.remove()
}

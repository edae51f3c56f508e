//! Sidecar mode: a container's connections go by the pod's proxy, without a privilege for anybody.

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use joey_tests::pod::{self, Container, Pod, SOON};
use joey_tests::{image, paths};
use k8s_cri::v1::{ContainerConfig, ContainerState, Int64Value};

use crate::context::{Context, holds, same};
use crate::volumes::probed;

/// The node as pods reach it.
const NODE: [&str; 2] = ["10.88.0.1", "[fd88::1]"];
/// How long a connection from the node is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long many connections may take.
const LONG: Duration = Duration::from_secs(280);
/// The user that Istio's proxy runs as.
const PROXY: i64 = 1337;

/// Answers on a port of the node, both families, with who it says a connection is from.
pub(super) struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(super) fn start(ctx: &Context<'_>, port: u16) -> Result<Self> {
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
                        // Some proxies cannot have the server speak first.
                        let _ = stream.set_nonblocking(false);
                        let _ = stream.set_read_timeout(Some(PATIENCE));
                        let _ = stream.read(&mut [0; 16]);
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
pub(super) fn of_user(mut config: ContainerConfig, user: i64) -> ContainerConfig {
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
    proxy_of(pod, PROXY, "tells")
}

/// One that carries connections on and tells of them, or answers them itself.
fn proxy_of<'n>(pod: &Pod<'n>, user: i64, manner: &str) -> Result<Container<'n>> {
    let config = pod::container("proxy", &["/probe", "sidecar", manner, "15001", "15006"]);
    let proxy = pod.start(&of_user(probed(config), user))?;
    proxy.wait_output("sidecar is up", SOON)?;
    Ok(proxy)
}

/// The application, which does what it is told by exec.
fn application<'n>(pod: &Pod<'n>) -> Result<Container<'n>> {
    pod.start(&of_user(probed(pod::script("app", "sleep 10000")), 1000))
}

/// What one connection comes to: who the other end says it is, and what it says.
pub(super) fn dial(container: &Container<'_>, to: &str) -> Result<String> {
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

/// What a connection from the node to the pod comes to; `None` if there is none.
pub(super) fn from_node(ctx: &Context<'_>, address: &str, port: u16) -> Result<Option<String>> {
    let to = SocketAddr::new(address.parse()?, port);
    ctx.node.in_network(|| {
        let Ok(mut stream) = TcpStream::connect_timeout(&to, PATIENCE) else { return Ok(None) };
        stream.set_read_timeout(Some(PATIENCE))?;
        // Refused later than at once: no answer, too.
        let _ = stream.write_all(b"who");
        let mut said = String::new();
        Ok(stream.read_to_string(&mut said).is_ok().then_some(said).filter(|said| !said.is_empty()))
    })?
}

pub(super) fn inbound(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = meshed(ctx, "inbound", &[("traffic.sidecar.istio.io/excludeInboundPorts", "8081")])?;
    let serve = "for port in 8080 8081 15020; do /probe answer [::]:$port & done; wait";
    let app = pod.start(&of_user(probed(pod::script("app", serve)), 1000))?;
    let up = |app: &Container<'_>| -> Result<()> {
        for _ in 0..200 {
            let said = String::from_utf8_lossy(&app.logs()?.0).into_owned();
            if said.matches("answers").count() == 3 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("the application does not listen")
    };
    up(&app)?;
    let addresses = pod.addresses()?;
    for address in &addresses {
        same("without a proxy", from_node(ctx, address, 8080)?, None)?;
        // Ports that are excluded, by annotation or always, are reached as if there were no mesh.
        for port in [8081, 15020] {
            let said = from_node(ctx, address, port)?.unwrap_or_default();
            ensure!(said.starts_with("pod to ") && !said.contains(" 127."), "{port}: {said:?}");
        }
    }
    let proxy = proxy(&pod)?;
    for address in &addresses {
        let by_proxy = if address.contains(':') { "pod to [::1]:" } else { "pod to 127.0.0.1:" };
        holds("inbound", &from_node(ctx, address, 8080)?.unwrap_or_default(), by_proxy)?;
        // Its own address is where the connection was to go, too.
        let to = SocketAddr::new(address.parse()?, 8080);
        proxy.wait_output(&format!(" at {to} for {to};"), SOON)?;
        // The pod's own to itself: the application's directly, the proxy's as from outside.
        let own = dial(&app, &to.to_string())?;
        holds("application to its pod", &own, &format!("pod to {}", bare(address)))?;
        holds("proxy to its pod", &dial(&proxy, &to.to_string())?, by_proxy)?;
        let inner = if address.contains(':') { "[::1]:15006" } else { "127.0.0.1:15006" };
        proxy.wait_output(&format!(" at {inner} for {to};"), SOON)?;
        holds(
            "localhost",
            &dial(&app, if address.contains(':') { "[::1]:8080" } else { "127.0.0.1:8080" })?,
            by_proxy,
        )?;
    }
    // What Istio's validation does.
    for to in ["127.0.0.6:15002", "[::6]:15002"] {
        dial(&proxy, to)?;
        proxy.wait_output(&format!(" for {to};"), SOON)?;
    }
    // kubectl port-forward reaches the application, as from localhost.
    std::thread::sleep(Duration::from_millis(300));
    let mut forwarded = pod.forward(8080)?;
    forwarded.send(b"who")?;
    holds("port-forward", &String::from_utf8_lossy(&forwarded.receive()?), "pod to 127.0.0.1:")?;
    same("inbound", seen(&proxy, "inbound from")?, 6)?;
    // Killed: refused, never past it. Back: as before.
    proxy.remove(Duration::ZERO)?;
    for address in &addresses {
        same("proxy killed", from_node(ctx, address, 8080)?, None)?;
    }
    let proxy = self::proxy(&pod)?;
    for address in &addresses {
        ensure!(from_node(ctx, address, 8080)?.is_some(), "{address}: the proxy is back");
    }
    same("inbound", seen(&proxy, "inbound from")?, 2)?;
    pod.remove()
}

fn bare(address: &str) -> String {
    if address.contains(':') { format!("[{address}]:") } else { format!("{address}:") }
}

fn seen(container: &Container<'_>, words: &str) -> Result<usize> {
    Ok(String::from_utf8_lossy(&container.logs()?.0).matches(words).count())
}

/// What Istio's annotations leave alone, and whom Joey's do.
pub(super) fn exclusions(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let _servers = [7171, 7272, 7373].map(|port| Server::start(ctx, port));
    let pod = meshed(
        ctx,
        "excluded",
        &[
            ("traffic.sidecar.istio.io/excludeOutboundPorts", "7272"),
            ("traffic.sidecar.istio.io/includeOutboundPorts", "7171"),
            ("traffic.sidecar.istio.io/includeOutboundIPRanges", "10.88.0.0/16"),
            ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.88.0.1/32"),
            ("traffic.sidecar.istio.io/includeInboundPorts", "9090"),
            ("io.joey.mesh.exclude-uids", "1500"),
            ("io.joey.mesh.exclude-gids", ""),
        ],
    )?;
    let app = application(&pod)?;
    let proxy = proxy_of(&pod, 1500, "tells")?;
    let other = pod.start(&of_user(probed(pod::script("other", "sleep 10000")), PROXY))?;
    for (to, redirected, why) in [
        ("10.88.0.1:7373", false, "the range is excluded"),
        ("[fd88::1]:7373", false, "no range of IPv6 is included"),
        ("[fd88::1]:7171", true, "the port is included wherever"),
        ("10.88.0.1:7171", false, "an excluded range goes before an included port"),
        ("10.88.0.1:7272", false, "the port is excluded"),
    ] {
        let before = seen(&proxy, "outbound from")?;
        holds(why, &dial(&app, to)?, "said \"node to ")?;
        same(why, seen(&proxy, "outbound from")? > before, redirected)?;
    }
    // Who has not the number that was named is nobody special.
    holds("1337", &dial(&other, "[fd88::1]:7171")?, "said \"node to ")?;
    same("redirected", seen(&proxy, "outbound from")?, 2)?;
    let _answer = other.exec(&["sh", "-c", "/probe answer [::]:9090 >/dev/null 2>&1 & /probe answer [::]:9091 >/dev/null 2>&1 & sleep 1"])?;
    let address = pod.addresses()?.swap_remove(0);
    let direct = from_node(ctx, &address, 9091)?.unwrap_or_default();
    ensure!(direct.starts_with("pod to 10."), "a port that is not included: {direct:?}");
    holds("included", &from_node(ctx, &address, 9090)?.unwrap_or_default(), "pod to 127.0.0.1:")?;
    pod.remove()
}

/// A container that is not the proxy listens where the proxy would.
pub(super) fn impostor(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = meshed(ctx, "impostor", &[])?;
    let _server = Server::start(ctx, 7171)?;
    let app = application(&pod)?;
    // Root, with every capability that containers have by default.
    let root = pod.start(&probed(pod::script("root", "sleep 10000")))?;
    for container in [&app, &root] {
        for at in ["127.0.0.1:15001", "0.0.0.0:15006", "[::]:15006", "[::1]:15001"] {
            let answer = container.exec(&["timeout", "5", "/probe", "answer", at])?;
            holds(at, &String::from_utf8_lossy(&answer.stderr), "Operation not permitted")?;
        }
    }
    let proxy = proxy(&pod)?;
    // What the proxy alone is told.
    holds("redirected", &dial(&app, "10.88.0.1:7171")?, "said \"node to ")?;
    same("outbound", seen(&proxy, "outbound from")?, 1)?;
    pod.remove()
}

/// Annotations that cannot be followed: the pod does not start, and the error says why.
pub(super) fn bad_annotations(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    for (name, value, words) in [
        ("io.joey.mesh", "sidecars", "must be ambient, sidecar, observe or none"),
        ("io.joey.mesh.outbound-port", "65536", "a port from 1 to 65535"),
        ("io.joey.mesh.exclude-uids", "envoy", "\"envoy\" is not a number"),
        ("io.joey.mesh.dns", "yes", "true or false"),
        ("traffic.sidecar.istio.io/excludeOutboundPorts", "80,x", "\"x\" is not a port"),
        ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.0.0.0/33", "a range"),
    ] {
        let pod = meshed(ctx, "bad", &[(name, value)]).map(drop);
        let error = pod.err().map(|error| format!("{error:#}")).unwrap_or_default();
        holds(name, &error, words)?;
        holds(name, &error, name)?;
    }
    Ok(())
}

/// Many connections, one after another; how many failed, and how many went past the proxy.
fn flood(container: &Container<'_>, count: u32) -> Result<(u32, u32, String)> {
    let answer = container
        .exec_for(&["/probe", "connections", "10.88.0.1:7171", &count.to_string()], SOON * 2)?;
    let said = answer.text();
    let number = |name: &str| -> Result<u32> {
        let mut words = said.split(' ').skip_while(|word| *word != name).skip(1);
        Ok(words.next().with_context(|| format!("no {name} in {said:?}"))?.parse()?)
    };
    Ok((number("failed")?, number("direct")?, said.clone()))
}

/// The proxy is killed and comes back, again and again, while connections are made: some fail, none goes past it.
pub(super) fn killed_under_load(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let _server = Server::start(ctx, 7171)?;
    let pod = meshed(ctx, "killed", &[])?;
    let app = application(&pod)?;
    let mut proxy = proxy_of(&pod, PROXY, "answers")?;
    let flooding = AtomicBool::new(true);
    std::thread::scope(|scope| -> Result<()> {
        let flooded = scope.spawn(|| {
            let result = flood(&app, 20_000);
            flooding.store(false, Ordering::Relaxed);
            result
        });
        for _ in 0..4 {
            proxy.remove(Duration::ZERO)?;
            std::thread::sleep(Duration::from_millis(200));
            proxy = proxy_of(&pod, PROXY, "answers")?;
            std::thread::sleep(Duration::from_millis(300));
        }
        ensure!(flooding.load(Ordering::Relaxed), "the load ended before the kills did");
        let Ok(flooded) = flooded.join() else { bail!("the thread panicked") };
        let (failed, direct, said) = flooded?;
        println!("        {said}");
        same("past the proxy", direct, 0)?;
        ensure!(failed > 0, "no connection was refused: {said}");
        Ok(())
    })?;
    same("afterwards", flood(&app, 100)?.0, 0)?;
    pod.remove()
}

/// More connections than any of the maps has room for.
pub(super) fn many_connections(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = meshed(ctx, "many", &[])?;
    let _proxy = proxy_of(&pod, PROXY, "answers")?;
    let command = ["/probe", "connections", "10.88.0.1:7171", "100000"];
    let app = pod.start(&of_user(probed(pod::container("app", &command)), 1000))?;
    app.wait(LONG)?;
    let said = String::from_utf8_lossy(&app.logs()?.0).trim().to_owned();
    println!("        {said}");
    holds("all of them", &said, "failed 0 direct 0 ")?;
    pod.remove()
}

/// DNS queries are the proxy's to answer, and the answers are of who was asked.
pub(super) fn dns(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = meshed(ctx, "names", &[("io.joey.mesh.dns", "true")])?;
    let app = application(&pod)?;
    let query = |to: &str| Ok::<_, anyhow::Error>(app.exec(&["/probe", "query", to])?.text());
    for to in ["10.96.0.10:53", "[fd96::a]:53"] {
        let said = query(to)?;
        ensure!(!said.contains("answer from"), "nobody answers, yet: {said:?}");
    }
    let echo = pod::container("proxy", &["/probe", "echo", "[::]:15053"]);
    let echo = pod.start(&of_user(probed(echo), PROXY))?;
    echo.wait_output("echoes", SOON)?;
    for to in ["10.96.0.10:53", "[fd96::a]:53", "127.0.0.53:53"] {
        let said = query(to)?;
        same(to, said.matches(&format!("answer from {to}")).count(), 2)?;
        holds(to, &said, &format!("peer {to}"))?;
    }
    // Other ports are not queries.
    let said = query("10.88.0.1:5300")?;
    ensure!(!said.contains("answer from"), "not a query: {said:?}");
    pod.remove()
}

/// A proxy that others have written, by nothing but SO_ORIGINAL_DST: Debian's sslsplit, both families.
pub(super) fn real_proxy(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let archive = image::sslsplit(&paths::repository().join("target/images"))?;
    ctx.node.import(&archive)?;
    let _server = Server::start(ctx, 7171)?;
    let pod = meshed(ctx, "sslsplit", &[])?;
    let serve = pod::script("app", "/probe answer [::]:8080");
    let app = pod.start(&of_user(probed(serve), 1000))?;
    app.wait_output("answers", SOON)?;
    let command = "exec sslsplit -l /dev/stdout tcp 127.0.0.1 15001 netfilter \
tcp ::1 15001 netfilter tcp :: 15006 ::1 8080";
    let mut config = of_user(pod::script("proxy", command), PROXY);
    config.image.get_or_insert_default().image = image::SSLSPLIT.into();
    let proxy = pod.start(&config)?;
    let said = || -> Result<String> {
        let (said, errors) = proxy.logs()?;
        Ok(format!("{}{}", String::from_utf8_lossy(&said), String::from_utf8_lossy(&errors)))
    };
    let end = Instant::now() + SOON;
    for node in NODE {
        let to = format!("{node}:7171");
        let mut answer = dial(&app, &to)?;
        while answer.contains("ConnectionRefused") && Instant::now() < end {
            let state = proxy.status()?.state();
            ensure!(state == ContainerState::ContainerRunning, "sslsplit: {}", said()?);
            std::thread::sleep(Duration::from_millis(100));
            answer = dial(&app, &to)?;
        }
        holds(&said()?, &answer, "said \"node to ")?;
    }
    for address in pod.addresses()? {
        // The last that it listens for.
        let mut said = from_node(ctx, &address, 8080)?;
        while said.is_none() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(100));
            said = from_node(ctx, &address, 8080)?;
        }
        holds("inbound", &said.unwrap_or_default(), "pod to [::1]:")?;
    }
    let said = said()?;
    println!("        {}", said.lines().last().unwrap_or_default());
    holds("its log", &said, "10.88.0.1")?;
    pod.remove()
}

/// An agent does not come back: its end is the machine's, so no container goes on without the programs.
pub(super) fn guest_ends(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let mut config = pod::config(ctx.node, "ends");
    config.annotations.insert("io.joey.mesh".to_owned(), "sidecar".to_owned());
    let sandbox = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    sandbox.privileged = true;
    let pod = Pod::run_with(ctx.node, ctx.handler, config)?;
    let app = application(&pod)?;
    // What the agent's end does, too: the machine is reset.
    let mut reset = pod::script("reset", "sleep 1; echo b > /proc/sysrq-trigger; sleep 100");
    pod::security(&mut reset).privileged = true;
    let reset = pod.start(&reset)?;
    same("the application has ended", app.wait(SOON)?.exit_code, 137)?;
    reset.wait(SOON)?;
    let config = pod::script("late", "true");
    // By the shim, or by containerd, which has forgotten it by then.
    ensure!(pod.start(&config).is_err(), "a container starts in a machine that has ended");
    pod.remove()
}

//! The pod's network is that of its CNI interface, in both directions and both families.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use joey_tests::pod::{self, Pod, SOON};
use k8s_cri::v1::{NamespaceMode, NamespaceOption};

use crate::context::{Context, Test, holds, refused, same};

pub const TESTS: &[Test] = &[
    Test { name: "network::server_in_pod", run: server_in_pod },
    Test { name: "network::pod_reaches_node", run: pod_reaches_node },
    Test { name: "network::pods_reach_each_other", run: pods_reach_each_other },
    Test { name: "network::interface_as_given", run: interface_as_given },
    Test { name: "network::large_transfer", run: large_transfer },
    Test { name: "network::port_forward", run: port_forward },
    Test { name: "network::host_network_is_refused", run: host_network },
    Test { name: "network::host_ipc_is_refused", run: host_ipc },
    Test { name: "network::host_pid_is_refused", run: host_pid },
];

/// Asks for `/` until a server answers.
pub fn get(address: &str, port: u16) -> Result<String> {
    let target = SocketAddr::new(address.parse::<IpAddr>()?, port);
    let end = Instant::now() + Duration::from_secs(15);
    loop {
        let attempt = || -> Result<String> {
            let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(2))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        match attempt() {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > end => {
                return Err(error.context(format!("ask {target}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn server_in_pod(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("server")?;
    let _server = pod.start(&pod::script("httpd", "httpd -f -p '[::]:80' -h /www"))?;
    let addresses = pod.addresses()?;
    same("addresses", addresses.len(), 2)?;
    for address in addresses {
        let answer = ctx.node.in_network(|| get(&address, 80))??;
        holds(&address, &answer, "hello from the pod")?;
    }
    pod.remove()
}

/// `kubectl port-forward`: to what listens on the pod's localhost, which nothing else reaches.
fn port_forward(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("forward")?;
    let text = "httpd -p 127.0.0.1:8081 -h /www; httpd -p '[::1]:8086' -h /www; \
        nc -ll -p 8080 -e cat & for port in 8080 8081 8086; do \
        until netstat -ltn | grep -q :$port; do usleep 50000; done; done; echo up; wait";
    let server = pod.start(&pod::script("c", text))?;
    server.wait_output("up", SOON)?;
    std::thread::sleep(Duration::from_millis(300));
    for port in [8081, 8086] {
        let mut connection = pod.forward(port)?;
        connection.send(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = Vec::new();
        loop {
            let more = connection.receive()?;
            answer.extend_from_slice(&more);
            if more.is_empty() {
                break;
            }
        }
        let what = format!("port {port} ({})", connection.errors);
        holds(&what, &String::from_utf8_lossy(&answer), "hello from the pod")?;
    }
    // Two at once, and more than any buffer holds.
    let (mut one, mut other) = (pod.forward(8080)?, pod.forward(8080)?);
    other.send(b"meanwhile")?;
    let block: Vec<u8> = (0..64 * 1024_u32).map(|n| (n / 256 + n) as u8).collect();
    for _ in 0..32 {
        one.send(&block)?;
        let mut echo = Vec::new();
        while echo.len() < block.len() {
            let more = one.receive()?;
            ensure!(!more.is_empty(), "ended after {} bytes: {}", echo.len(), one.errors);
            echo.extend_from_slice(&more);
        }
        ensure!(echo == block, "another echo than what was sent");
    }
    same("beside it", other.receive()?.as_slice(), b"meanwhile".as_slice())?;
    // Nothing listens: an error, or an end without a word; and the pod is well.
    let mut connection = pod.forward(9999)?;
    let _ = connection.send(b"x");
    same("from nobody", connection.receive().unwrap_or_default(), Vec::<u8>::new())?;
    same("pod lives on", pod.script("echo ok")?.text(), "ok")?;
    pod.remove()
}

fn pod_reaches_node(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("client")?;
    let container = pod.start(&pod::script("c", "sleep 1000"))?;
    for (bind, url) in
        [("0.0.0.0:7070", "http://10.88.0.1:7070/"), ("[::]:7071", "http://[fd88::1]:7071/")]
    {
        let listener = ctx.node.in_network(|| TcpListener::bind(bind))?.context("bind")?;
        listener.set_nonblocking(true)?;
        let (answer, served) = std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&listener));
            let answer = container.exec(&["wget", "-qO-", url]);
            (answer, server.join())
        });
        let answer = answer?;
        let errors = String::from_utf8_lossy(&answer.stderr).into_owned();
        same(&format!("{url} {errors}"), answer.text(), "hello from the node")?;
        match served {
            Ok(result) => result?,
            Err(_) => bail!("the server panicked"),
        }
    }
    pod.remove()
}

fn serve(listener: &TcpListener) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(15);
    while Instant::now() < end {
        if let Ok((mut stream, _)) = listener.accept() {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            let mut request = [0; 1024];
            let _ = stream.read(&mut request)?;
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello from the node\n")?;
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("nobody came")
}

fn pods_reach_each_other(ctx: &Context<'_>) -> Result<()> {
    let server = ctx.pod("left")?;
    let _httpd = server.start(&pod::script("httpd", "httpd -f -p '[::]:80' -h /www"))?;
    let client = ctx.pod("right")?;
    for address in server.addresses()? {
        let host = if address.contains(':') { format!("[{address}]") } else { address };
        let text =
            format!("for i in $(seq 50); do wget -qO- http://{host}/ && break; sleep 0.1; done");
        same(&host, client.script(&text)?.text(), "hello from the pod")?;
    }
    server.remove()?;
    client.remove()
}

fn interface_as_given(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("iface")?;
    let output = pod.script("ip addr show eth0; ip route; ip -6 route; ip link show lo")?.text();
    for address in pod.addresses()? {
        holds("address", &output, &address)?;
    }
    for part in ["mtu 1500", "default via 10.88.0.1", "default via fd88::1", "LOOPBACK,UP"] {
        holds("interface", &output, part)?;
    }
    pod.remove()
}

fn large_transfer(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("transfer")?;
    let _container = pod.start(&pod::script(
        "c",
        "dd if=/dev/zero bs=1M count=64 2>/dev/null | nc -l -p 9000; sleep 1000",
    ))?;
    let address = pod.addresses()?.swap_remove(0);
    let target = SocketAddr::new(address.parse::<IpAddr>()?, 9000);
    let start = Instant::now();
    let received = ctx.node.in_network(|| -> Result<u64> {
        let end = Instant::now() + SOON;
        let mut stream = loop {
            match TcpStream::connect_timeout(&target, Duration::from_secs(2)) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > end => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        stream.set_read_timeout(Some(SOON))?;
        let mut total = 0;
        let mut buffer = vec![0; 1 << 16];
        while total < 64 << 20 {
            let count = stream.read(&mut buffer)?;
            ensure!(count > 0, "ended after {total} bytes");
            total += count as u64;
        }
        Ok(total)
    })??;
    same("bytes", received, 64 << 20)?;
    println!("        64 MiB over TCP at {:.0} MiB/s", 64.0 / start.elapsed().as_secs_f64());
    pod.remove()
}

fn host_network(ctx: &Context<'_>) -> Result<()> {
    on_node(ctx, "host network", |namespaces| namespaces.network = NamespaceMode::Node.into())
}

fn host_ipc(ctx: &Context<'_>) -> Result<()> {
    on_node(ctx, "host IPC", |namespaces| namespaces.ipc = NamespaceMode::Node.into())
}

fn host_pid(ctx: &Context<'_>) -> Result<()> {
    on_node(ctx, "host PID", |namespaces| namespaces.pid = NamespaceMode::Node.into())
}

/// A pod that asks for a namespace of the node is refused.
fn on_node(ctx: &Context<'_>, what: &str, ask: fn(&mut NamespaceOption)) -> Result<()> {
    ctx.only_joey()?;
    let mut config = pod::config(ctx.node, "onnode");
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    if let Some(namespaces) = security.and_then(|s| s.namespace_options.as_mut()) {
        ask(namespaces);
    }
    refused(what, Pod::run_with(ctx.node, ctx.handler, config), what)
}

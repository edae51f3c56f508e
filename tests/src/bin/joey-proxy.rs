//! A proxy in a pod's network namespace that has the sockets of Istio's ztunnel, which cannot be installed here: what
//! the mesh's tests and benchmark have the pods' connections go through.
//!
//! What it does as ztunnel does, and where that is written (istio/ztunnel):
//!
//! - it listens on `[::]` at 15001, 15006 and 15008, on loopback at 15053 (`src/config.rs`), in the pod's namespace, each
//!   socket with the mark 0x539 (`src/inpod/linux/config.rs`), made transparent after it listens (`src/proxy.rs`,
//!   `maybe_set_transparent`);
//! - the original destination is what `SO_ORIGINAL_DST` says, or else `getsockname` (`src/socket.rs`,
//!   `orig_dst_addr_or_default`); its own ports are refused as such (`src/proxy/inbound_passthrough.rs`);
//! - it connects there with the client's address as its own, by free and transparent binding (`src/proxy.rs`,
//!   `freebind_connect`), inbound; outbound with the pod's own.
//!
//! What it does not: TLS and HTTP/2 between proxies. With `--tunnel` it puts the destination on a line before a
//! connection and sends it to port 15008 there, which stands for both.

#![allow(clippy::print_stdout)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use joey_tests::proxy::answer;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::sockopt::{
    Ip6tOriginalDst, IpFreebind, IpTransparent, Mark, OriginalDst, ReuseAddr,
};
use nix::sys::socket::{SockaddrIn, SockaddrIn6, getsockopt, setsockopt};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

const OUTBOUND: u16 = 15001;
const INBOUND: u16 = 15006;
const TUNNEL: u16 = 15008;
const RESOLVER: u16 = 15053;
const MARK: u32 = 0x539;
const PATIENCE: Duration = Duration::from_secs(10);

/// Its command line.
#[derive(Debug, Parser)]
struct Options {
    /// The pod's network namespace.
    #[arg(long)]
    netns: PathBuf,
    /// Where to write a line of JSON for each connection and query.
    #[arg(long)]
    log: Option<PathBuf>,
    /// Sends what the pod opens to the other pod's proxy.
    #[arg(long)]
    tunnel: bool,
    /// Answers DNS queries, all by this address.
    #[arg(long)]
    resolve: Option<Ipv4Addr>,
}

/// What all connections share.
struct Proxy {
    log: Option<File>,
    tunnel: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let netns = File::open(&options.netns).with_context(|| options.netns.display().to_string())?;
    // Before there are threads, so that each is there.
    setns(netns, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
    let log = options.log.map(|path| OpenOptions::new().create(true).append(true).open(path));
    let proxy =
        Arc::new(Proxy { log: log.transpose().context("open the log")?, tunnel: options.tunnel });
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(
        async move {
            for port in [OUTBOUND, INBOUND, TUNNEL] {
                let listener = listen((Ipv6Addr::UNSPECIFIED, port).into())?;
                setsockopt(&listener, IpTransparent, &true).context("make it transparent")?;
                tokio::spawn(serve(proxy.clone(), listener, port));
            }
            if let Some(address) = options.resolve {
                resolve(&proxy, address)?;
            }
            println!("ready");
            std::future::pending::<Result<()>>().await
        },
    )
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    setsockopt(&socket, ReuseAddr, &true)?;
    setsockopt(&socket, Mark, &MARK).context("mark a socket")?;
    socket.bind(address).with_context(|| address.to_string())?;
    Ok(socket.listen(1024)?)
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// As ztunnel's `orig_dst_addr_or_default`, and by which of the two.
fn original(stream: &TcpStream) -> Result<(SocketAddr, &'static str)> {
    let socket = stream.as_fd();
    if let Ok(it) = getsockopt(&socket, OriginalDst) {
        let it = SockaddrIn::from(it);
        return Ok((SocketAddr::new(it.ip().into(), it.port()), "SO_ORIGINAL_DST"));
    }
    if let Ok(it) = getsockopt(&socket, Ip6tOriginalDst) {
        let it = SockaddrIn6::from(it);
        return Ok((canonical(SocketAddr::new(it.ip().into(), it.port())), "SO_ORIGINAL_DST"));
    }
    Ok((canonical(stream.local_addr()?), "getsockname"))
}

/// As ztunnel's `freebind_connect`.
async fn connect(source: Option<IpAddr>, to: SocketAddr) -> Result<TcpStream> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    setsockopt(&socket, Mark, &MARK)?;
    if let Some(source) = source.filter(|source| *source != to.ip()) {
        setsockopt(&socket, IpTransparent, &true)?;
        setsockopt(&socket, IpFreebind, &true)?;
        socket.bind(SocketAddr::new(source, 0))?;
    }
    let stream = tokio::time::timeout(PATIENCE, socket.connect(to)).await??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

impl Proxy {
    fn tell(&self, line: &serde_json::Value) {
        if let Some(mut log) = self.log.as_ref() {
            // One write, so that lines of several proxies do not mix.
            let _ = log.write_all(format!("{line}\n").as_bytes());
        }
    }

    async fn carry(&self, mut client: TcpStream, peer: SocketAddr, port: u16) -> Result<()> {
        client.set_nodelay(true)?;
        let peer = canonical(peer);
        let (mut to, by) = original(&client)?;
        let name = match port {
            OUTBOUND => "outbound",
            INBOUND => "inbound",
            _ => "tunnel",
        };
        let said = json!({ "listener": name, "peer": peer, "destination": to, "by": by });
        self.tell(&said);
        let own = [OUTBOUND, INBOUND, TUNNEL, RESOLVER];
        ensure!(port == TUNNEL || !own.contains(&to.port()), "{to} is a proxy's own port");
        let mut server = match port {
            OUTBOUND if self.tunnel => {
                let mut server = connect(None, SocketAddr::new(to.ip(), TUNNEL)).await?;
                server.write_all(format!("{peer} {to}\n").as_bytes()).await?;
                server
            }
            OUTBOUND => connect(None, to).await?,
            INBOUND => connect(Some(peer.ip()), to).await?,
            _ => {
                let mut line = Vec::new();
                while line.last() != Some(&b'\n') {
                    ensure!(line.len() < 200, "no line before the connection");
                    line.push(client.read_u8().await?);
                }
                let line = String::from_utf8(line)?;
                let (from, through) = line.trim().split_once(' ').context("no destination")?;
                let from: SocketAddr = from.parse()?;
                to = through.parse()?;
                connect(Some(from.ip()), to).await?
            }
        };
        copy_bidirectional(&mut client, &mut server).await?;
        Ok(())
    }
}

async fn serve(proxy: Arc<Proxy>, listener: TcpListener, port: u16) {
    loop {
        match listener.accept().await {
            Ok((client, peer)) => {
                let proxy = proxy.clone();
                tokio::spawn(async move {
                    if let Err(error) = proxy.carry(client, peer, port).await {
                        proxy.tell(
                            &json!({ "peer": canonical(peer), "error": format!("{error:#}") }),
                        );
                    }
                });
            }
            Err(error) => {
                proxy.tell(&json!({ "error": error.to_string() }));
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// Answers on both loopback addresses, where ztunnel's resolver listens (`src/config.rs`, `dns_proxy_addr`), by UDP and
/// TCP.
fn resolve(proxy: &Arc<Proxy>, address: Ipv4Addr) -> Result<()> {
    for own in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        let socket = UdpSocket::bind((own, RESOLVER)).context("bind the resolver")?;
        let told = proxy.clone();
        std::thread::spawn(move || -> io::Result<()> {
            let mut query = [0; 1500];
            loop {
                let (length, from) = socket.recv_from(&mut query)?;
                told.tell(&json!({ "listener": "resolver", "peer": from, "by": "udp" }));
                if let Ok(answer) = answer(&query[..length], address) {
                    socket.send_to(&answer, from)?;
                }
            }
        });
        let (listener, proxy) = (listen((own, RESOLVER).into())?, proxy.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, from)) = listener.accept().await {
                proxy.tell(&json!({ "listener": "resolver", "peer": from, "by": "tcp" }));
                tokio::spawn(async move {
                    let length = stream.read_u16().await?;
                    let mut query = vec![0; length.into()];
                    stream.read_exact(&mut query).await?;
                    let answer = answer(&query, address)?;
                    stream.write_u16(u16::try_from(answer.len())?).await?;
                    stream.write_all(&answer).await?;
                    anyhow::Ok(())
                });
            }
        });
    }
    Ok(())
}

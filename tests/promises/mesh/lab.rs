//! Ambient mode on namespaces and a fake VM: the same set-up and programs as a pod's, without a machine.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use joey_shim::mesh::{Mesh, Mode};
use joey_tests::lab::netns::NetNs;
use joey_tests::lab::{Join, Lab, PEER, PEER6, Pod};
use joey_tests::proxy::Proxy;
use tempfile::TempDir;

use crate::context::{Context, same};

const PATIENCE: Duration = Duration::from_secs(5);

/// A node with one meshed pod.
struct Meshed {
    lab: Lab,
    pod: Pod,
    folder: TempDir,
}

impl Meshed {
    fn new(dns: bool) -> Result<Self> {
        let lab = Lab::new()?;
        let mut pod = lab.pod(1)?;
        pod.mesh = Mesh { mode: Mode::Ambient, dns };
        lab.plug(&mut pod, Join::Policy)?;
        lab.allow(&[&pod])?;
        Ok(Self { lab, pod, folder: TempDir::new()? })
    }

    fn proxy(&self, more: &[&str]) -> Result<Proxy> {
        Proxy::start(&self.pod.netns.path(), &self.folder.path().join("log"), more)
    }
}

/// A server that says who has connected, and sends back what it gets.
fn echo(netns: &NetNs, address: SocketAddr) -> Result<SocketAddr> {
    let listener = netns.inside(|| Ok(TcpListener::bind(address)?))?;
    let own = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            thread::spawn(move || -> Result<()> {
                let peer = stream.peer_addr()?;
                stream.write_all(
                    format!("{}\n", SocketAddr::new(peer.ip().to_canonical(), 0)).as_bytes(),
                )?;
                let mut piece = [0; 65536];
                loop {
                    match stream.read(&mut piece)? {
                        0 => return Ok(()),
                        length => stream.write_all(&piece[..length])?,
                    }
                }
            });
        }
    });
    Ok(own)
}

/// Connects, and returns whom the server saw, after some bytes have gone there and back.
fn talk(netns: &NetNs, to: SocketAddr) -> Result<(IpAddr, SocketAddr)> {
    let mut stream = netns
        .inside(|| Ok(TcpStream::connect_timeout(&to, PATIENCE)?))
        .with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let own = stream.local_addr()?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        ensure!(stream.read(&mut byte)? == 1, "the connection to {to} ended after {line:?}");
        line.push(byte[0]);
    }
    let who: SocketAddr = String::from_utf8(line)?.trim().parse()?;
    let sent: Vec<u8> = (0..300_000_u32).map(|n| n as u8).collect();
    let mut writer = stream.try_clone()?;
    let mut back = vec![0; sent.len()];
    thread::scope(|scope| {
        let writing = scope.spawn(|| writer.write_all(&sent));
        stream.read_exact(&mut back)?;
        writing.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        anyhow::Ok(())
    })?;
    ensure!(back == sent, "other bytes came back from {to}");
    Ok((who.ip(), own))
}

/// What the VM opens goes through the proxy, to where it was to go.
pub fn outbound(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(false)?;
    let proxy = meshed.proxy(&[])?;
    for (address, pod) in
        [(IpAddr::from(PEER), meshed.pod.address()), (PEER6.into(), meshed.pod.address6())]
    {
        let to = echo(&meshed.lab.peer, SocketAddr::new(address, 0))?;
        let (who, own) = talk(&meshed.pod.guest, to)?;
        same("the server's peer", who, pod)?;
        let seen = proxy.wait("connection", |seen| seen.peer == Some(own))?;
        same("listener", seen.listener.as_str(), "outbound")?;
        same("original destination", seen.destination, Some(to))?;
    }
    Ok(())
}

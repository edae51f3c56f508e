//! Ambient mode where istio-cni has made its rules in the pod's network namespace, as it does before it tells ztunnel of
//! the pod.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Result, ensure};
use joey_ebpf::policy::Reason;
use joey_ebpf::policy::abi::Side;
use joey_tests::lab::netns::NetNs;

use super::lab::{Meshed, echo, talk};
use crate::context::{Context, same, skip};

/// What it makes (istio/istio cni/pkg/iptables/iptables.go, AppendInpodRules(), at its commit 0098d99), with
/// the addresses of a family.
fn rules(loopback: &str, probes: &str) -> String {
    format!(
        "*mangle
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*raw
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1
-A ISTIO_PRERT -p udp -m mark ! --mark 0x539/0xfff -m udp --sport 53 -j CT --zone 1
COMMIT
*nat
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -s {probes} -p tcp -m tcp -j ACCEPT
-A ISTIO_PRERT ! -d {loopback} -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT -d {probes} -p tcp -m tcp -j ACCEPT
-A ISTIO_OUTPUT ! -o lo -p udp -m mark ! --mark 0x539/0xfff -m udp --dport 53 -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT ! -d {loopback} -p tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d {loopback} -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d {loopback} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
"
    )
}

/// Makes them; `false` where this machine cannot.
fn make(netns: &NetNs, folder: &std::path::Path) -> Result<bool> {
    for (program, family, loopback, probes) in [
        ("iptables-restore", "-4", "127.0.0.1/32", "169.254.7.127"),
        ("ip6tables-restore", "-6", "::1/128", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"),
    ] {
        let file = folder.join(program);
        std::fs::write(&file, rules(loopback, probes))?;
        let Ok(output) = netns.inside(|| Ok(Command::new(program).arg(&file).output()?)) else {
            return Ok(false);
        };
        ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        // As addInpodMarkIPRule() and addLoopbackRoute() there.
        for words in [
            "rule add fwmark 0x111/0xfff pref 32764 lookup 100",
            "route add local default dev lo table 100",
        ] {
            let mut ip = Command::new("ip");
            ip.arg(family).args(words.split(' '));
            let output = netns.inside(|| Ok(ip.output()?))?;
            let error = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "ip {family} {words}: {error}");
        }
    }
    Ok(true)
}

/// Both ways go through the proxy, and who is at either end is known; the node's probes do not.
pub fn with_its_rules(_: &Context<'_>) -> Result<()> {
    let meshed = Meshed::new(false)?;
    let (lab, pod) = (&meshed.lab, &meshed.pod);
    let folder = tempfile::TempDir::new()?;
    if !make(&pod.netns, folder.path())? {
        return skip("no iptables on this machine");
    }
    let proxy = meshed.proxy(&[])?;
    for (peer, own) in meshed.pairs() {
        let to = echo(&lab.peer, SocketAddr::new(peer, 0))?;
        let (who, client) = talk(&pod.guest, to)?;
        same("the server's peer", who, own)?;
        let seen = proxy.wait("connection", |seen| seen.peer == Some(client))?;
        same("listener", seen.listener.as_str(), "outbound")?;
        same("original destination", seen.destination, Some(to))?;
        let to = echo(&pod.guest, SocketAddr::new(own, 0))?;
        let (who, client) = talk(&lab.peer, to)?;
        same("the pod's server's peer", who, peer)?;
        let seen = proxy.wait("connection", |seen| seen.peer == Some(client))?;
        same("listener", seen.listener.as_str(), "inbound")?;
        same("original destination", seen.destination, Some(to))?;
        let before = proxy.seen()?.len();
        talk(&lab.node, to)?;
        same("what the proxy saw of a probe", proxy.seen()?.len(), before)?;
    }
    same("connections without a proxy", meshed.dropped(Side::Vm, Reason::Proxy)?, 0)
}

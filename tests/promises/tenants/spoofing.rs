//! A pod whose root sends what is not its own.

use anyhow::{Result, ensure};

use super::{Context, Peer, only_joey};

/// Another hardware address, another address, another's ARP: nothing of it leaves, and the pod's own goes on.
pub fn spoofing(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    let (red, blue) = (Peer::run(ctx, "red", "red")?, Peer::run(ctx, "blue", "blue")?);
    let (node, victim) = ("10.88.0.1", &red.addresses[0]);
    let run = |text: &str| red_ok(&blue, text);
    ensure!(blue.pings(node)?, "the node does not answer");
    // As its tenant: the victim's address, to the victim's friend, and to the node.
    run(&format!("ip addr add {victim}/32 dev eth0"))?;
    let answered = |text: &str| blue.shell.sh(text).map(|it| it.code == 0);
    ensure!(!answered(&format!("ping -c 2 -W 1 -I {victim} {node}"))?, "sent as {victim}");
    // ARP that claims the victim's address: nobody's cache has this pod's hardware address for it.
    let _ = blue.shell.sh(&format!("arping -U -c 3 -w 3 -I eth0 {victim}"))?;
    run(&format!("ip addr del {victim}/32 dev eth0"))?;
    let mac = blue.shell.sh("cat /sys/class/net/eth0/address")?.text();
    let neighbours = ctx.inside("ip", &["neigh", "show", "dev", "cni0"])?;
    let neighbours = String::from_utf8_lossy(&neighbours.stdout).into_owned();
    let poisoned = neighbours
        .lines()
        .any(|line| line.starts_with(&format!("{victim} ")) && line.contains(mac.trim()));
    ensure!(!poisoned, "the node's neighbours: {neighbours}");
    // Another hardware address.
    run("ip link set eth0 address 02:00:00:00:be:ef")?;
    ensure!(!answered(&format!("ping -c 2 -W 1 {node}"))?, "sent from another hardware address");
    run(&format!("ip link set eth0 address {}", mac.trim()))?;
    ensure!(blue.pings(node)?, "the pod's own traffic after that");
    let drops = super::told(ctx, &["top", "--once"])?.to_string();
    ensure!(drops.contains("SpoofedMac") || drops.contains("hardware address"), "{drops}");
    blue.remove()?;
    red.remove()
}

fn red_ok(peer: &Peer<'_>, text: &str) -> Result<()> {
    let output = peer.shell.sh(text)?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.code == 0, "{text}: {errors}");
    Ok(())
}

//! Who is gone has no address: a shim is killed and containerd, gone too, does not call `delete`.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_ebpf::policy::maps::Maps;
use joey_tests::node::traces;
use joey_tests::{pod, process};

use super::{Context, Peer, only_joey, told};
use crate::faults;
use crate::kills::{interrupt, settled, standby};

/// The daemon waits for 10 s, and looks every 5 s.
const COLLECTED: Duration = Duration::from_secs(25);

/// The addresses that pods of the node have in the policy.
fn known(ctx: &Context<'_>) -> Result<HashSet<IpAddr>> {
    let root = PathBuf::from(format!("/proc/{}/root", ctx.node.holder()));
    let maps = Maps::open(&root.join("sys/fs/bpf/joey"))?;
    let locals = maps.locals()?.into_iter();
    Ok(locals.filter(|(_, local)| local.pod != 0).map(|(address, _)| address).collect())
}

/// The pods by name, with their shims as they are outside of the node.
fn shim(ctx: &Context<'_>, pod: &str) -> Result<u32> {
    let all = told(ctx, &["ps"])?;
    let records = all.as_array().into_iter().flatten().map(|pod| &pod["record"]);
    let pid =
        records.filter(|record| record["pod"] == pod).find_map(|it| it["shim"]["pid"].as_u64());
    let pid = pid.with_context(|| format!("no {pod}: {all}"))?;
    ctx.node.outside(u32::try_from(pid)?).with_context(|| format!("{pod} has no shim"))
}

/// The daemon takes back what the dead have and nothing of those who live, who are being started or stopped.
pub fn collected(ctx: &Context<'_>) -> Result<()> {
    only_joey(ctx)?;
    standby(ctx, 0, || {
        let before = ctx.node.traces();
        let lives = Peer::run(ctx, "lives", "red")?;
        let dies = Peer::run(ctx, "dies", "red")?;
        let of = |peer: &Peer<'_>| -> Result<HashSet<IpAddr>> {
            Ok(peer.addresses.iter().map(|ip| ip.parse()).collect::<Result<_, _>>()?)
        };
        let (living, dying) = (of(&lives)?, of(&dies)?);
        lives.expect(&dies, 80, true)?;
        let config = pod::config(ctx.node, "starts");
        let run = || pod::Pod::run_with(ctx.node, ctx.handler, config.clone()).map(drop);
        let told = interrupt(ctx, "start.attached", run, |held| {
            ctx.node.kill_containerd()?;
            let all = known(ctx)?;
            let starting: HashSet<_> =
                all.difference(&living).filter(|ip| !dying.contains(ip)).copied().collect();
            ensure!(starting.len() == 2, "of the pod that starts: {starting:?} of {all:?}");
            process::kill(shim(ctx, "red/dies")?)?;
            let (killed, mut first) = (Instant::now(), None);
            while killed.elapsed() < COLLECTED {
                let now = known(ctx)?;
                ensure!(now.is_superset(&living), "{killed:?}: of those who live: {now:?}");
                ensure!(now.is_superset(&starting), "of the one that starts: {now:?}");
                if now.is_disjoint(&dying) {
                    first.get_or_insert(killed.elapsed());
                }
                std::thread::sleep(Duration::from_millis(500));
            }
            println!("        a dead pod's addresses were taken back after {first:.1?}");
            ensure!(first.is_some(), "those of the dead pod are left: {:?}", known(ctx)?);
            ensure!(traces::command(held).is_some(), "the shim that starts a pod was ended");
            let log = std::fs::read_to_string(ctx.node.dir().join("network.log"))?;
            ensure!(log.contains("orphan removed"), "the daemon says nothing: {log}");
            Ok(())
        });
        ctx.node.start_containerd()?;
        // What the client is told of containerd's end is another test's.
        let _ = told?;
        // The one that lives reaches the next pod with the dead one's number.
        let next = Peer::run(ctx, "next", "red")?;
        lives.expect(&next, 80, true)?;
        next.remove()?;
        lives.remove()?;
        drop(dies);
        faults::nothing_is_left(ctx)?;
        joey_tests::node::cgroups::remove(&config.linux.unwrap_or_default().cgroup_parent);
        let _ = std::fs::remove_dir_all(&config.log_directory);
        settled(ctx, &before)
    })
}

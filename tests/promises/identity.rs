//! No two sandboxes are alike, however many are cloned at once.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow, ensure};

use crate::context::{Context, Test, same};

pub const TESTS: &[Test] = &[Test { name: "identity::clones_differ", run: clones_differ }];

const CLONES: usize = 20;

const READ: &str = "od -An -v -tx1 -N16 /dev/urandom; cd /proc/sys/kernel; \
    cat random/uuid random/boot_id hostname /sys/class/net/eth0/address; date +%s";
const NAMES: [&str; 6] =
    ["random bytes", "kernel's uuid", "boot id", "host name", "MAC", "machine id"];
/// The place of the boot id in it.
const BOOT_ID: usize = 2;

fn clones_differ(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let outputs: Vec<Result<Vec<String>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CLONES).map(|n| scope.spawn(move || identity(ctx, n))).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|r| r.unwrap_or_else(|_| Err(anyhow!("panicked")))).collect()
    });
    let outputs = outputs.into_iter().collect::<Result<Vec<_>>>()?;
    for (index, name) in NAMES.iter().enumerate() {
        let different: BTreeSet<_> =
            outputs.iter().filter_map(|values| values.get(index)).collect();
        ensure!(different.iter().all(|value| !value.is_empty()), "a clone has no {name}");
        same(&format!("different values of {name}"), different.len(), CLONES)?;
    }
    Ok(())
}

/// What one clone is, in the order of [`NAMES`]; its clock is compared with the node's.
pub fn identity(ctx: &Context<'_>, number: usize) -> Result<Vec<String>> {
    let pod = ctx.pod(&format!("clone{number}"))?;
    let before = seconds()?;
    // The container's very first process reads.
    let text = pod.script(READ)?.text();
    let after = seconds()?;
    let mut values: Vec<String> = text.lines().map(str::to_owned).collect();
    let clock: i64 = values.pop().unwrap_or_default().parse()?;
    ensure!((before - 1..=after + 1).contains(&clock), "clock {clock} not in {before}..={after}");
    let seen = ctx.node.joey(&["--json", "inspect", &pod.id])?;
    let seen: serde_json::Value = serde_json::from_str(&seen)?;
    // Both are what the guest read back when it had been told who it is.
    let record = |name: &str| seen["record"][name].as_str().unwrap_or_default().to_owned();
    same("boot id on the host", Some(&record("boot_id")), values.get(BOOT_ID))?;
    let machine_id = record("machine_id");
    ensure!(machine_id.len() == 32, "machine id {machine_id:?} of the guest");
    values.push(machine_id);
    pod.remove()?;
    Ok(values)
}

fn seconds() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?)
}

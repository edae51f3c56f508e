//! No two sandboxes are alike, however many are cloned at once.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow, ensure};

use crate::context::{Context, Test, same};

pub const TESTS: &[Test] = &[Test { name: "identity::clones_differ", run: clones_differ }];

const CLONES: usize = 20;

const READ: &str = "head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo; \
    cat /proc/sys/kernel/random/uuid; cat /proc/sys/kernel/random/boot_id; hostname; \
    cat /sys/class/net/eth0/address; date +%s";
const NAMES: [&str; 5] = ["random bytes", "kernel's uuid", "boot id", "host name", "MAC"];

fn clones_differ(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let outputs: Vec<Result<(String, i64)>> = std::thread::scope(|scope| {
        let one = |number: usize| -> Result<(String, i64)> {
            let pod = ctx.pod(&format!("clone{number}"))?;
            // The container's very first process reads.
            let text = pod.script(READ)?.text();
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
            pod.remove()?;
            Ok((text, i64::try_from(now)?))
        };
        let threads: Vec<_> = (0..CLONES).map(|n| scope.spawn(move || one(n))).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|r| r.unwrap_or_else(|_| Err(anyhow!("panicked")))).collect()
    });
    let outputs = outputs.into_iter().collect::<Result<Vec<_>>>()?;
    for (index, name) in NAMES.iter().enumerate() {
        let values = outputs.iter().map(|(text, _)| text.lines().nth(index).unwrap_or_default());
        let different: BTreeSet<&str> = values.filter(|value| !value.is_empty()).collect();
        same(&format!("different values of {name}"), different.len(), CLONES)?;
    }
    for (text, now) in &outputs {
        let clock: i64 = text.lines().nth(5).unwrap_or_default().parse()?;
        ensure!((now - clock).abs() <= 10, "clock is {} s off", now - clock);
    }
    Ok(())
}

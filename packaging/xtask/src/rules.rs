//! Who may depend on whom, as the architecture fixes it.

use anyhow::{Result, bail};

use crate::command::{command, output};

/// Each crate of ours with those of ours that it may use.
const ALLOWED: &[(&str, &[&str])] = &[
    ("joey-protocol", &[]),
    ("joey-ebpf", &[]),
    ("joey-agent", &["joey-protocol", "joey-ebpf"]),
    ("joey-image", &[]),
    ("joey-shim", &["joey-protocol", "joey-ebpf", "joey-image"]),
    ("joey-snapshotter", &["joey-image"]),
    ("joey-xtask", &[]),
    ("joey-probe", &[]),
];

/// Fails naming the first crate that uses another it may not.
pub fn check() -> Result<()> {
    let tree = output(&mut command(
        "cargo",
        &["tree", "--workspace", "--depth", "1", "--prefix", "depth", "--format", "{p}", "-q"],
    ))?;
    let mut user = "";
    for line in tree.lines() {
        let Some((depth, package)) = line.split_at_checked(1) else {
            continue;
        };
        let name = package.split(' ').next().unwrap_or_default();
        if depth == "0" {
            user = name;
        } else if name.starts_with("joey-") && !may_use(user, name) {
            bail!("{user} may not depend on {name}: see docs/architecture.md");
        }
    }
    Ok(())
}

fn may_use(user: &str, used: &str) -> bool {
    match ALLOWED.iter().find(|(name, _)| *name == user) {
        Some((_, allowed)) => allowed.contains(&used),
        // The tests use everything, from outside.
        None => user == "joey-tests",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_snapshotter_knows_nobody() {
        assert!(!may_use("joey-snapshotter", "joey-protocol"));
        assert!(may_use("joey-shim", "joey-protocol"));
        assert!(may_use("joey-tests", "joey-shim"));
        assert!(!may_use("joey-stranger", "joey-shim"));
    }
}

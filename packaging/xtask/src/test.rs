//! `cargo xtask test`: every check there is, from style to pods in VMs, with one closing line.

use std::process::Command;
use std::time::Instant;

use anyhow::Result;

use crate::command::{command, run, target, tee};
use crate::node::{Profile, build, environment};
use crate::{deps, guest, rules};

/// Counts of tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Runs all checks; false if any failed.
pub fn all() -> Result<bool> {
    deps::install()?;
    let mut total = Count::default();
    for (name, check) in CHECKS {
        total.add(step(name, *check));
    }
    total.add(step("pods on containerd 1.7 and 2.1", promises));
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    Ok(total.failed == 0)
}

type Check = fn() -> Result<Count>;
const CHECKS: &[(&str, Check)] = &[
    ("formatting", || run(&mut command("cargo", &["fmt", "--all", "--check"])).map(|()| one())),
    ("lints", lints),
    ("who may depend on whom", || rules::check().map(|()| one())),
    ("licences and sources", licences),
    ("unit tests", unit_tests),
];

fn one() -> Count {
    Count { passed: 1, ..Count::default() }
}

fn step(name: &str, check: impl FnOnce() -> Result<Count>) -> Count {
    println!("== {name}");
    let start = Instant::now();
    let count = check().unwrap_or_else(|error| {
        println!("FAILED {name}: {error:#}");
        Count { failed: 1, ..Count::default() }
    });
    println!("== {name}: {:.0?}", start.elapsed());
    count
}

fn lints() -> Result<Count> {
    let arguments = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    run(&mut command("cargo", &arguments)).map(|()| one())
}

/// cargo-deny takes minutes to build and so is used where it is installed.
fn licences() -> Result<Count> {
    let own = target().join("tools/bin/cargo-deny");
    let program = if own.exists() { own.display().to_string() } else { "cargo-deny".into() };
    if command(&program, &["--version"]).output().is_err() {
        println!("SKIPPED cargo deny: not installed (cargo install --locked cargo-deny)");
        return Ok(Count { skipped: 1, ..Count::default() });
    }
    run(&mut command(&program, &["check", "bans", "licenses", "sources"])).map(|()| one())
}

fn unit_tests() -> Result<Count> {
    let arguments = ["test", "--workspace", "--lib", "--bins", "--no-fail-fast"];
    let (text, good) = tee(&mut command("cargo", &arguments))?;
    Ok(counted(&text, good))
}

fn promises() -> Result<Count> {
    let mut tests = prepared(&[])?;
    let (text, good) = tee(&mut tests)?;
    Ok(counted(&text, good))
}

/// Adds up closing lines; a run that failed without saying so counts as one failure.
fn counted(text: &str, good: bool) -> Count {
    let mut total = Count::default();
    for line in text.lines().filter(|line| line.contains(" passed") && line.contains(" failed")) {
        total.add(Count {
            passed: number_before(line, "passed"),
            failed: number_before(line, "failed"),
            skipped: number_before(line, "skipped") + number_before(line, "ignored"),
        });
    }
    if !good && total.failed == 0 {
        total.failed = 1;
    }
    total
}

fn number_before(line: &str, word: &str) -> usize {
    let words: Vec<&str> = line.split([' ', ',', ';']).filter(|word| !word.is_empty()).collect();
    let at = words.iter().position(|other| *other == word);
    at.and_then(|at| words.get(at.checked_sub(1)?)?.parse().ok()).unwrap_or(0)
}

/// Runs the node tests only, with the harness's own filters.
pub fn only_promises(filters: &[String]) -> Result<()> {
    deps::install()?;
    run(&mut prepared(filters)?)
}

/// The node tests, after all they need was built.
fn prepared(filters: &[String]) -> Result<Command> {
    guest::build()?;
    build(Profile::Debug)?;
    let probe = guest::build_static("joey-probe")?;
    let mut tests =
        command("cargo", &["test", "--quiet", "-p", "joey-tests", "--test", "promises", "--"]);
    environment(tests.args(filters).env("JOEY_PROBE", probe), Profile::Debug);
    Ok(tests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_added_up() {
        let text = "test result: ok. 3 passed; 1 failed; 2 ignored; 0 measured\n\
                    noise\n10 passed, 0 failed, 4 skipped\n";
        assert_eq!(counted(text, true), Count { passed: 13, failed: 1, skipped: 6 });
        assert_eq!(counted("", false).failed, 1);
    }
}

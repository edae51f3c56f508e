//! `cargo xtask test`: every check there is, from style to pods in VMs, with one closing line.

use std::process::Command;
use std::time::Instant;

use anyhow::Result;

use crate::command::{command, run, tee};
use crate::node::{Profile, build, environment};
use crate::{deps, guest, kernel, rules};

/// Counts of tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
    skipped: usize,
    /// Passed or failed at a second try.
    retried: usize,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.retried += other.retried;
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
    println!("{} had a second try", total.retried);
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    Ok(total.failed == 0)
}

/// Random packets about which the packet programs and their model have to agree.
const RANDOM_PACKETS: &str = "1000000";

type Check = fn() -> Result<Count>;
const CHECKS: &[(&str, Check)] = &[
    ("formatting", || run(&mut command("cargo", &["fmt", "--all", "--check"])).map(|()| one())),
    ("lints", lints),
    ("who may depend on whom", || rules::check().map(|()| one())),
    ("licences and sources", licences),
    ("unit tests", unit_tests),
    ("packet programs on other kernels", programs),
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

/// What the workspace may depend on. Known faults of dependencies are looked for where their list can be
/// had.
fn licences() -> Result<Count> {
    let program = deps::cargo_deny()?.display().to_string();
    run(&mut command(&program, &["check", "bans", "licenses", "sources"]))?;
    let mut count = one();
    let fetched = command(&program, &["fetch", "db"]).output()?;
    if fetched.status.success() {
        run(&mut command(&program, &["check", "--disable-fetch", "advisories"]))?;
        count.passed += 1;
    } else {
        let words = String::from_utf8_lossy(&fetched.stderr).into_owned();
        let why = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no reason");
        println!("SKIPPED advisories: their database cannot be fetched: {why}");
        count.skipped += 1;
    }
    Ok(count)
}

fn programs() -> Result<Count> {
    Ok(less_skipped(&kernel::test_programs()?, true))
}

fn unit_tests() -> Result<Count> {
    let arguments =
        ["test", "--workspace", "--lib", "--bins", "--test", "admission", "--no-fail-fast"];
    let mut tests = command("cargo", &arguments);
    let (text, good) = tee(tests.env("JOEY_POLICY_PACKETS", RANDOM_PACKETS))?;
    Ok(less_skipped(&text, good))
}

fn less_skipped(text: &str, good: bool) -> Count {
    let mut count = counted(text, good);
    // cargo's harness knows no test that finds only when it runs that it cannot: it says so, and passes.
    let skipped = text.lines().filter(|line| line.starts_with("SKIPPED ")).count();
    count.skipped += skipped;
    count.passed = count.passed.saturating_sub(skipped);
    count
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
            retried: 0,
        });
    }
    let retried = text.lines().filter(|line| line.ends_with(" had a second try"));
    total.retried = retried.map(|line| number_before(line, "had")).sum();
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
    let mut tests =
        command("cargo", &["test", "--quiet", "-p", "joey-tests", "--test", "promises", "--"]);
    environment(tests.args(filters), Profile::Debug);
    Ok(tests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_added_up() {
        let text = "test result: ok. 3 passed; 1 failed; 2 ignored; 0 measured\n\
                    noise\n2 had a second try\n10 passed, 0 failed, 4 skipped\n";
        let expected = Count { passed: 13, failed: 1, skipped: 6, retried: 2 };
        assert_eq!(counted(text, true), expected);
        assert_eq!(counted("", false).failed, 1);
    }
}

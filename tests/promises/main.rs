//! Runs every promise on every supported containerd, through the public interfaces only.
//!
//! `cargo test -p joey-tests --test promises -- [FILTER…]`; environment: `JOEY_TEST_CONTAINERD` (list of
//! releases), `JOEY_TEST_HANDLER` (`joey`; `runc` shows that the tests themselves are right), `JOEY_TEST_REST`
//! (set: every test finds a machine in reserve). After each
//! test the node is searched for leftovers; a leftover fails the test.
#![allow(clippy::print_stdout)]

mod block;
mod context;
mod direct;
mod disk;
mod events;
mod faults;
mod full;
mod identity;
mod input;
mod io;
mod kills;
mod lifecycle;
mod limits;
mod mesh;
mod network;
mod power;
mod registry;
mod restart;
mod security;
mod services;
mod share;
mod standby;
mod statistics;
mod storage;
mod tasks;
mod templates;
mod tenants;
mod unit;
mod volumes;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use joey_tests::node::config::Version;
use joey_tests::node::{Node, Options, traces};
use joey_tests::pod::Pod;
use joey_tests::{cri, paths};

use crate::context::{Context, Skip, Test};

/// No test may take longer; the whole run ends if one does, since its thread cannot be ended.
const TEST_LIMIT: Duration = Duration::from_secs(300);
/// How long a removed pod may take to disappear entirely.
const SETTLE: Duration = Duration::from_secs(5);

/// Tests that are about what happens once in a while: they get no second try.
const ONCE: [&str; 2] = ["lifecycle::many_at_once", "identity::clones_differ"];

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: Vec<String>,
    /// Those that got a second try, however that went.
    retried: Vec<String>,
    skipped: usize,
}

fn main() -> ExitCode {
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let handler = std::env::var("JOEY_TEST_HANDLER").unwrap_or_else(|_| "joey".into());
    let mut tally = Tally::default();
    for version in versions() {
        if let Err(error) = run_version(version, &handler, &filters, &mut tally) {
            println!("FAILED  {} node: {error:#}", version.name());
            tally.failed.push(format!("{} node", version.name()));
        }
    }
    for name in &tally.failed {
        println!("failed: {name}");
    }
    for name in &tally.retried {
        println!("second try: {name}");
    }
    println!("{} had a second try", tally.retried.len());
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed.len(), tally.skipped);
    if tally.failed.is_empty() && tally.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn versions() -> Vec<Version> {
    let chosen = std::env::var("JOEY_TEST_CONTAINERD").unwrap_or_else(|_| "1.7,2.1".into());
    chosen.split(',').filter_map(|name| name.trim().parse().ok()).collect()
}

fn tests() -> Vec<Test> {
    [
        lifecycle::TESTS,
        statistics::TESTS,
        storage::TESTS,
        power::TESTS,
        full::TESTS,
        registry::TESTS,
        disk::TESTS,
        block::TESTS,
        direct::TESTS,
        share::TESTS,
        volumes::TESTS,
        io::TESTS,
        limits::TESTS,
        mesh::TESTS,
        security::TESTS,
        network::TESTS,
        identity::TESTS,
        input::TESTS,
        faults::TESTS,
        kills::TESTS,
        restart::TESTS,
        tasks::TESTS,
        events::TESTS,
        standby::TESTS,
        templates::TESTS,
        tenants::TESTS,
        services::TESTS,
        unit::TESTS,
    ]
    .concat()
}

/// containerd 2.x can also do without a pause container.
const SANDBOXED: &str = "joey-sandboxed";
/// Other ways to the same, and what is tried once more that way.
const OTHERS: [(&str, &[&str]); 2] = [
    (SANDBOXED, &["lifecycle::", "restart::"]),
    ("joey-overlayfs", &["lifecycle::exit_code_and_output", "storage::files_of_every_kind"]),
];

fn run_version(
    version: Version,
    handler: &str,
    filters: &[String],
    tally: &mut Tally,
) -> Result<()> {
    let chosen: Vec<Test> = tests()
        .into_iter()
        .filter(|test| filters.is_empty() || filters.iter().any(|f| test.name.contains(f.as_str())))
        .collect();
    if chosen.is_empty() {
        return Ok(());
    }
    let name = format!("t{}-{}", version.name(), std::process::id());
    let tool: PathBuf = paths::binaries().join("joey-node");
    let node = Node::up(&Options { version, name: &name, tool: &tool, tied: true })?;
    let mut result = run_all(&node, handler, &chosen, tally);
    for (other, essentials) in OTHERS {
        if handler == "joey" && result.is_ok() && !(version == Version::V1_7 && other == SANDBOXED)
        {
            let essential =
                |test: &&Test| essentials.iter().any(|name| test.name.starts_with(name));
            let again: Vec<Test> = chosen.iter().filter(essential).copied().collect();
            result = run_all(&node, other, &again, tally);
        }
    }
    let left = node.down().context("end the node")?;
    if !left.is_empty() {
        println!("FAILED  {} node left behind:\n  {}", version.name(), left.join("\n  "));
        tally.failed.push(format!("{} leftovers of the node", version.name()));
    }
    result
}

fn run_all(node: &Node, handler: &str, chosen: &[Test], tally: &mut Tally) -> Result<()> {
    if chosen.is_empty() {
        return Ok(());
    }
    cri::executor()?;
    // The first pod makes what is per node and stays: bridge, template, pinned programs.
    let started = Instant::now();
    Pod::run(node, handler, "warm-up")
        .and_then(Pod::remove)
        .with_context(|| format!("first pod with handler {handler}; containerd: {}", node.log()))?;
    println!("{} first pod: {:.1?}", node.version.name(), started.elapsed());
    for test in chosen {
        let label = format!("{} {handler} {}", node.version.name(), test.name);
        let mut outcome = once(node, handler, test, &label);
        if let Outcome::Failed(error) = &outcome
            && !ONCE.contains(&test.name)
        {
            // On a busy machine a deadline may pass; what fails twice is broken. Both are shown.
            println!("AGAIN   {label}: {error}");
            tally.retried.push(label.clone());
            outcome = once(node, handler, test, &label);
        }
        match outcome {
            Outcome::Passed => tally.passed += 1,
            Outcome::Skipped => tally.skipped += 1,
            Outcome::Failed(error) => {
                println!("FAILED  {label}: {error}");
                tally.failed.push(label);
            }
        }
    }
    Ok(())
}

/// How a test ended.
enum Outcome {
    Passed,
    Skipped,
    Failed(String),
}

/// Runs a test and looks for what it left behind; says how it went unless it failed.
fn once(node: &Node, handler: &str, test: &Test, label: &str) -> Outcome {
    if std::env::var_os("JOEY_TEST_REST").is_some() {
        joey_tests::bench::rest(node);
    }
    let started = Instant::now();
    let before = node.traces();
    let outcome = watched(label, || (test.run)(&Context { node, handler }));
    let left = traces::settle(SETTLE, &before, || node.traces());
    let time = started.elapsed();
    match outcome {
        Err(error) if error.is::<Skip>() => {
            println!("SKIPPED {label}: {error}");
            Outcome::Skipped
        }
        Err(error) => Outcome::Failed(format!("({time:.1?}) {error:#}")),
        Ok(()) if !left.is_empty() => {
            Outcome::Failed(format!("({time:.1?}) left behind:\n  {}", left.join("\n  ")))
        }
        Ok(()) => {
            println!("passed  {label} ({time:.1?})");
            Outcome::Passed
        }
    }
}

/// Runs the test while another thread watches the clock.
fn watched(label: &str, test: impl FnOnce() -> Result<()>) -> Result<()> {
    let (done, watch) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if matches!(watch.recv_timeout(TEST_LIMIT), Err(mpsc::RecvTimeoutError::Timeout)) {
                println!("FAILED  {label}: hangs; giving up\n0 passed, 1 failed, 0 skipped");
                std::process::exit(1);
            }
        });
        let outcome = test();
        drop(done);
        outcome
    })
}

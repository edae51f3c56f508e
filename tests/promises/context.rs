//! What every test gets and how it says what it found.

use std::ffi::OsStr;
use std::fmt::Debug;
use std::process::{Command, Output};

use anyhow::{Result, bail};
use joey_tests::node::Node;
use joey_tests::pod::Pod;

/// A promise and the code that checks it.
#[derive(Clone, Copy)]
pub struct Test {
    /// Shown and filtered by.
    pub name: &'static str,
    /// The check.
    pub run: fn(&Context<'_>) -> Result<()>,
}

/// Where a test runs.
pub struct Context<'a> {
    /// The node.
    pub node: &'a Node,
    /// The runtime handler under test.
    pub handler: &'a str,
}

impl<'a> Context<'a> {
    /// Runs a pod with the handler under test.
    pub fn pod(&self, name: &str) -> Result<Pod<'a>> {
        Pod::run(self.node, self.handler, name)
    }

    /// Runs a program in the node's namespaces to its end.
    pub fn inside(&self, program: &str, args: &[impl AsRef<OsStr>]) -> Result<Output> {
        let mut command = Command::new(program);
        command.args(args);
        self.node.run_inside(command)
    }

    /// Leaves the test if the promise is Joey's alone.
    pub fn only_joey(&self) -> Result<()> {
        if self.handler == "runc" { skip("a promise of Joey's, not of runc") } else { Ok(()) }
    }
}

/// The reason why a test did not run.
#[derive(Debug)]
pub struct Skip(String);

impl std::fmt::Display for Skip {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Ends the test as skipped.
pub fn skip(reason: &str) -> Result<()> {
    Err(Skip(reason.to_owned()).into())
}

/// Compares, naming what was compared.
pub fn same<A: PartialEq<B> + Debug, B: Debug>(what: &str, found: A, expected: B) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let (found, expected) = (short(&found), short(&expected));
    bail!("{what}: found {found}, expected {expected}")
}

/// Checks that the text holds a part.
pub fn holds(what: &str, text: &str, part: &str) -> Result<()> {
    if text.contains(part) { Ok(()) } else { bail!("{what}: no {part:?} in {:?}", short(&text)) }
}

/// Checks that a call failed and that its error says why.
pub fn refused<T>(what: &str, result: Result<T>, reason: &str) -> Result<()> {
    match result {
        Ok(_) => bail!("{what}: was accepted, expected an error with {reason:?}"),
        Err(error) => holds(what, &format!("{error:#}").to_lowercase(), &reason.to_lowercase()),
    }
}

fn short(value: &impl Debug) -> String {
    let text = format!("{value:?}");
    match text.char_indices().nth(600) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

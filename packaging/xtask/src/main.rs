//! The developer's tool: `cargo xtask help`.
//!
//! Builds with cargo and a C compiler alone, since it is what installs everything else; all that needs more
//! is in `joey-tests` and built on demand.
#![allow(clippy::print_stdout)]

mod command;
mod cpio;
mod deps;
mod guest;
mod kernel;
mod node;
mod rules;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Joey's developer's tool")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building and testing need (Debian 12)
    Deps,
    /// Build the guest image: kernel and initramfs, in target/guest
    Guest,
    /// Run the packet programs' tests on Debian's kernels, emulated
    Kernels,
    /// Run every check: style, lints, unit tests, pods on each containerd
    Test {
        /// Only the node tests whose names hold one of these
        filters: Vec<String>,
    },
    /// A private node: up [--containerd 1.7|2.1], down, status
    Node {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Measure Joey beside others: start, image, disk, volume or net [--runs N] [--json FILE]
    Bench {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Start a pod from a real image on a private node and show its timeline
    Demo,
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<bool> {
    match task {
        Task::Deps => deps::install()?,
        Task::Guest => {
            deps::install()?;
            guest::build()?;
        }
        Task::Kernels => {
            deps::install()?;
            kernel::test_programs()?;
        }
        Task::Test { filters } if filters.is_empty() => return test::all(),
        Task::Test { filters } => test::only_promises(&filters)?,
        Task::Node { arguments } => node::run_tool(&arguments)?,
        Task::Bench { arguments } => with_guest("bench", arguments)?,
        Task::Demo => with_guest("demo", Vec::new())?,
    }
    Ok(true)
}

fn with_guest(name: &str, arguments: Vec<String>) -> Result<()> {
    node::run_tool(&[vec![name.to_owned()], arguments].concat())
}

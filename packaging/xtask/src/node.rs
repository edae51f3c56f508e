//! Builds what a test node needs and hands over to `joey-node`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::command::{command, run, target};
use crate::{deps, guest};

/// How the binaries under test are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Quick to build.
    Debug,
    /// As delivered.
    Release,
}

impl Profile {
    fn folder(self) -> PathBuf {
        target().join(match self {
            Self::Debug => "debug",
            Self::Release => "release",
        })
    }
}

/// Builds shim, tool and harness, and what its containers run.
pub fn build(profile: Profile) -> Result<()> {
    let mut build = command(
        "cargo",
        &["build", "--quiet", "-p", "joey-shim", "-p", "joey-snapshotter", "-p", "joey-tests"],
    );
    build.arg("--bins");
    if profile == Profile::Release {
        build.arg("--release");
    }
    run(&mut build)?;
    guest::build_static("joey-probe")?;
    Ok(())
}

/// Says where everything is, for the harness.
pub fn environment(command: &mut Command, profile: Profile) {
    command
        .env("JOEY_DEPS", deps::folder())
        .env("JOEY_BIN", profile.folder())
        .env("JOEY_GUEST", guest::folder());
}

/// Runs `joey-node` with these arguments, after all it needs was built.
pub fn run_tool(arguments: &[String]) -> Result<()> {
    let tool = Profile::Release.folder().join("joey-node");
    // A node can always be looked at and ended, even while the source does not compile.
    let needs_nothing = matches!(arguments.first().map(String::as_str), Some("down" | "status"));
    if !(needs_nothing && tool.exists()) {
        deps::install()?;
        guest::build()?;
        build(Profile::Release)?;
    }
    let mut tool = Command::new(tool);
    environment(tool.args(arguments), Profile::Release);
    run(&mut tool)
}

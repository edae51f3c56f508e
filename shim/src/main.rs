//! `containerd-shim-joey-v2`: one process per pod.
//!
//! Dispatches containerd's three calls: `-info`, `start` (which forks the server, or finds a keeper),
//! `delete`; and its own, which make it a keeper or a server of shared files.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use joey_shim::bootstrap::{self, Invocation, Start};
use joey_shim::host::oom;
use joey_shim::standby::keeper;
use joey_shim::{config, serve, share, sys};

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write as _;
            // containerd shows what `start` prints on standard error to the operator.
            let _ = writeln!(std::io::stderr(), "joey: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[OsString]) -> Result<()> {
    if let [action, role] = args
        && action == keeper::ACTION
    {
        return keeper::run(config::Config::load(None)?, &role.to_string_lossy());
    }
    if let [action, args @ ..] = args
        && action == share::ACTION
    {
        return share::serve(args);
    }
    let invocation = Invocation::read(args)?;
    if invocation.flags.version {
        return Ok(bootstrap::print(concat!("joey ", env!("CARGO_PKG_VERSION"), "\n").as_bytes())?);
    }
    if invocation.flags.info {
        return Ok(bootstrap::print(&bootstrap::runtime_info()?)?);
    }
    match invocation.flags.action.as_str() {
        "start" => start(invocation),
        "delete" => {
            let config = config::Config::load(None)?;
            Ok(bootstrap::print(&serve::delete(&config, &invocation)?)?)
        }
        other => anyhow::bail!(
            "action {other:?} is not one of start, delete: containerd runs this program, not people"
        ),
    }
}

fn start(invocation: Invocation) -> Result<()> {
    // Read before the fork, so that containerd gets to see what is wrong with it.
    let config = config::Config::load(invocation.options.as_ref())?;
    match bootstrap::start(&invocation, &config)? {
        Start::Running(answer) => Ok(bootstrap::print(&answer)?),
        Start::Serve { listener, answer } => {
            // For the server, which inherits it; a keeper has it from the shim that made it.
            oom::set_above_parent();
            if sys::fork_server().context("fork the shim's server")? {
                serve::run(config, invocation, listener)
            } else {
                Ok(bootstrap::print(&answer)?)
            }
        }
    }
}

//! `joey`: the operator's tool. Checks a node, keeps its templates, shows its sandboxes; and does for
//! the shims what is heavy and done once per node.
#![allow(clippy::print_stdout)]

mod check;
mod connections;
mod console;
mod ebpf;
mod flows;
mod identity;
mod limit;
mod network;
mod policy;
mod sandboxes;
mod services;
mod standby;
mod templates;
mod timeline;
mod top;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use joey_shim::config::Config;

#[derive(Parser)]
#[command(version, about = "Joey: every pod in its own lightweight virtual machine")]
struct Cli {
    /// Configuration file (else JOEY_CONFIG, else /etc/joey/config.toml)
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    /// Machine-readable output
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Is this node able to run pods? What is missing, and what to do about it
    Check,
    /// The virtual machines that sandboxes are cloned from
    #[command(subcommand)]
    Template(templates::Task),
    /// The machines that wait for the next sandbox
    #[command(subcommand)]
    Standby(standby::Task),
    /// The eBPF programs that join pods to their VMs and keep tenants apart
    #[command(subcommand)]
    Ebpf(Ebpf),
    /// Who may reach whom
    #[command(subcommand)]
    Policy(policy::Task),
    /// Who has which address in the cluster
    #[command(subcommand)]
    Identity(identity::Task),
    /// The services that pods' guests translate connections by
    #[command(subcommand)]
    Services(services::Task),
    /// Images made of the node's snapshots
    #[command(subcommand)]
    Image(Image),
    /// Sandboxes on this node
    Ps,
    /// One sandbox: its size, processes, and how long each step of its start took
    Inspect {
        /// Its id, or the beginning of it
        id: String,
    },
    /// Change how much a running sandbox may ask of its disks and its network in a second
    Limit(limit::Limit),
    /// What tells about the pods' traffic and takes identities
    #[command(subcommand)]
    Network(network::Task),
    /// Who spoke with whom, and what was not let through (asks `joey network serve`)
    Flows(flows::Flows),
    /// What connections a pod's containers have, by process, if its annotation io.joey.mesh is "observe"
    Connections(connections::Connections),
    /// Traffic of pods and tenants: how much in a second and in all
    Top(top::Top),
    /// Remove what is left of sandboxes whose shim is gone (the shims do so too, now and then)
    Clean,
    /// The guest's console and the agent's log
    Console {
        /// Its id, or the beginning of it
        id: String,
        /// Wait for more
        #[arg(short, long)]
        follow: bool,
    },
}

#[derive(Subcommand)]
enum Ebpf {
    /// Load and pin the programs and their maps, unless they are there
    Load,
}

#[derive(Subcommand)]
enum Image {
    /// Make a disk of directories, unless it is there (run by the shim)
    Convert {
        /// Where the disk goes
        #[arg(long)]
        output: PathBuf,
        /// Most bytes that cached images may have together
        #[arg(long)]
        bound: u64,
        /// Directories, the top one first
        #[arg(required = true)]
        lowers: Vec<PathBuf>,
    },
    /// Cached images
    Ls,
    /// Remove cached images that no sandbox uses
    Prune,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    joey_shim::log::init_tool();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "joey: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the task; `false` if it found something wrong that it has told already.
fn run(cli: &Cli) -> Result<bool> {
    let config = match &cli.config {
        Some(path) => Config::from_file(path)?,
        None => Config::load(None)?,
    };
    match &cli.task {
        Task::Check => return check::run(&config, cli.json),
        Task::Template(task) => templates::run(&config, task, cli.json)?,
        Task::Standby(task) => return standby::run(&config, task, cli.json),
        Task::Ebpf(Ebpf::Load) => {
            let path = ebpf::load(&config)?;
            if cli.json {
                println!("{}", serde_json::json!({ "pinned": path }));
            } else {
                println!("pinned at {}", path.display());
            }
        }
        Task::Image(Image::Convert { output, bound, lowers }) => {
            ensure!(!cli.json, "`image convert` prints nothing: --json does not go with it");
            joey_shim::rootfs::convert::run(&config, output, *bound, lowers)?;
        }
        Task::Image(Image::Ls) => joey_shim::rootfs::cache::list(&config, cli.json)?,
        Task::Image(Image::Prune) => {
            let removed = joey_shim::rootfs::cache::shrink(&config, 0)?;
            if cli.json {
                println!("{}", serde_json::json!({ "removed": removed }));
            } else {
                println!("{} images removed", removed.len());
            }
        }
        Task::Policy(task) => return policy::run(&config, task, cli.json),
        Task::Identity(task) => identity::run(&config, task, cli.json)?,
        Task::Services(task) => services::run(&config, task, cli.json)?,
        Task::Ps => sandboxes::list(&config, cli.json)?,
        Task::Inspect { id } => sandboxes::inspect(&config, id, cli.json)?,
        Task::Limit(limit) => limit::run(&config, limit, cli.json)?,
        Task::Network(network::Task::Serve(serve)) => network::run(&config, serve)?,
        Task::Flows(flows) => flows::run(&config, flows, cli.json)?,
        Task::Connections(wanted) => connections::run(&config, wanted, cli.json)?,
        Task::Top(top) => top::run(&config, top, cli.json)?,
        Task::Clean => return sandboxes::clean(&config, cli.json),
        Task::Console { id, follow } => console::show(&config, id, *follow, cli.json)?,
    }
    Ok(true)
}

//! The test node's command: `up`, `down`, `status`; `hold` is the node's own first process.
#![allow(clippy::print_stdout)]

#[path = "joey-node/demo.rs"]
mod demo;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use joey_tests::bench::{self, stats::Report};
use joey_tests::node::config::Version;
use joey_tests::node::{Node, Options, holder, names};

#[derive(Parser)]
#[command(about = "A private Kubernetes node for trying Joey")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start the node
    Up {
        /// containerd release: 1.7 or 2.1
        #[arg(long, default_value = "2.1")]
        containerd: Version,
    },
    /// End the node and check that nothing is left
    Down,
    /// Show what runs
    Status,
    /// Measure
    Bench {
        #[command(subcommand)]
        bench: Bench,
    },
    /// Start a pod from a real image and show its timeline
    Demo,
    #[command(hide = true)]
    Hold {
        #[arg(long)]
        tied: bool,
    },
}

/// What every benchmark is told.
#[derive(Args)]
struct Measure {
    /// How often each thing is measured
    #[arg(long)]
    runs: Option<usize>,
    /// Where to write the figures; the picture goes beside it
    #[arg(long)]
    json: Option<PathBuf>,
    /// containerd release
    #[arg(long, default_value = "2.1")]
    containerd: Version,
}

#[derive(Subcommand)]
enum Bench {
    /// Joey beside runc, from RunPodSandbox to RemovePodSandbox
    Start {
        #[command(flatten)]
        measure: Measure,
        /// Handlers to compare
        #[arg(long, value_delimiter = ',', default_value = "joey,runc")]
        handlers: Vec<String>,
        /// Machines that wait for the next sandbox; 0 measures fresh clones
        #[arg(long)]
        standby: Option<u32>,
    },
    /// joey-snapshotter beside overlayfs: a real image unpacked, and images of 2 to 100 layers started
    Image {
        #[command(flatten)]
        measure: Measure,
    },
    /// A container's own files: the encrypted disk beside the host's
    Disk {
        #[command(flatten)]
        measure: Measure,
    },
    /// A directory of the host
    Volume {
        #[command(flatten)]
        measure: Measure,
    },
    /// The pod's network: the wire beside Kata's, its setup, limits, fairness, and real pods
    Net {
        #[command(flatten)]
        measure: Measure,
        /// What to measure
        #[arg(
            long,
            value_delimiter = ',',
            default_value = "wire,setup,packet,limits,fairness,pods,crowd"
        )]
        parts: Vec<bench::net::Part>,
    },
    /// Connections to services that guests translate, and how soon guests know of services
    Services {
        #[command(flatten)]
        measure: Measure,
    },
    /// Connections of pods in a mesh beside those of a pod that is in none
    Mesh {
        #[command(flatten)]
        measure: Measure,
    },
}

const NAME: &str = "dev";

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Hold { tied } => holder::run(tied),
        Command::Up { containerd } => up(containerd),
        Command::Down => down(),
        Command::Status => status(),
        Command::Bench { bench } => match bench {
            Bench::Start { measure, handlers, standby } => {
                let handlers: Vec<&str> = handlers.iter().map(String::as_str).collect();
                measure.run(50, |node, runs, progress| {
                    if let Some(standby) = standby {
                        node.configure(&format!("standby = {standby}"))?;
                    }
                    bench::start(node, &handlers, runs, progress)
                })
            }
            Bench::Image { measure } => measure.run(10, bench::images::image),
            Bench::Disk { measure } => measure.run(10, bench::files::disk),
            Bench::Volume { measure } => measure.run(10, bench::files::volume),
            Bench::Net { measure, parts } => measure.net(&parts),
            Bench::Services { measure } => measure.run(10, bench::services::services),
            Bench::Mesh { measure } => measure.run(10, bench::mesh::mesh),
        },
        Command::Demo => with_node(Version::V2_1, "demo", demo::run),
    }
}

impl Measure {
    /// Measures the network; only some of it needs a node.
    fn net(self, parts: &[bench::net::Part]) -> Result<()> {
        if parts.iter().any(|part| part.needs_node()) {
            return self.run(10, |node, runs, progress| {
                bench::net::net(Some(node), parts, runs, progress)
            });
        }
        let runs = self.runs.unwrap_or(10);
        let report = bench::net::net(None, parts, runs, &mut |text| println!("{text}"))?;
        publish(&report, self.json.as_deref())
    }

    /// Measures on a node of its own, `runs` times if the operator does not say.
    fn run(
        self,
        runs: usize,
        bench: impl FnOnce(&Node, usize, &mut dyn FnMut(&str)) -> Result<Report>,
    ) -> Result<()> {
        let runs = self.runs.unwrap_or(runs);
        with_node(self.containerd, "bench", |node| {
            let report = bench(node, runs, &mut |text| println!("{text}"))?;
            publish(&report, self.json.as_deref())
        })
    }
}

fn up(version: Version) -> Result<()> {
    let tool = std::env::current_exe()?;
    let options = Options { version, name: NAME, tool: &tool, tied: false };
    let node = match Node::up(&options) {
        Ok(node) => node,
        Err(error) => {
            if let Ok(node) = Node::attach(NAME) {
                node.down()?;
            }
            return Err(error);
        }
    };
    println!("node is up: {}", node.cri.version()?);
    println!("  CRI socket  {}", node.socket().display());
    println!("  handlers    joey, joey-overlayfs, runc{}", sandboxed(version));
    println!("  images      {}", node.cri.images()?.join(", "));
    println!("  network     nsenter -t {} -n", node.holder());
    println!("  log         {}", node.dir().join("containerd.log").display());
    Ok(())
}

fn sandboxed(version: Version) -> &'static str {
    if version == Version::V2_1 { ", joey-sandboxed" } else { "" }
}

fn down() -> Result<()> {
    if names().is_empty() {
        println!("no node is up");
        return Ok(());
    }
    let leaks = Node::attach(NAME)?.down()?;
    if leaks.is_empty() {
        println!("node is down; nothing left behind");
        return Ok(());
    }
    bail!("left behind by the node's pods:\n  {}", leaks.join("\n  "))
}

fn status() -> Result<()> {
    for name in names() {
        let node = Node::attach(&name)?;
        println!("{name}: containerd {}", node.version.name());
        println!("  CRI socket {}", node.socket().display());
        match (node.cri.pods(), node.cri.containers()) {
            (Ok(pods), Ok(containers)) => {
                println!("  {} pods, {} containers", pods.len(), containers.len());
            }
            (Err(error), _) | (_, Err(error)) => println!("  containerd: {error:#}"),
        }
        for (pid, command) in node.processes() {
            println!("  {pid:>8} {command}");
        }
    }
    Ok(())
}

/// Runs `work` on a node of its own, which is ended whatever happens.
fn with_node(version: Version, name: &str, work: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let tool = std::env::current_exe()?;
    let name = format!("{name}-{}", std::process::id());
    let node = Node::up(&Options { version, name: &name, tool: &tool, tied: true })?;
    let result = work(&node).with_context(|| format!("containerd's last words:\n{}", node.log()));
    let leaks = node.down()?;
    result?;
    if !leaks.is_empty() {
        bail!("left behind by the node's pods:\n  {}", leaks.join("\n  "));
    }
    println!("node is down; nothing left behind");
    Ok(())
}

/// Shows a report and writes it as JSON and picture.
fn publish(report: &Report, json: Option<&Path>) -> Result<()> {
    println!("\n{}", report.table());
    let file = format!("target/bench/{}.json", report.name);
    let default = joey_tests::paths::repository().join(file);
    let json = json.unwrap_or(&default);
    if let Some(folder) = json.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(json, serde_json::to_string_pretty(report)? + "\n")?;
    let picture = json.with_extension("svg");
    fs::write(&picture, bench::plot::svg(report))?;
    println!("figures: {}\npicture: {}", json.display(), picture.display());
    Ok(())
}

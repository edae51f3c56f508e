//! The test node's command: `up`, `down`, `status`; `hold` is the node's own first process.
#![allow(clippy::print_stdout)]

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
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
    #[command(hide = true)]
    Hold {
        #[arg(long)]
        tied: bool,
    },
}

const NAME: &str = "dev";

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Hold { tied } => holder::run(tied),
        Command::Up { containerd } => up(containerd),
        Command::Down => down(),
        Command::Status => status(),
    }
}

fn up(version: Version) -> Result<()> {
    let tool = std::env::current_exe()?;
    let options = Options {
        version,
        name: NAME,
        tool: &tool,
        tied: false,
    };
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
    println!("  handlers    joey, runc{}", sandboxed(version));
    println!("  images      {}", node.cri.images()?.join(", "));
    println!("  network     nsenter -t {} -n", node.holder());
    println!(
        "  log         {}",
        node.dir().join("containerd.log").display()
    );
    Ok(())
}

fn sandboxed(version: Version) -> &'static str {
    if version == Version::V2_1 {
        ", joey-sandboxed"
    } else {
        ""
    }
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

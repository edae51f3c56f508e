//! `joey standby`: the machines that wait for the next sandbox.

use anyhow::{Context as _, Result};
use clap::Subcommand;
use joey_shim::config::Config;
use joey_shim::sandbox::record::Record;
use joey_shim::{sandbox, standby};
use serde_json::json;

#[derive(Subcommand)]
pub(crate) enum Task {
    /// Those on this node
    Ls,
    /// End them; the next sandbox has another one prepared unless `standby = 0` is configured
    Rm,
}

/// `false` if something is left that should be gone.
pub(crate) fn run(config: &Config, task: &Task, json: bool) -> Result<bool> {
    let all = Record::all(&config.run_dir).context("list the machines")?;
    let waiting: Vec<Record> =
        all.into_iter().filter(|record| record.id.starts_with(standby::PREFIX)).collect();
    match task {
        Task::Ls if json => println!("{}", serde_json::to_string_pretty(&waiting)?),
        Task::Ls => {
            println!("{:<20} {:>5} {:>8} {:>8}  STATE", "MACHINE", "VCPUS", "MEMORY", "VMM PID");
            for record in &waiting {
                let ready = record.vmm.is_some_and(|vmm| vmm.alive());
                println!(
                    "{:<20} {:>5} {:>8} {:>8}  {}",
                    record.id,
                    record.vcpus,
                    format!("{}Mi", record.memory_mib),
                    record.vmm.map_or_else(|| "-".to_owned(), |vmm| vmm.pid.to_string()),
                    if ready { "ready" } else { "being prepared" },
                );
            }
        }
        Task::Rm => {
            let left: Vec<String> = waiting
                .iter()
                .filter_map(|record| sandbox::teardown::undo(&config.run_dir, record).err())
                .map(|error| error.to_string())
                .collect();
            if json {
                println!("{}", json!({"removed": waiting.len() - left.len(), "left": left}));
            } else {
                left.iter().for_each(|text| println!("{text}"));
                println!("{} removed", waiting.len() - left.len());
            }
            return Ok(left.is_empty());
        }
    }
    Ok(true)
}

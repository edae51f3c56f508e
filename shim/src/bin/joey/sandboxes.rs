//! `joey ps`, `joey inspect`, `joey clean`: from the records that shims keep.

use anyhow::{Context as _, Result};
use joey_shim::config::Config;
use joey_shim::sandbox::orphans;
use joey_shim::sandbox::record::{Damage, ProcessId, Record, directory};
use joey_shim::sandbox::timeline::{FirstAnswer, Steps};
use joey_shim::standby;
use serde_json::json;

use crate::timeline;

fn state(record: &Record) -> &'static str {
    let alive = |process: Option<ProcessId>| process.is_some_and(|process| process.alive());
    match (alive(record.shim), alive(record.vmm)) {
        (true, true) => "running",
        (true, false) if record.vmm.is_none() => "starting",
        (true, false) => "stopped",
        // containerd calls `delete`, which cleans up from the record.
        (false, _) => "orphaned",
    }
}

fn age(record: &Record) -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    match now.saturating_sub(record.started_at) {
        seconds @ 0..=119 => format!("{seconds}s"),
        seconds @ 120..=7199 => format!("{}m", seconds / 60),
        seconds @ 7200..=172_799 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

pub(crate) fn list(config: &Config, json: bool) -> Result<()> {
    let mut records = Record::all(&config.run_dir).context("list the sandboxes")?;
    records.retain(|record| !record.id.starts_with(standby::PREFIX));
    if json {
        let all: Vec<_> = records
            .iter()
            .map(|record| json!({"state": state(record), "record": record}))
            .collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!(
        "{:<14} {:<40} {:<9} {:>5} {:>8} {:>8} {:>6}",
        "SANDBOX", "POD", "STATE", "VCPUS", "MEMORY", "VMM PID", "AGE"
    );
    for record in &records {
        println!(
            "{:<14.13} {:<40.40} {:<9} {:>5} {:>8} {:>8} {:>6}",
            record.id,
            record.pod.as_deref().unwrap_or("-"),
            state(record),
            record.vcpus,
            format!("{}Mi", record.memory_mib),
            record.vmm.map_or_else(|| "-".to_owned(), |vmm| vmm.pid.to_string()),
            age(record),
        );
    }
    Ok(())
}

/// `false` if something is left.
pub(crate) fn clean(config: &Config, json: bool) -> Result<bool> {
    let orphans = orphans::collect(&config.run_dir).context("list the sandboxes")?;
    let clean = orphans.iter().all(|(_, undone)| undone.is_ok());
    if json {
        let all: Vec<_> = orphans
            .iter()
            .map(|(record, undone)| {
                let left = undone.as_ref().err().map(|incomplete| &incomplete.left);
                json!({"sandbox": record.id, "pod": record.pod, "left": left})
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(clean);
    }
    for (record, undone) in &orphans {
        let pod = record.pod.as_deref().unwrap_or("-");
        match undone {
            Ok(()) => println!("removed sandbox {} of pod {pod}", record.id),
            Err(error) => println!("{error}"),
        }
    }
    if orphans.is_empty() {
        println!("nothing to remove: every sandbox has its shim");
    }
    Ok(clean)
}

/// The one sandbox whose id begins with `prefix`.
pub(crate) fn find(config: &Config, prefix: &str) -> Result<Record> {
    let mut matching: Vec<Record> = Record::all(&config.run_dir)?
        .into_iter()
        .filter(|record| record.id.starts_with(prefix))
        .collect();
    match (matching.len(), matching.pop()) {
        (1, Some(record)) => Ok(record),
        (0, _) => anyhow::bail!("no sandbox has an id that begins with {prefix:?}; see `joey ps`"),
        (count, _) => anyhow::bail!("{count} sandboxes have an id that begins with {prefix:?}"),
    }
}

pub(crate) fn inspect(config: &Config, id: &str, json: bool) -> Result<()> {
    let record = find(config, id)?;
    let steps = Steps::read(&directory(&config.run_dir, &record.id)).unwrap_or_default();
    if json {
        let all = json!({"state": state(&record), "record": record, "timeline": steps});
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    let pid = |process: Option<ProcessId>| {
        process.map_or_else(|| "-".to_owned(), |process| process.pid.to_string())
    };
    println!("sandbox    {}", record.id);
    println!("pod        {}", record.pod.as_deref().unwrap_or("-"));
    println!("state      {}", state(&record));
    println!("size       {} vCPUs, {} MiB", record.vcpus, record.memory_mib);
    println!(
        "started    {} ago, {}",
        age(&record),
        match record.cloned {
            Some(true) => "cloned from a template",
            Some(false) => "booted cold",
            None => "not running yet",
        }
    );
    println!("processes  shim {}, VMM {}", pid(record.shim), pid(record.vmm));
    let machine = if record.machine_id.is_empty() { "-" } else { &record.machine_id };
    println!("machine    {machine}");
    if let Some(netns) = &record.netns {
        println!("network    {}", netns.display());
    }
    for Damage { image, layer, file, block } in &record.damaged {
        println!(
            "damaged    image {image}, layer {layer}, {} block {block}: remove all images with this layer and pull them again",
            file.display()
        );
    }
    if let Some(FirstAnswer { took_ms, vmm_cpu_ms }) = steps.first_answer {
        println!(
            "identity   {took_ms:.1} ms after the clone began, {vmm_cpu_ms:.1} ms of processor time"
        );
    }
    print!("\n{}", timeline::draw(&steps));
    Ok(())
}

//! `joey template`: list, build, remove.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use joey_shim::config::Config;
use joey_shim::host::cgroup;
use joey_shim::vmm::template::TemplateStore;

#[derive(Subcommand)]
pub(crate) enum Task {
    /// Templates on this node
    Ls,
    /// Build a template, unless a good one is there; shims run this when one is missing
    Build {
        /// Virtual processors (default: those of a pod that asks for nothing)
        #[arg(long)]
        vcpus: Option<u32>,
        /// Memory in MiB (default: that of a pod that asks for nothing)
        #[arg(long)]
        memory: Option<u32>,
        /// Control group to enter first: the builder outlives the pod whose shim starts it
        #[arg(long, hide = true)]
        cgroup: Vec<PathBuf>,
    },
    /// Remove a template; sandboxes that were cloned from it keep running
    Rm {
        /// Key of the template, or the beginning of it
        key: Option<String>,
        /// Remove those of other guest images, VMMs and accelerators
        #[arg(long)]
        stale: bool,
    },
}

pub(crate) fn run(config: &Config, task: &Task, json: bool) -> Result<()> {
    let vmm = config.vmm()?;
    let store = TemplateStore::new(&vmm)?;
    match task {
        Task::Ls => list(&store, json),
        Task::Build { vcpus, memory, cgroup } => {
            cgroup::join(cgroup)?;
            let default = joey_shim::sizing::size(config, &std::collections::HashMap::new())?;
            let (vcpus, memory) =
                (vcpus.unwrap_or(default.vcpus), memory.unwrap_or(default.memory_mib));
            let begun = std::time::Instant::now();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let template = runtime.block_on(store.build(vcpus, memory))?;
            let stale = store.collect_stale()?;
            if json {
                let key = &template.manifest.key;
                println!("{}", serde_json::json!({"key": key, "removed": stale}));
            } else {
                println!("template {} is good ({:.1?})", template.manifest.key, begun.elapsed());
            }
            Ok(())
        }
        Task::Rm { key, stale } => remove(&store, key.as_deref(), *stale, json),
    }
}

fn list(store: &TemplateStore<'_>, json: bool) -> Result<()> {
    let all = store.list();
    if json {
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    if all.is_empty() {
        println!("no templates; `joey template build` makes one, or the first pod does");
        return Ok(());
    }
    println!("{:<26} {:>5} {:>10}  STATE", "KEY", "VCPUS", "MEMORY");
    for manifest in all {
        let state = match store.key(manifest.vcpus, manifest.memory_mib) {
            Ok(key) if key == manifest.key => match store.open(&manifest.key) {
                Ok(_) => "good".to_owned(),
                Err(error) => format!("damaged: {error}"),
            },
            Ok(_) => "stale: of another guest image, VMM or accelerator".to_owned(),
            Err(error) => error.to_string(),
        };
        let memory = format!("{} MiB", manifest.memory_mib);
        println!("{:<26} {:>5} {:>10}  {state}", manifest.key, manifest.vcpus, memory);
    }
    Ok(())
}

fn remove(store: &TemplateStore<'_>, key: Option<&str>, stale: bool, json: bool) -> Result<()> {
    let mut removed = if stale { store.collect_stale()? } else { Vec::new() };
    if let Some(prefix) = key {
        let matching: Vec<String> = store
            .list()
            .into_iter()
            .map(|manifest| manifest.key)
            .filter(|key| key.starts_with(prefix))
            .collect();
        let [key] = matching.as_slice() else {
            anyhow::bail!("{} templates have a key that begins with {prefix:?}", matching.len());
        };
        store.remove(key).with_context(|| format!("remove template {key}"))?;
        removed.push(key.clone());
    } else if !stale {
        anyhow::bail!("say which: a key, or --stale");
    }
    if json {
        println!("{}", serde_json::json!({ "removed": removed }));
    } else {
        println!("{} removed", removed.len());
    }
    Ok(())
}

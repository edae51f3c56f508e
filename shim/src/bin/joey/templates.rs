//! `joey template`: list, build, remove.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Subcommand;
use futures::future::BoxFuture;
use joey_shim::config::Config;
use joey_shim::host::cgroup;
use joey_shim::standby;
use joey_shim::vmm::template::{self, Manifest, TemplateStore};

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
        Task::Ls => {
            template::sweep(&vmm.templates_dir);
            list(&store, json)
        }
        Task::Build { vcpus, memory, cgroup } => {
            cgroup::join(cgroup)?;
            let default = joey_shim::sizing::size(config, &std::collections::HashMap::new())?;
            let (vcpus, memory) =
                (vcpus.unwrap_or(default.vcpus), memory.unwrap_or(default.memory_mib));
            let begun = std::time::Instant::now();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let rehearse = |vm, channel| -> BoxFuture<'_, Result<()>> {
                Box::pin(standby::rehearse_for_template(config, vm, channel))
            };
            let template = runtime.block_on(store.build(vcpus, memory, &rehearse))?;
            let stale = store.collect_stale()?;
            if json {
                let key = &template.manifest.key;
                println!("{}", serde_json::json!({"key": key, "removed": stale}));
            } else {
                println!("template {} is good ({:.1?})", template.manifest.key, begun.elapsed());
            }
            Ok(())
        }
        Task::Rm { key, stale } => remove(&store, &vmm.templates_dir, key.as_deref(), *stale, json),
    }
}

fn list(store: &TemplateStore<'_>, json: bool) -> Result<()> {
    let all: Vec<_> = store.list().into_iter().map(|it| (state(store, &it), it)).collect();
    if json {
        let all: Vec<_> = all.iter().map(|(state, it)| described(state, it)).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    if all.is_empty() {
        println!("no templates; `joey template build` makes one, or the first pod does");
        return Ok(());
    }
    println!("{:<26} {:>5} {:>10}  STATE", "KEY", "VCPUS", "MEMORY");
    for ((word, reason), manifest) in all {
        let state = reason.map_or_else(|| word.to_owned(), |reason| format!("{word}: {reason}"));
        let memory = format!("{} MiB", manifest.memory_mib);
        println!("{:<26} {:>5} {:>10}  {state}", manifest.key, manifest.vcpus, memory);
    }
    Ok(())
}

/// Whether it can be cloned, in a word, and why not.
type State = (&'static str, Option<String>);

fn state(store: &TemplateStore<'_>, manifest: &Manifest) -> State {
    match store.key(manifest.vcpus, manifest.memory_mib) {
        Ok(key) if key == manifest.key => match store.open(&manifest.key) {
            Ok(_) if manifest.accelerator == "tcg" && !manifest.has_checkpoint() => {
                ("good", Some("but clones start QEMU anew: it has no checkpoint".to_owned()))
            }
            Ok(_) => ("good", None),
            Err(error) => ("damaged", Some(error.to_string())),
        },
        Ok(_) => ("stale", Some("of another guest image, VMM or accelerator".to_owned())),
        Err(error) => ("unknown", Some(error.to_string())),
    }
}

/// The manifest with its state.
fn described((word, reason): &State, manifest: &Manifest) -> serde_json::Value {
    let mut all = serde_json::json!(manifest);
    if let Some(all) = all.as_object_mut() {
        all.insert("state".to_owned(), (*word).into());
        all.insert("reason".to_owned(), reason.clone().into());
    }
    all
}

fn remove(
    store: &TemplateStore<'_>,
    templates: &Path,
    key: Option<&str>,
    stale: bool,
    json: bool,
) -> Result<()> {
    let mut removed = if stale { store.collect_stale()? } else { template::sweep(templates) };
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn json_says_of_each_template_whether_it_is_good() {
        let manifest: Manifest = serde_json::from_value(serde_json::json!({
            "key": "k", "qemu": "10.0", "accelerator": "kvm", "vcpus": 1, "memory_mib": 256,
            "guest": "g", "files": {}
        }))
        .unwrap();
        let good = described(&("good", None), &manifest);
        assert_eq!((&good["state"], &good["reason"]), (&"good".into(), &().into()));
        let stale = described(&("stale", Some("old".to_owned())), &manifest);
        assert_eq!((&stale["key"], &stale["reason"]), (&"k".into(), &"old".into()));
    }
}

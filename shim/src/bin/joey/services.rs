//! `joey services`: what guests translate connections to services by.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use clap::Subcommand;
use joey_shim::config::Config;
use joey_shim::services::document::{Request, Service};
use joey_shim::services::feed::Feed;
use joey_shim::services::keeper::{self, Change, Keeper};

use super::identity::tell;
use super::policy::{MOST_IDENTITIES, ago, read};

#[derive(Subcommand)]
pub(crate) enum Task {
    /// Put services in force in place of those that were
    Apply {
        /// What `kubectl get services,endpointslices -A -o json` prints, or a plain list; - is standard
        /// input. May be repeated
        #[arg(short, long = "filename", required = true)]
        files: Vec<PathBuf>,
        /// Have there be no services
        #[arg(long)]
        allow_empty: bool,
    },
    /// The same by the daemon's socket
    Feed {
        /// As those of `apply`
        #[arg(short, long = "filename", required = true)]
        files: Vec<PathBuf>,
    },
    /// The services, or with --tenant what pods of a tenant see
    Show {
        /// Whose
        #[arg(long)]
        tenant: Option<String>,
    },
}

pub(crate) fn run(config: &Config, task: &Task, json: bool) -> Result<()> {
    match task {
        Task::Apply { files, allow_empty } => {
            let services = gather(config, files, *allow_empty)?;
            let change =
                Change::Services(Request { replace: Some(services), ..Request::default() });
            let applied = Keeper::new(&config.run_dir, &config.state_dir).apply(&change)?;
            told(&applied, json);
        }
        Task::Feed { files } => {
            let services = gather(config, files, false)?;
            let count = services.len();
            let request = Request { replace: Some(services), ..Request::default() };
            let reply = tell(config, &serde_json::json!({ "services": request }))?;
            if json {
                println!("{reply}");
            } else {
                let number = reply.get("generation").unwrap_or(&serde_json::Value::Null);
                println!("in force: {count} services, in generation {number}");
            }
        }
        Task::Show { tenant: Some(tenant) } => seen(config, tenant, json)?,
        Task::Show { tenant: None } => show(config, json)?,
    }
    Ok(())
}

fn gather(config: &Config, files: &[PathBuf], allow_empty: bool) -> Result<Vec<Service>> {
    let mut feed = Feed::default();
    for (name, text) in read(files, MOST_IDENTITIES)? {
        feed.read(&name, &text)?;
    }
    let services = feed.finish(&config.tenant_annotations)?;
    ensure!(
        allow_empty || !services.is_empty(),
        "there are no services with addresses in the files (--allow-empty)"
    );
    Ok(services)
}

fn told(applied: &keeper::Applied, json: bool) {
    let keeper::Applied { generation, services, tenants, logs, took } = *applied;
    let milliseconds = took.as_secs_f64() * 1000.0;
    if json {
        println!(
            "{}",
            serde_json::json!({
                "generation": generation, "services": services, "tenants": tenants, "logs": logs,
                "milliseconds": milliseconds,
            })
        );
    } else {
        println!(
            "in force: {services} services of {tenants} tenants, in generation {generation}; {milliseconds:.1} ms"
        );
    }
}

fn show(config: &Config, json: bool) -> Result<()> {
    let stored = keeper::stored(&config.state_dir)?;
    if json {
        // As `apply` takes it.
        println!("{}", serde_json::to_string(&stored.content)?);
        return Ok(());
    }
    println!("applied {}, generation {}", ago(stored.at), stored.epoch);
    for service in &stored.content {
        let addresses: Vec<String> = service.addresses.iter().map(ToString::to_string).collect();
        println!("{:<40} {:<20} {}", service.id(), service.tenant(), addresses.join(" "));
    }
    Ok(())
}

/// What a tenant's pods see, as the log has it that their shims read.
fn seen(config: &Config, tenant: &str, json: bool) -> Result<()> {
    let (generation, table) = keeper::read(&config.run_dir, tenant).with_context(|| {
        format!(
            "the services that pods of tenant {tenant} see: `joey network serve` or `joey services \
             apply` writes them"
        )
    })?;
    let protocol = |number: u8| if number == 17 { "UDP" } else { "TCP" };
    if json {
        let entries: Vec<_> = table
            .entries()
            .map(|(key, affinity, backends)| {
                let endpoints = backends.iter().map(|it| (it.address, it.port).into());
                serde_json::json!({
                    "address": key.address, "port": key.port, "protocol": protocol(key.protocol),
                    "affinity_seconds": affinity,
                    "endpoints": endpoints.collect::<Vec<std::net::SocketAddr>>(),
                })
            })
            .collect();
        println!("{}", serde_json::json!({ "generation": generation, "services": entries }));
        return Ok(());
    }
    let (fronts, backends) = table.counts();
    println!("generation {generation}: {fronts} addresses and ports, {backends} endpoints");
    for (key, _, backends) in table.entries() {
        let at = std::net::SocketAddr::from((key.address, key.port));
        println!("{:<48} {} {} endpoints", at.to_string(), protocol(key.protocol), backends.len());
    }
    Ok(())
}

//! `joey identity`: who has which address in the cluster.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Subcommand;
use joey_shim::config::Config;
use joey_shim::policy::apply::{apply, rehearse};
use joey_shim::policy::entry::{Entry, Kind, Namespace};
use joey_shim::policy::feed::Feed;
use joey_shim::policy::state::Store;
use joey_shim::policy::{Change, Request};

use super::policy::{MOST_IDENTITIES, ago, read, told};

/// How long the daemon may take.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Subcommand)]
pub(crate) enum Task {
    /// Put an identity table in force in place of the one that was
    Apply {
        /// What `kubectl get pods,services,namespaces -A -o json` prints, or a plain list; - is standard
        /// input. May be repeated
        #[arg(short, long = "filename", required = true)]
        files: Vec<PathBuf>,
        /// Check and compile, change nothing
        #[arg(long)]
        dry_run: bool,
        /// Have nobody's address be known
        #[arg(long)]
        allow_empty: bool,
    },
    /// The same by the daemon's socket, which needs no rights on maps
    Feed {
        /// As those of `apply`
        #[arg(short, long = "filename", required = true)]
        files: Vec<PathBuf>,
    },
    /// The identity table
    Show,
}

pub(crate) fn run(config: &Config, task: &Task, json: bool) -> Result<()> {
    match task {
        Task::Apply { files, dry_run, allow_empty } => {
            let (entries, namespaces) = gather(config, files, *allow_empty)?;
            let what = format!("{} addresses", entries.len());
            let change = Change::Replace { entries, namespaces };
            let applied = if *dry_run { rehearse(config, change)? } else { apply(config, change)? };
            told(&applied, &what, *dry_run, json);
        }
        Task::Feed { files } => {
            let (entries, namespaces) = gather(config, files, false)?;
            feed(config, entries, namespaces, json)?;
        }
        Task::Show => show(config, json)?,
    }
    Ok(())
}

fn gather(
    config: &Config,
    files: &[PathBuf],
    allow_empty: bool,
) -> Result<(Vec<Entry>, Vec<Namespace>)> {
    let mut feed = Feed::default();
    for (name, text) in read(files, MOST_IDENTITIES)? {
        feed.read(&name, &text)?;
    }
    let (entries, namespaces) = feed.finish(&config.tenant_annotations)?;
    ensure!(
        allow_empty || !entries.is_empty(),
        "nobody has an address in the files; with an empty table pods would reach no other node \
         (--allow-empty)"
    );
    Ok((entries, namespaces))
}

fn feed(
    config: &Config,
    entries: Vec<Entry>,
    namespaces: Vec<Namespace>,
    json: bool,
) -> Result<()> {
    let count = entries.len();
    let request = Request { replace: Some(entries), namespaces, ..Request::default() };
    let reply = tell(config, &serde_json::to_value(request)?)?;
    if json {
        println!("{reply}");
    } else {
        let epoch = reply.get("epoch").unwrap_or(&serde_json::Value::Null);
        println!("in force: {count} addresses, in epoch {epoch}");
    }
    Ok(())
}

/// Has the daemon make a change; its answer.
pub(super) fn tell(config: &Config, request: &serde_json::Value) -> Result<serde_json::Value> {
    let path = config.run_dir.join("network.sock");
    let socket = UnixStream::connect(&path);
    let mut socket = socket.with_context(|| {
        format!("reach the daemon at {}; `joey network serve` is it", path.display())
    })?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    socket.write_all(&line).context("tell the daemon")?;
    let mut reply = String::new();
    BufReader::new(&socket).read_line(&mut reply).context("hear of the daemon")?;
    let reply: serde_json::Value =
        serde_json::from_str(&reply).with_context(|| format!("the daemon said {reply:?}"))?;
    if let Some(error) = reply.get("error").and_then(serde_json::Value::as_str) {
        bail!("the daemon refused it: {error}");
    }
    Ok(reply)
}

fn show(config: &Config, json: bool) -> Result<()> {
    let table = Store::new(&config.state_dir).identities()?;
    if json {
        // As `apply` takes it.
        println!("{}", serde_json::to_string(&table.content)?);
        return Ok(());
    }
    println!("applied {}, epoch {}", ago(table.at), table.epoch);
    for entry in &table.content.entries {
        let kind = if entry.kind == Kind::Service { "Service " } else { "" };
        let labels: Vec<String> = entry.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        println!(
            "{:<39} {:<20} {kind}{}/{} {}",
            entry.address,
            entry.tenant(),
            entry.namespace,
            entry.name,
            labels.join(",")
        );
    }
    Ok(())
}

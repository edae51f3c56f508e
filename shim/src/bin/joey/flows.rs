//! `joey flows`: asks the daemon for records and prints them.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};
use joey_shim::config::Config;
use joey_shim::flows::daemon::SOCKET;
use joey_shim::flows::record::{Direction, Filter, Record, Verdict};

#[derive(Args)]
pub(crate) struct Flows {
    /// Go on with what happens from now on
    #[arg(short, long)]
    follow: bool,
    /// Only of this tenant, at either end
    #[arg(long)]
    tenant: Option<String>,
    /// Only of this pod, as NAMESPACE/NAME, at either end
    #[arg(long)]
    pod: Option<String>,
    /// Only what was let through, or not
    #[arg(long)]
    verdict: Option<Which>,
    /// Only the last so many of the past
    #[arg(long)]
    limit: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Which {
    Allow,
    Drop,
}

pub(crate) fn run(config: &Config, flows: &Flows, json: bool) -> Result<()> {
    let path = config.run_dir.join(SOCKET);
    let mut socket = UnixStream::connect(&path).with_context(|| {
        format!(
            "reach the daemon at {}; start it: `systemctl start joey-network`, or `joey network serve`",
            path.display()
        )
    })?;
    let filter = Filter {
        tenant: flows.tenant.clone(),
        pod: flows.pod.clone(),
        verdict: flows.verdict.map(|which| match which {
            Which::Allow => Verdict::Allow,
            Which::Drop => Verdict::Drop,
        }),
        follow: flows.follow,
        limit: flows.limit,
    };
    writeln!(socket, "{}", serde_json::json!({ "flows": filter }))?;
    match print(socket, json) {
        // Whoever read has had enough.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        other => other,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn print(socket: UnixStream, json: bool) -> Result<()> {
    let mut out = io::stdout().lock();
    if !json {
        let (opener, other) = ("OPENED BY", "TO");
        writeln!(
            out,
            "{:<7} {:<9} {:<5} {opener:<44} {other:<44} {:>9} {:>12} REASON",
            "VERDICT", "STATE", "PROTO", "PACKETS", "BYTES"
        )?;
    }
    for line in BufReader::new(socket).lines() {
        let line = line?;
        let value: serde_json::Value =
            serde_json::from_str(&line).with_context(|| format!("the daemon said {line:?}"))?;
        if let Some(error) = value.get("error").and_then(serde_json::Value::as_str) {
            bail!("the daemon refused it: {error}");
        }
        if json {
            writeln!(out, "{line}")?;
        } else if let Some(lost) = value.get("lost") {
            writeln!(out, "({lost} records were not told: they were too many)")?;
        } else {
            row(&mut out, &serde_json::from_value(value)?)?;
        }
        out.flush()?;
    }
    Ok(())
}

fn row(out: &mut impl io::Write, record: &Record) -> io::Result<()> {
    let end = |end: &joey_shim::flows::record::End| {
        let ip = end.address;
        let address = if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() };
        let name = if end.name.is_empty() { &end.tenant } else { &end.name };
        let space = if name.is_empty() { "" } else { " " };
        format!("{name}{space}{address}:{}", end.port)
    };
    let (opener, other) = match record.direction {
        Direction::Egress => (&record.pod, &record.peer),
        Direction::Ingress => (&record.peer, &record.pod),
    };
    let verdict = if record.verdict == Verdict::Allow { "allow" } else { "drop" };
    let state = serde_json::to_value(record.state).unwrap_or_default();
    writeln!(
        out,
        "{verdict:<7} {:<9} {:<5} {:<44} {:<44} {:>9} {:>12} {}",
        state.as_str().unwrap_or_default(),
        record.proto,
        end(opener),
        end(other),
        record.egress_packets + record.ingress_packets,
        record.egress_bytes + record.ingress_bytes,
        record.reason.as_deref().unwrap_or_default(),
    )
}

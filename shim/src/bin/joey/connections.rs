//! `joey connections`: asks a sandbox's shim what connections its containers have, and prints them.

use std::io::{self, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use joey_shim::config::Config;
use joey_shim::mesh::connections::{METHOD, Page, Query, SERVICE, Told, What};

use super::console::escape;

/// How long the shim may take, longer than it waits.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Args)]
pub(crate) struct Connections {
    /// The sandbox's id, or the beginning of it
    id: String,
    /// Go on with what happens from now on
    #[arg(short, long)]
    follow: bool,
}

pub(crate) fn run(config: &Config, wanted: &Connections, json: bool) -> Result<()> {
    let record = super::sandboxes::find(config, &wanted.id)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let address = format!("unix://{}", record.socket.display());
        let shim = ttrpc::r#async::Client::connect(&address).await;
        let shim = shim.with_context(|| format!("reach the shim of {} at {address}", record.id))?;
        match print(&shim, wanted.follow, json).await {
            // Whoever read has had enough.
            Err(error) if is_broken_pipe(&error) => Ok(()),
            other => other,
        }
    })
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

async fn ask(shim: &ttrpc::r#async::Client, query: &Query) -> Result<Page> {
    let request = ttrpc::Request {
        service: SERVICE.to_owned(),
        method: METHOD.to_owned(),
        timeout_nano: i64::try_from(PATIENCE.as_nanos()).unwrap_or(i64::MAX),
        payload: serde_json::to_vec(query)?,
        ..Default::default()
    };
    let response = shim.request(request).await?;
    Ok(serde_json::from_slice(&response.payload)?)
}

async fn print(shim: &ttrpc::r#async::Client, follow: bool, json: bool) -> Result<()> {
    let mut query = Query::default();
    let mut lost = 0;
    if !json {
        let mut out = io::stdout().lock();
        writeln!(
            out,
            "{:<20} {:<7} {:<14} {:>6} {:<16} {:>6} {:<5} {:<3} {:<24} {:<24} {:>10} {:>10}",
            "TIME",
            "WHAT",
            "CONTAINER",
            "PID",
            "COMMAND",
            "UID",
            "PROTO",
            "WAY",
            "LOCAL",
            "REMOTE",
            "SENT",
            "RECEIVED"
        )?;
    }
    loop {
        let page = ask(shim, &query).await?;
        let mut out = io::stdout().lock();
        let more = page.lost.saturating_sub(lost).saturating_add(page.skipped);
        if more > 0 {
            if json {
                writeln!(out, "{}", serde_json::json!({ "lost": more }))?;
            } else {
                writeln!(out, "({more} were not told: they were too many)")?;
            }
            lost = page.lost;
        }
        for told in &page.connections {
            if json {
                writeln!(out, "{}", serde_json::to_string(told)?)?;
            } else {
                row(&mut out, told)?;
            }
        }
        out.flush()?;
        if page.connections.is_empty() && !follow {
            return Ok(());
        }
        query = Query { from: Some(page.next), wait: follow };
    }
}

fn row(out: &mut impl io::Write, told: &Told) -> io::Result<()> {
    let end = |ip: std::net::IpAddr, port: u16| match port {
        0 => "-".to_owned(),
        port => std::net::SocketAddr::new(ip, port).to_string(),
    };
    let what = match told.what {
        What::Opened => "opened",
        What::Failed => "failed",
        What::Closed => "closed",
        What::Reset => "reset",
    };
    writeln!(
        out,
        "{:<20} {what:<7} {:<14.13} {:>6} {:<16} {:>6} {:<5} {:<3} {:<24} {:<24} {:>10} {:>10}",
        time(told.at_ns),
        if told.container.is_empty() { "-" } else { &told.container },
        told.pid,
        escape(&told.command).replace('\n', "\\n"),
        told.uid,
        told.protocol,
        told.direction,
        end(told.local_ip, told.local_port),
        end(told.remote_ip, told.remote_port),
        told.sent,
        told.received,
    )
}

/// `05-14 07:30:12.123`, in UTC.
fn time(nanoseconds: u64) -> String {
    let seconds = nanoseconds / 1_000_000_000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (month, day) = month_and_day(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let milliseconds = nanoseconds / 1_000_000 % 1000;
    format!("{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{milliseconds:03}")
}

/// Of a day counted from 1970-01-01 (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn month_and_day(days: u64) -> (u64, u64) {
    let of_era = (days + 719_468) % 146_097;
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    (if shifted < 10 { shifted + 3 } else { shifted - 9 }, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates() {
        assert_eq!(time(0), "01-01 00:00:00.000");
        assert_eq!(time(1_709_210_096_789_000_000), "02-29 12:34:56.789");
        assert_eq!(time(1_735_689_599_000_000_000), "12-31 23:59:59.000");
    }
}

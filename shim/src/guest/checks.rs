//! What a reply may be. Each check says what is wrong with it.

use joey_protocol::limits::{
    MAX_ERROR_TEXT, MAX_PHASES, MAX_PROCESSES, MAX_READ_FILE, MAX_SHORT_TEXT,
};
use joey_protocol::{api, handshake, ids};

/// Counters of one kernel file, and disks, in one reply.
const MAX_COUNTERS: usize = 256;

type Checked = Result<(), String>;

fn text(what: &str, value: &str) -> Checked {
    if value.len() <= MAX_SHORT_TEXT && value.chars().all(|c| !c.is_control()) {
        Ok(())
    } else {
        Err(format!("{what} of {} bytes is too long or has control characters", value.len()))
    }
}

fn count(what: &str, count: usize, most: usize) -> Checked {
    if count <= most { Ok(()) } else { Err(format!("{count} {what}, at most {most} are allowed")) }
}

fn phases(phases: &[api::Phase]) -> Checked {
    count("phases", phases.len(), MAX_PHASES)?;
    phases.iter().try_for_each(|phase| text("a phase's name", &phase.name))
}

pub(super) fn hello(reply: &api::HelloResponse) -> Checked {
    handshake::check("guest", reply.protocol_version).map_err(|error| error.to_string())?;
    text("the agent's version", &reply.agent_version)?;
    text("the kernel's release", &reply.kernel_release)
}

pub(super) fn start_sandbox(reply: &api::StartSandboxResponse) -> Checked {
    phases(&reply.phases)?;
    text("the host name", &reply.hostname)?;
    text("the boot id", &reply.boot_id)
}

pub(super) fn opened(reply: &api::OpenDiskResponse) -> Checked {
    phases(&reply.phases)
}

pub(super) fn created(reply: &api::CreateContainerResponse) -> Checked {
    phases(&reply.phases)
}

pub(super) fn started(reply: &api::StartResponse) -> Checked {
    phases(&reply.phases)
}

pub(super) fn file(reply: &api::ReadFileResponse, limit: u64) -> Checked {
    let most = usize::try_from(limit).unwrap_or(usize::MAX).min(MAX_READ_FILE);
    count("bytes of a file", reply.data.len(), most)
}

pub(super) fn processes(reply: &api::ProcessesResponse) -> Checked {
    count("processes", reply.processes.len(), MAX_PROCESSES)?;
    let names = reply.processes.iter().filter(|process| !process.exec_id.is_empty());
    for process in names {
        ids::ExecId::new(&process.exec_id).map_err(|error| error.to_string())?;
    }
    Ok(())
}

pub(super) fn stats(reply: &api::StatsResponse) -> Checked {
    count("disks", reply.io.len(), MAX_COUNTERS)?;
    for counters in [&reply.memory_stat, &reply.memory_events] {
        count("counters", counters.len(), MAX_COUNTERS)?;
        counters.keys().try_for_each(|name| text("a counter's name", name))?;
    }
    Ok(())
}

/// An error's words from the guest, fit for a log line of the host.
pub(super) fn error_text(message: &str) -> String {
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let mut text = String::new();
    for c in message.chars().map(printable) {
        if text.len() + c.len_utf8() > MAX_ERROR_TEXT {
            text.push('…');
            break;
        }
        text.push(c);
    }
    text
}

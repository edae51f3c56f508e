//! The keeper's life: prepare a machine, wait, become a sandbox's shim.

use std::cell::RefCell;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use tokio::net::UnixListener;

use super::claim::{self, Terms};
use super::rehearsal::rehearse;
use super::{PREFIX, Role, Standby, class, folder};
use crate::bootstrap::Invocation;
use crate::config::{CONFIG, Config};
use crate::failpoint;
use crate::guest::GuestChannel;
use crate::host::net::ParkedTap;
use crate::host::{cgroup, oom};
use crate::sandbox::record::{self, ProcessId, Record};
use crate::sandbox::{Guest, teardown};
use crate::sizing::Sizing;
use crate::vmm::{self, VmSpec};
use crate::{serve, sys};

/// The shim's action that makes it a keeper.
pub const ACTION: &str = "standby";
/// How long after a sandbox's start the next machine is prepared: the pod's containers go first. The
/// keeper waits, not the shim, whose pod may be gone by then.
const DELAY: Duration = Duration::from_secs(1);
/// How often a keeper looks whether it is still wanted.
const LOOK: Duration = Duration::from_secs(30);
/// Longest preparation; clone and rehearsal take about a second under software emulation.
const PREPARATION: Duration = Duration::from_secs(60);
/// Room for the command line of a sandbox's shim.
const COMMAND_LINE: usize = 1024;

/// Sees to it that a machine of this size waits for the next sandbox. A failure costs the next start
/// time, nothing else.
pub(crate) async fn replenish(config: Arc<Config>, sizing: Sizing, home: Vec<std::path::PathBuf>) {
    if config.standby == 0 {
        return;
    }
    if let Err(error) = spawn(&config, sizing, home).await {
        tracing::warn!("no machine is kept for the next sandbox: {error:#}");
    }
}

async fn spawn(config: &Config, sizing: Sizing, home: Vec<std::path::PathBuf>) -> Result<()> {
    let class = class(config, sizing)?;
    if waiting(config, &class) >= config.standby {
        return Ok(());
    }
    let role = serde_json::to_string(&Role { class, sizing, home })?;
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command.arg0("containerd-shim-joey-v2").args([ACTION, &format!("{role:<COMMAND_LINE$}")]);
    if let Some(file) = &config.file {
        command.env(CONFIG, file);
    }
    command.current_dir("/").stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
    let output = command.stderr(std::process::Stdio::piped()).output().await?;
    if !output.status.success() {
        bail!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// How many keepers of the class listen.
fn waiting(config: &Config, class: &str) -> u32 {
    let entries = fs::read_dir(folder(config, class)).into_iter().flatten().flatten();
    u32::try_from(entries.count()).unwrap_or(u32::MAX)
}

/// The keeper's process, in which nothing has been done yet.
///
/// # Errors
/// What the spawning shim is to log. Once it has detached, the machine's failure goes to the keeper's
/// log alone.
pub fn run(config: Config, role: &str) -> Result<()> {
    let role: Role = serde_json::from_str(role).context("what the keeper is for")?;
    if class(&config, role.sizing)? != role.class {
        bail!("the configuration is not in a file that the keeper could read too");
    }
    cgroup::join(&role.home)?;
    if !sys::fork_server()? {
        return Ok(());
    }
    let id = format!("{PREFIX}{}", std::process::id());
    let socket = folder(&config, &role.class).join(std::process::id().to_string());
    let record = Record {
        shim: ProcessId::of(std::process::id()).ok(),
        vcpus: role.sizing.vcpus,
        memory_mib: role.sizing.memory_mib,
        ..Record::begun(&id, "", &socket)
    };
    record.write(&record::directory(&config.run_dir, &id))?;
    let name = RefCell::new(id.clone());
    let served = wait_and_serve(&config, &role, record, &name);
    if !matches!(served, Ok(true)) {
        // It never became a sandbox's shim, whoever's its machine is by now.
        undo_own(&config.run_dir, &name.borrow())?;
    }
    if let Err(error) = &served {
        let _ = fs::write(config.run_dir.join("standby.log"), format!("{id}: {error:#}\n"));
    }
    served.map(drop)
}

/// Undoes what lies under `id` if it is this process's. `start` has little patience: by now another shim
/// may serve the sandbox that this one was claimed for.
fn undo_own(run_dir: &Path, id: &str) -> Result<()> {
    let record = Record::read(&record::directory(run_dir, id))?;
    let me = ProcessId::of(std::process::id())?;
    match record.filter(|record| record.shim == Some(me)) {
        Some(record) => Ok(teardown::undo(run_dir, &record)?),
        None => Ok(()),
    }
}

/// Whether it has become a sandbox's shim. `name` is under which id its record lies.
fn wait_and_serve(
    config: &Config,
    role: &Role,
    record: Record,
    name: &RefCell<String>,
) -> Result<bool> {
    std::thread::sleep(DELAY);
    // One is prepared at a time.
    let lock = File::create(config.run_dir.join("standby.lock"))?;
    let Ok(turn) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else { return Ok(false) };
    if waiting(config, &role.class) >= config.standby {
        return Ok(false);
    }
    fs::create_dir_all(folder(config, &role.class))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match keep(config, role, record, name, turn).await? {
            Some(start) => serve::serve(config.clone(), start).await.map(|()| true),
            None => Ok(false),
        }
    })
}

/// Prepares a machine and waits; `None` when it is not wanted any more.
async fn keep(
    config: &Config,
    role: &Role,
    mut record: Record,
    name: &RefCell<String>,
    turn: Flock<File>,
) -> Result<Option<serve::Start>> {
    let (id, socket) = (record.id.clone(), record.socket.clone());
    let directory = record::directory(&config.run_dir, &id);
    let preparing =
        tokio::time::timeout(PREPARATION, prepare(config, role.sizing, &id, &directory));
    let standby = preparing.await.context("preparing the machine took too long")??;
    record.vmm = u32::try_from(standby.vm.pid()).ok().and_then(|pid| ProcessId::of(pid).ok());
    record.cloned = Some(true);
    record.write(&directory)?;
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket)?;
    drop(turn);
    let claimed = wait(config, role, &standby, &listener, |terms| {
        fs::remove_file(&socket)?;
        let target = record::directory(&config.run_dir, &terms.id);
        Record::rename(&directory, &target)
            .with_context(|| format!("rename {} to {}", directory.display(), target.display()))?;
        // From here on it is the sandbox's: should either side or both die now, it is found by this name.
        name.replace(terms.id.clone());
        failpoint::hold(&config.run_dir, "keeper.named");
        let Terms { id, namespace, socket, .. } = terms.clone();
        Ok(Record { id, namespace, socket, ..record.clone() }.write(&target)?)
    });
    let Some((terms, listener)) = claimed.await? else { return Ok(None) };
    failpoint::hold(&config.run_dir, "keeper.claimed");
    std::env::set_current_dir(&terms.bundle)?;
    sys::set_command_line(&format!(
        "containerd-shim-joey-v2 -namespace {} -id {} -address {}",
        terms.namespace, terms.id, terms.address
    ));
    let since_boot = terms.since_boot;
    let invocation = Invocation::of_terms(terms)?;
    let home = role.home.clone();
    let standby = Some(standby);
    Ok(Some(serve::Start { home, invocation, listener, since_boot, standby }))
}

/// Clones and rehearses.
async fn prepare(config: &Config, sizing: Sizing, id: &str, directory: &Path) -> Result<Standby> {
    let tap = ParkedTap::make()?;
    let spec = VmSpec {
        id: id.to_owned(),
        vcpus: sizing.vcpus,
        memory_mib: sizing.memory_mib,
        tap: Some(tap.descriptor()?),
        mac: [0; 6],
        run_dir: directory.to_owned(),
        // The keeper's own.
        cgroup_procs: Vec::new(),
    };
    let settings = vmm::VmmConfig { builder: None, ..config.vmm()? };
    let started = vmm::start(&settings, spec).await?;
    oom::set_of_pod(started.vm.pid(), std::iter::empty());
    failpoint::reach(&config.run_dir, "keeper.cloned").await;
    if !started.cloned {
        bail!("there is no template to clone");
    }
    let vm: Arc<dyn vmm::Vm> = started.vm.into();
    let mut channel = GuestChannel::connect(vm.take_channel()?)?;
    let guest = Guest::nobodys(vm.clone(), &channel);
    // Even if its template has: what it shares with others until it is written is its own by then.
    let disk = rehearse(config, &guest, &mut channel.events).await?;
    let disks = guest.disks;
    failpoint::reach(&config.run_dir, "keeper.rehearsed").await;
    Ok(Standby { sizing, vm, channel, disks, disk, tap })
}

/// Waits for a claim.
async fn wait(
    config: &Config,
    role: &Role,
    standby: &Standby,
    listener: &UnixListener,
    take: impl Fn(&Terms) -> Result<()>,
) -> Result<Option<(Terms, std::os::unix::net::UnixListener)>> {
    let mut lost = standby.channel.lost.clone();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let claimed = claim::answer(accepted?.0.into_std()?, &take)?;
                if claimed.is_some() {
                    return Ok(claimed);
                }
            }
            how = standby.vm.exited() => bail!("the VMM ended: {how}"),
            reason = lost.wait() => bail!("the channel to the guest was lost: {reason}"),
            () = tokio::time::sleep(LOOK) => {
                let now = Config::load(None).ok().and_then(|now| class(&now, role.sizing).ok());
                let in_place = folder(config, &role.class).exists();
                if !in_place || now.as_ref() != Some(&role.class) {
                    return Ok(None);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keeper_undoes_its_own_record_alone() {
        let run = tempfile::tempdir().unwrap();
        let mut other = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        for (id, pid) in [("others", other.id()), ("own", std::process::id())] {
            let shim = ProcessId::of(pid).ok();
            let record = Record { shim, ..Record::begun(id, "", Path::new("")) };
            record.write(&record::directory(run.path(), id)).unwrap();
            undo_own(run.path(), id).unwrap();
        }
        undo_own(run.path(), "nobodys").unwrap();
        let left: Vec<_> = Record::all(run.path()).unwrap().into_iter().map(|it| it.id).collect();
        assert_eq!(left, ["others"]);
        assert!(other.try_wait().unwrap().is_none(), "it lives");
        other.kill().unwrap();
        other.wait().unwrap();
    }
}

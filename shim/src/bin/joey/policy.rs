//! `joey policy`: who may reach whom, as files; what is in force, and what it does to a packet.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Subcommand};
use joey_ebpf::policy::maps::Maps;
use joey_shim::config::Config;
use joey_shim::policy::Change;
use joey_shim::policy::apply::{Applied, apply, rehearse};
use joey_shim::policy::document::{Documents, MOST_BYTES};
use joey_shim::policy::explain::{Oracle, Question, parse_port};
use joey_shim::policy::state::Store;
use joey_shim::services::{self, keeper::Keeper};

/// Bytes that files of identities may have.
pub(super) const MOST_IDENTITIES: usize = 512 << 20;

#[derive(Subcommand)]
pub(crate) enum Task {
    /// Put documents in force in place of all that were: NodePolicy, NetworkPolicy, Namespace, Lists of them
    Apply {
        /// File of YAML or JSON documents; - is standard input. May be repeated
        #[arg(short, long = "filename", required = true)]
        files: Vec<PathBuf>,
        /// Check and compile, change nothing
        #[arg(long)]
        dry_run: bool,
        /// Have NetworkPolicies that are refused isolate what they select, instead of refusing all
        #[arg(long)]
        isolate_refused: bool,
    },
    /// What is in force
    Show,
    /// What would happen to a packet, and why; succeeds if it would be let through
    Test(Test),
}

#[derive(Args)]
pub(crate) struct Test {
    /// The pod that the question is about, namespace/name
    #[arg(long, required_unless_present = "from")]
    pod: Option<String>,
    /// Who opens: an address or a pod
    #[arg(long, conflicts_with = "pod")]
    from: Option<String>,
    /// The other side: an address or a pod
    #[arg(long)]
    to: String,
    /// What is opened: 443/tcp, 53/udp, icmp
    #[arg(long)]
    port: String,
    /// Ask these documents and not those in force; may be repeated
    #[arg(short, long = "filename")]
    files: Vec<PathBuf>,
    /// The other side opens, on the pod's port
    #[arg(long, requires = "pod")]
    inbound: bool,
}

pub(crate) fn run(config: &Config, task: &Task, json: bool) -> Result<bool> {
    match task {
        Task::Apply { files, dry_run, isolate_refused } => {
            let mut documents = documents(files)?;
            if *isolate_refused {
                documents.isolate_refused();
            }
            let count = documents.0.len();
            ensure!(
                count > 0,
                "there are no documents in the files; one with spec: {{}} is a policy"
            );
            let change = Change::Policy(documents);
            let applied = if *dry_run { rehearse(config, change)? } else { apply(config, change)? };
            if !dry_run {
                // Which services are shared is said there.
                let mut services = Keeper::new(&config.run_dir, &config.state_dir);
                services.apply(&services::keeper::Change::Restore).context(
                    "the policy is in force, but not what it says of shared services: apply these anew",
                )?;
            }
            let plural = if count == 1 { "" } else { "s" };
            told(&applied, &format!("{count} document{plural}"), *dry_run, json);
        }
        Task::Show => show(config, json)?,
        Task::Test(test) => return ask(config, test, json),
    }
    Ok(true)
}

/// The documents of the files.
fn documents(files: &[PathBuf]) -> Result<Documents> {
    let mut documents = Documents::default();
    for (name, text) in read(files, MOST_BYTES)? {
        documents.read(&name, &text)?;
    }
    ensure!(
        !documents.0.is_empty(),
        "there are no documents in the files; one of kind NodePolicy with spec: {{}} is a policy"
    );
    Ok(documents)
}

/// The files' names and contents.
pub(super) fn read(files: &[PathBuf], most: usize) -> Result<Vec<(String, String)>> {
    let one = |path: &PathBuf| {
        let (name, mut text) = (path.display().to_string(), String::new());
        let bound = most as u64 + 1;
        if path == Path::new("-") {
            let input = std::io::stdin().lock();
            input.take(bound).read_to_string(&mut text).context("read standard input")?;
        } else {
            let file = std::fs::File::open(path).with_context(|| format!("read {name}"))?;
            file.take(bound).read_to_string(&mut text).with_context(|| format!("read {name}"))?;
        }
        ensure!(
            text.len() <= most,
            "{name} has more than {most} bytes, more than any such file needs"
        );
        Ok((name, text))
    };
    files.iter().map(one).collect()
}

/// Tells what was applied.
pub(super) fn told(applied: &Applied, what: &str, dry_run: bool, json: bool) {
    let Applied { epoch, identities, rules, took, ref warnings } = *applied;
    for warning in warnings.iter().filter(|_| !json) {
        println!("WARNING {warning}");
    }
    let milliseconds = took.as_secs_f64() * 1000.0;
    if json {
        let epoch = (!dry_run).then_some(epoch);
        println!(
            "{}",
            serde_json::json!({
                "epoch": epoch, "warnings": warnings, "identities": identities, "rules": rules, "milliseconds": milliseconds,
            })
        );
    } else if dry_run {
        println!(
            "fine: {what}, which makes {identities} identities and {rules} rules; nothing was changed"
        );
    } else {
        println!(
            "in force: {what}, in epoch {epoch} with {identities} identities and {rules} rules; {milliseconds:.1} ms"
        );
    }
}

fn show(config: &Config, json: bool) -> Result<()> {
    let store = Store::new(&config.state_dir);
    let (policy, table) = (store.policy()?, store.identities()?);
    let read = policy.epoch.max(table.epoch);
    let maps = match Maps::open(&config.bpf_dir) {
        Ok(maps) => Some(maps),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).context("open the policy's maps"),
    };
    let active = maps.as_ref().map(Maps::active).transpose()?;
    let in_force = active.is_some_and(|active| active.epoch >= read);
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for document in &policy.content.0 {
        let kind = document.object.get("kind").and_then(serde_json::Value::as_str);
        *kinds.entry(kind.unwrap_or("unknown")).or_default() += 1;
    }
    let mut tenants: BTreeMap<&str, usize> = BTreeMap::new();
    for entry in &table.content.entries {
        *tenants.entry(entry.tenant()).or_default() += 1;
    }
    let when = |at: u64| (at != 0).then_some(at);
    if json {
        println!(
            "{}",
            serde_json::json!({
                "in_force": in_force, "loaded": active.is_some(),
                "epoch": active.map(|active| active.epoch),
                "generation": active.map(|active| active.generation),
                "policy": {"applied": when(policy.at), "epoch": policy.epoch, "documents": policy.content.0},
                "identities": {
                    "applied": when(table.at), "epoch": table.epoch,
                    "entries": table.content.entries.len(), "namespaces": table.content.namespaces.len(),
                    "tenants": tenants,
                },
            })
        );
        return Ok(());
    }
    match active {
        None => println!("The policy is not loaded on this node; `joey ebpf load` does that."),
        Some(active) if !in_force => println!(
            "Epoch {} is in force, but {read} was written down: a step was interrupted. The next puts it in force.",
            active.epoch
        ),
        Some(active) => {
            println!("Epoch {} is in force (generation {}).", active.epoch, active.generation)
        }
    }
    println!("policy      applied {}", ago(policy.at));
    for (kind, count) in kinds {
        println!("            {count} {kind}");
    }
    for document in &policy.content.0 {
        let field = |field: &str| {
            let field = document.object.pointer(field).and_then(serde_json::Value::as_str);
            field.unwrap_or_default().to_owned()
        };
        let space = field("/metadata/namespace");
        let joint = if space.is_empty() { "" } else { "/" };
        let name = format!("{space}{joint}{}", field("/metadata/name"));
        println!("            - {} {name} ({})", field("/kind"), document.source);
    }
    println!("identities  applied {}", ago(table.at));
    println!("            {} addresses of {} tenants", table.content.entries.len(), tenants.len());
    for (tenant, count) in tenants {
        println!("            - {tenant}: {count}");
    }
    Ok(())
}

/// A moment, as far away as it is.
pub(super) fn ago(at: u64) -> String {
    if at == 0 {
        return "never".to_owned();
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.unwrap_or_default().as_secs().saturating_sub(at);
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// Addresses of one side: those of a pod, or the one that is given.
fn addresses(oracle: &Oracle, side: &str) -> Result<Vec<IpAddr>> {
    if let Ok(address) = side.parse() {
        return Ok(vec![address]);
    }
    let found = oracle.addresses(side);
    ensure!(
        !found.is_empty(),
        "{side:?} is no address, and no pod of this name is on this node or among the identities"
    );
    Ok(found)
}

fn ask(config: &Config, test: &Test, json: bool) -> Result<bool> {
    let (mut proto, port) = parse_port(&test.port).map_err(anyhow::Error::msg)?;
    let change = match test.files.is_empty() {
        true => Change::Restore,
        false => Change::Policy(documents(&test.files)?),
    };
    let oracle = Oracle::open(config, change)?;
    let one = test.pod.as_deref().or(test.from.as_deref()).unwrap_or_default();
    let (one, other) = (addresses(&oracle, one)?, addresses(&oracle, &test.to)?);
    let family = |a: &IpAddr, b: &IpAddr| a.is_ipv4() == b.is_ipv4();
    let pair = one.iter().find_map(|a| Some((*a, *other.iter().find(|b| family(a, b))?)));
    let Some((one, other)) = pair else {
        bail!("the two sides have no addresses of one family: {one:?} and {other:?}");
    };
    if proto == 1 && one.is_ipv6() {
        proto = 58;
    }
    let (from, to) = if test.inbound { (other, one) } else { (one, other) };
    let judged = oracle.ask(&Question { from, to, proto, port });
    ensure!(
        !judged.is_empty(),
        "neither {from} nor {to} is a pod of this node or among the identities: no wire judges this"
    );
    let allowed = judged.iter().all(|judged| judged.allowed);
    if json {
        let stale = oracle.is_stale();
        println!(
            "{}",
            serde_json::json!({
                "from": from, "to": to, "port": test.port, "allowed": allowed, "stale": stale,
                "judged": judged,
            })
        );
        return Ok(allowed);
    }
    if oracle.is_stale() {
        println!(
            "What was written down last is not in force yet: a step was interrupted. This is of it."
        );
    }
    println!("{from} opens {} of {to}: {}", test.port, if allowed { "allowed" } else { "refused" });
    for judged in judged {
        let here = if judged.here { "" } else { ", not on this node" };
        let verdict = if judged.allowed { "allowed" } else { "refused" };
        println!("  {} of {} (tenant {}{here}): {verdict}", judged.way, judged.pod, judged.tenant);
        println!("    the peer is {}", judged.peer);
        for why in judged.why {
            println!("    {why}");
        }
    }
    Ok(allowed)
}

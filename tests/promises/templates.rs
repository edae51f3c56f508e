//! Templates may be damaged, missing or impossible to build: pods start all the same, or say why not.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use joey_tests::pod::SOON;

use crate::context::{Context, Test, holds, refused, same, skip};
use crate::faults;

pub const TESTS: &[Test] = &[
    Test { name: "templates::damaged_is_replaced", run: damaged_is_replaced },
    Test { name: "templates::clones_without_checkpoint", run: clones_without_checkpoint },
    Test { name: "templates::builders_take_turns", run: builders_take_turns },
    Test { name: "templates::full_disk_is_told", run: full_disk_is_told },
    Test { name: "templates::unusable_vmm_is_told", run: unusable_vmm_is_told },
    Test { name: "templates::check_says_what_is_missing", run: check_says_what_is_missing },
];

/// By then a pod's shim has the next machine prepared.
const PREPARED: Duration = Duration::from_secs(5);

/// The node's template of the usual size as `joey template ls` shows it: other tests may have some of other
/// sizes built beside.
pub fn list(ctx: &Context<'_>) -> Result<Vec<String>> {
    let text = ctx.node.joey(&["--json", "template", "ls"])?;
    let all: Vec<serde_json::Value> = serde_json::from_str(&text)?;
    let usual = all.iter().filter(|one| one["vcpus"] == 1 && one["memory_mib"] == 256);
    Ok(usual.filter_map(|one| one["key"].as_str().map(str::to_owned)).collect())
}

/// Runs a pod that no waiting machine serves; whether it was cloned.
pub fn cloned(ctx: &Context<'_>) -> Result<bool> {
    ctx.node.joey(&["standby", "rm"])?;
    let pod = ctx.pod("template")?;
    let seen = ctx.node.joey(&["--json", "inspect", &pod.id])?;
    let seen: serde_json::Value = serde_json::from_str(&seen)?;
    same("the pod's output", pod.script("echo ok")?.text(), "ok")?;
    pod.remove()?;
    seen["record"]["cloned"].as_bool().context("the record does not say whether it was cloned")
}

/// Where the node's templates are.
pub fn folder(ctx: &Context<'_>) -> PathBuf {
    ctx.node.dir().join("joey/templates")
}

fn damaged_is_replaced(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    ctx.node.joey(&["template", "build"])?;
    let keys = list(ctx)?;
    let [key] = keys.as_slice() else { bail!("one template was expected: {keys:?}") };
    same("cloned before", cloned(ctx)?, true)?;
    // A machine that is being prepared would have the damage found before this test looks.
    std::thread::sleep(PREPARED);
    ctx.node.joey(&["standby", "rm"])?;
    let state = folder(ctx).join(key).join("state");
    let mut bytes = fs::read(&state)?;
    let middle = bytes.len() / 2;
    *bytes.get_mut(middle).context("the state is empty")? ^= 1;
    fs::write(&state, bytes)?;
    let table = ctx.node.joey(&["template", "ls"])?;
    holds("joey template ls", &table, "the content of state has changed")?;
    same("cloned from a damaged template", cloned(ctx)?, false)?;
    // The shim had another one built.
    let end = Instant::now() + 2 * SOON;
    while list(ctx)?.is_empty() {
        ensure!(Instant::now() < end, "no template was built beside the pod");
        std::thread::sleep(Duration::from_millis(200));
    }
    same("cloned after", cloned(ctx)?, true)
}

/// Clones of a template that has no checkpoint of QEMU, as none has under KVM, start QEMU anew.
fn clones_without_checkpoint(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    ctx.node.joey(&["template", "build"])?;
    let keys = list(ctx)?;
    let [key] = keys.as_slice() else { bail!("one template was expected: {keys:?}") };
    let path = folder(ctx).join(key).join("manifest.json");
    let text = fs::read_to_string(&path)?;
    let mut manifest: serde_json::Value = serde_json::from_str(&text)?;
    let files = manifest["files"].as_object_mut().context("the manifest has no files")?;
    let Some(_) = files.remove("process") else {
        return skip("the node has KVM, where no template has a checkpoint");
    };
    let continued = |ctx: &Context<'_>| -> Result<bool> {
        ctx.node.joey(&["standby", "rm"])?;
        let pod = ctx.pod("continued")?;
        let vmm = faults::vmm(ctx, &pod)?;
        let program = fs::read_link(format!("/proc/{vmm}/exe"))?;
        same("the pod's output", pod.script("echo ok")?.text(), "ok")?;
        pod.remove()?;
        Ok(program.ends_with(format!("{key}/process")))
    };
    same("continued", continued(ctx)?, true)?;
    fs::write(&path, serde_json::to_vec(&manifest)?)?;
    let without = continued(ctx);
    fs::write(&path, text)?;
    same("continued without a checkpoint", without?, false)?;
    same("continued again", continued(ctx)?, true)
}

fn builders_take_turns(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let keys = list(ctx)?;
    for key in &keys {
        // Cut short, as by a full disk: found by its size.
        let memory = folder(ctx).join(key).join("memory");
        fs::File::options().write(true).open(memory)?.set_len(1 << 20)?;
    }
    let built: Vec<Result<String>> = std::thread::scope(|scope| {
        let builders: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| ctx.node.joey(&["--json", "template", "build"])))
            .collect();
        let joined = builders.into_iter().map(std::thread::ScopedJoinHandle::join);
        joined.map(|one| one.unwrap_or_else(|_| bail!("a builder's thread panicked"))).collect()
    });
    for one in built {
        one?;
    }
    same("templates", list(ctx)?, keys)?;
    same("cloned after", cloned(ctx)?, true)
}

/// Runs `joey` with a configuration of its own; its output, and whether it succeeded.
fn joey_with(ctx: &Context<'_>, config: &str, arguments: &[&str]) -> Result<(bool, String)> {
    let path = ctx.node.dir().join("other.toml");
    fs::write(&path, config)?;
    let mut command = Command::new(joey_tests::paths::joey());
    command.arg("--config").arg(&path).args(arguments);
    let output = ctx.node.run_inside(command);
    fs::remove_file(&path)?;
    let output = output?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

/// Full of the machine's memory, and a moment before the end, of its state.
fn full_disk_is_told(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    ["64m", "262400k"].into_iter().try_for_each(|room| build_within(ctx, room).context(room))
}

fn build_within(ctx: &Context<'_>, room: &'static str) -> Result<()> {
    let full = ctx.node.dir().join("full");
    fs::create_dir(&full)?;
    let run = |program: &str, arguments: &[&str]| -> Result<()> {
        let mut command = Command::new(program);
        command.args(arguments).arg(&full);
        ensure!(ctx.node.run_inside(command)?.status.success(), "{program} {arguments:?}");
        Ok(())
    };
    run("mount", &["-t", "tmpfs", "-o", &format!("size={room}"), "joey-full"])?;
    let normal = fs::read_to_string(ctx.node.dir().join("joey.toml"))?;
    let config: String = normal
        .lines()
        .map(|line| match line.strip_prefix("state_dir") {
            Some(_) => format!("state_dir = \"{}\"\n", full.display()),
            None => format!("{line}\n"),
        })
        .collect();
    let outcome = joey_with(ctx, &config, &["template", "build"]).and_then(|(built, text)| {
        same("built", built, false)?;
        holds("the error", &text, "No space left on device")?;
        holds("the error", &text, &full.display().to_string())?;
        let mut find = Command::new("find");
        find.arg(&full).args(["-name", "*.new", "-o", "-name", "memory"]);
        let left = ctx.node.run_inside(find)?.stdout;
        same("left behind", String::from_utf8_lossy(&left), "")
    });
    run("umount", &[])?;
    fs::remove_dir(&full)?;
    outcome
}

fn unusable_vmm_is_told(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let (path, old) = (ctx.node.dir().join("joey.toml"), ctx.node.dir().join("old-qemu"));
    let normal = fs::read_to_string(&path)?;
    fs::write(&old, "#!/bin/sh\necho QEMU emulator version 7.2.0\n")?;
    fs::set_permissions(&old, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let cases = [("/nonexistent/qemu", "/nonexistent/qemu"), (&*old.to_string_lossy(), "7.2.0")];
    let outcome = cases.into_iter().try_for_each(|(qemu, told)| {
        let config = format!("qemu = \"{qemu}\"\n{normal}");
        let (able, text) = joey_with(ctx, &config, &["check"])?;
        same("able", able, false)?;
        holds("joey check", &text, told)?;
        fs::write(&path, config)?;
        refused("a pod", ctx.pod("no-vmm"), told)
    });
    fs::write(&path, normal)?;
    fs::remove_file(&old)?;
    outcome
}

fn check_says_what_is_missing(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let normal = fs::read_to_string(ctx.node.dir().join("joey.toml"))?;
    for (line, told) in
        [("", None), ("disk_dir = \"/proc/disks\"", Some(("pods' disks", "/proc/disks")))]
    {
        let arguments = ["--json", "check"];
        let (able, text) = joey_with(ctx, &format!("{line}\n{normal}"), &arguments)?;
        same("able", able, told.is_none()).with_context(|| text.clone())?;
        let seen: serde_json::Value = serde_json::from_str(&text)?;
        same("able, as told", seen["able"].as_bool(), Some(able))?;
        let all = seen["findings"].as_array().context("no findings")?;
        let missing: Vec<_> = all.iter().filter(|one| one["level"] == "missing").collect();
        let told: Vec<_> = told.into_iter().collect();
        same("missing", missing.len(), told.len()).with_context(|| text.clone())?;
        for (one, (what, word)) in missing.into_iter().zip(told) {
            same("what is missing", one["what"].as_str(), Some(what))?;
            holds("what was found", &one["found"].to_string(), word)?;
        }
        for what in ["taps", "pods' disks"] {
            ensure!(all.iter().any(|one| one["what"] == what), "nothing is told of {what}: {text}");
        }
    }
    Ok(())
}

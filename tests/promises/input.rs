//! Bad input gets a clear error and leaves nothing behind.

use std::fs;

use anyhow::Result;
use joey_tests::pod::{self, Pod};
use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{Mount, PodSandboxConfig, SecurityProfile};

use crate::context::{Context, Test, refused, same};

pub const TESTS: &[Test] = &[
    Test { name: "input::missing_command", run: missing_command },
    Test { name: "input::bad_annotations", run: bad_annotations },
    Test { name: "input::long_argument", run: long_argument },
    Test { name: "input::huge_argument_list", run: huge_argument_list },
    Test { name: "input::unknown_seccomp_action", run: unknown_seccomp_action },
    Test { name: "input::mount_outside_root", run: mount_outside_root },
    Test { name: "input::odd_host_mount", run: odd_host_mount },
];

fn missing_command(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("nocommand")?;
    let result = pod.start(&pod::container("c", &["/no/such/command"]));
    refused("missing command", result, "no such file")?;
    same("pod lives on", pod.script("echo ok")?.text(), "ok")?;
    pod.remove()
}

fn annotated(ctx: &Context<'_>, key: &str, value: &str) -> PodSandboxConfig {
    let mut config = pod::config(ctx.node, "annotated");
    config.annotations.insert(key.into(), value.into());
    config
}

fn bad_annotations(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    for (key, value) in [
        ("io.joey.vcpus", "many"),
        ("io.joey.vcpus", "0"),
        ("io.joey.vcpus", "100000"),
        ("io.joey.memory", "1Ki"),
        ("io.joey.memory", "-5"),
        ("io.joey.unknown", "x"),
    ] {
        let result = Pod::run_with(ctx.node, ctx.handler, annotated(ctx, key, value));
        refused(&format!("{key}={value}"), result, key)?;
    }
    Ok(())
}

fn long_argument(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("longarg")?;
    let long = "x".repeat(100_000);
    let mut config = pod::container("c", &["sh", "-c", "printf %s \"$1\" | wc -c"]);
    config.args = vec!["sh".into(), long];
    same("length", pod.finish(&config)?.text(), "100000")?;
    pod.remove()
}

fn huge_argument_list(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("hugeargs")?;
    let mut config = pod::container("c", &["sh", "-c", "echo $#"]);
    config.args =
        std::iter::once("sh".to_owned()).chain((0..1024).map(|_| "y".repeat(1023))).collect();
    same("count", pod.finish(&config)?.text(), "1024")?;
    same("pod lives on", pod.script("echo ok")?.text(), "ok")?;
    pod.remove()
}

fn unknown_seccomp_action(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("badseccomp")?;
    let profile = ctx.node.dir().join("seccomp.json");
    fs::write(&profile, r#"{"defaultAction": "SCMP_ACT_WISH"}"#)?;
    let mut config = pod::script("c", "true");
    pod::security(&mut config).seccomp = Some(SecurityProfile {
        profile_type: ProfileType::Localhost.into(),
        localhost_ref: profile.display().to_string(),
    });
    refused("unknown seccomp action", pod.start(&config), "SCMP_ACT_WISH")?;
    fs::remove_file(profile)?;
    same("pod lives on", pod.script("echo ok")?.text(), "ok")?;
    pod.remove()
}

fn mount_outside_root(ctx: &Context<'_>) -> Result<()> {
    let pod = ctx.pod("mountout")?;
    let mut config = pod::script("c", "true");
    config.mounts.push(Mount {
        container_path: "../../../../tmp/out".into(),
        host_path: ctx.node.dir().join("joey.toml").display().to_string(),
        readonly: true,
        ..Mount::default()
    });
    // Either a clear error or a mount that stayed inside: never one outside the container's root.
    if let Ok(output) = pod.finish(&config) {
        same("exit code", output.code, 0)?;
    }
    same("pod lives on", pod.script("echo ok")?.text(), "ok")?;
    pod.remove()
}

fn odd_host_mount(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = ctx.pod("hostmount")?;
    let fifo = ctx.node.dir().join("fifo");
    let _ = fs::remove_file(&fifo);
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    let mut config = pod::script("c", "true");
    config.mounts.push(Mount {
        container_path: "/host".into(),
        host_path: fifo.display().to_string(),
        ..Mount::default()
    });
    refused("a FIFO of the host", pod.start(&config), "sockets, FIFOs and devices")?;
    pod.remove()
}

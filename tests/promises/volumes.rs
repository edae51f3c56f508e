//! Volumes as the kubelet lays them out on the host.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use joey_tests::pod;
use k8s_cri::v1::{ContainerConfig, Mount};

use crate::context::{Context, Test, same};

pub const TESTS: &[Test] = &[
    Test { name: "volumes::empty_dir", run: empty_dir },
    Test { name: "volumes::config_map_follows", run: config_map_follows },
];

/// How long the kubelet's users wait for a change, once the kubelet has made it.
const PROMPT: Duration = Duration::from_secs(2);

pub fn mounted(
    mut config: ContainerConfig,
    at: &str,
    host: &Path,
    readonly: bool,
) -> ContainerConfig {
    config.mounts.push(Mount {
        container_path: at.into(),
        host_path: host.display().to_string(),
        readonly,
        ..Mount::default()
    });
    config
}

/// The kubelet's folder for a volume of a pod.
pub fn volume(ctx: &Context<'_>, plugin: &str, name: &str) -> Result<PathBuf> {
    let number = pod::serial();
    let plugin = format!("kubelet/pods/{number}/volumes/kubernetes.io~{plugin}");
    let folder = ctx.node.dir().join(plugin).join(name);
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn empty_dir(ctx: &Context<'_>) -> Result<()> {
    let folder = volume(ctx, "empty-dir", "scratch")?;
    // As for a pod with fsGroup 3000.
    chown(&folder, None, Some(3000))?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o2777))?;
    let pod = ctx.pod("emptydir")?;
    let writer = mounted(pod::script("w", "sleep 1000"), "/scratch", &folder, false);
    let writer = pod.start(&writer)?;
    same("owner and mode", writer.sh("stat -c %g:%a /scratch")?.text(), "3000:2777")?;
    let script = "echo hello > /scratch/file; mkfifo /scratch/pipe; stat -c %g /scratch/file";
    same("a file's group", writer.sh(script)?.text(), "3000")?;
    let reader = mounted(pod::script("r", "sleep 1000"), "/elsewhere", &folder, true);
    let reader = pod.start(&reader)?;
    same("seen by another", reader.sh("cat /elsewhere/file")?.text(), "hello")?;
    same("read-only", reader.sh("touch /elsewhere/x 2>/dev/null; echo $?")?.text(), "1")?;
    writer.sh("echo more >> /scratch/file; chmod 700 /scratch")?;
    same("shared", reader.sh("cat /elsewhere/file")?.text(), "hello\nmore")?;
    writer.remove(Duration::ZERO)?;
    let later = mounted(
        pod::script("l", "cat /scratch/file; stat -c %a /scratch"),
        "/scratch",
        &folder,
        false,
    );
    same("outlives a container", pod.finish(&later)?.text(), "hello\nmore\n700")?;
    if ctx.handler != "runc" {
        same("on the host", fs::read_dir(&folder)?.count(), 0)?;
    }
    pod.remove()
}

/// Publishes files as the kubelet's AtomicWriter does.
pub fn publish(folder: &Path, version: u32, files: &[(&str, &str)]) -> Result<()> {
    let time = format!("..2026_01_01_{version}");
    let old = fs::read_link(folder.join("..data"));
    fs::create_dir(folder.join(&time))?;
    for (name, content) in files {
        fs::write(folder.join(&time).join(name), content)?;
    }
    symlink(&time, folder.join("..data_tmp"))?;
    fs::rename(folder.join("..data_tmp"), folder.join("..data"))?;
    for (name, _) in files {
        let link = folder.join(name);
        if link.symlink_metadata().is_err() {
            symlink(Path::new("..data").join(name), link)?;
        }
    }
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.starts_with("..") && files.iter().all(|(file, _)| *file != name) {
            fs::remove_file(folder.join(name))?;
        }
    }
    if let Ok(old) = old {
        fs::remove_dir_all(folder.join(old))?;
    }
    Ok(())
}

fn config_map_follows(ctx: &Context<'_>) -> Result<()> {
    let folder = volume(ctx, "configmap", "settings")?;
    publish(&folder, 1, &[("a", "one"), ("b", "bee")])?;
    let pod = ctx.pod("configmap")?;
    let container = mounted(pod::script("c", "sleep 1000"), "/config", &folder, true);
    let container = pod.start(&container)?;
    same("first", container.sh("cat /config/a /config/b")?.text(), "onebee")?;
    same("as links", container.sh("readlink /config/a")?.text(), "..data/a")?;
    let script = "cd /config; cat a c; ls -A | sort | tr '\\n' ' '; readlink ..data";
    for version in 2..5 {
        let (a, c) = (format!("a{version}"), format!("c{version}"));
        publish(&folder, version, &[("a", &a), ("c", &c)])?;
        let begun = Instant::now();
        let expected = format!("{a}{c}..2026_01_01_{version} ..data a c ..2026_01_01_{version}");
        loop {
            let text = container.sh(script)?.text();
            if text == expected {
                break;
            }
            ensure!(begun.elapsed() < PROMPT, "still {text:?}, not {expected:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    let file = container.sh("cat /config/b 2>&1")?;
    ensure!(file.code != 0, "a removed key is there: {}", file.text());
    pod.remove()
}

//! Volumes as the kubelet lays them out on the host.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use joey_tests::{paths, pod};
use k8s_cri::v1::{ContainerConfig, ContainerMetadata, Mount};

use crate::context::{Context, Test, holds, refused, same, skip};

pub const TESTS: &[Test] = &[
    Test { name: "volumes::empty_dir", run: empty_dir },
    Test { name: "volumes::huge_pages_are_refused", run: huge_pages_are_refused },
    Test { name: "volumes::config_map_follows", run: config_map_follows },
    Test { name: "volumes::sockets_in_an_empty_dir", run: sockets_in_an_empty_dir },
    Test { name: "volumes::watchers_are_told", run: watchers_are_told },
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

/// Puts the program of `tests/probe` into a container, at `/probe`.
pub fn probed(config: ContainerConfig) -> ContainerConfig {
    mounted(config, "/probe", &paths::probe(), true)
}

/// A tmpfs on a folder, as the kubelet has it for what must not be on a disk; gone when dropped.
pub struct InMemory<'a> {
    ctx: &'a Context<'a>,
    folder: &'a Path,
}

impl<'a> InMemory<'a> {
    /// Mounts it; to be dropped after the pod.
    pub fn mount(ctx: &'a Context<'a>, folder: &'a Path, options: &str) -> Result<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(folder);
        let output = ctx.node.run_inside(mount)?;
        ensure!(output.status.success(), "mount {}: {output:?}", folder.display());
        Ok(Self { ctx, folder })
    }

    /// The folder as this process reaches it: the mount is in the node's namespace.
    pub fn inside(&self) -> PathBuf {
        let path = format!("/proc/{}/root{}", self.ctx.node.holder(), self.folder.display());
        path.into()
    }
}

impl Drop for InMemory<'_> {
    fn drop(&mut self) {
        let mut unmount = Command::new("umount");
        unmount.arg(self.folder);
        let _ = self.ctx.node.run_inside(unmount);
    }
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

fn huge_pages_are_refused(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let folder = volume(ctx, "empty-dir", "huge")?;
    let mut mount = Command::new("mount");
    mount.args(["-t", "hugetlbfs", "none"]).arg(&folder);
    if !ctx.node.run_inside(mount)?.status.success() {
        return skip("the host's kernel has no huge pages");
    }
    let mounted_here = InMemory { ctx, folder: &folder };
    let pod = ctx.pod("huge")?;
    let config = mounted(pod::script("c", "true"), "/huge", &folder, false);
    refused("huge pages", pod.start(&config), "huge pages")?;
    let done = pod.remove();
    drop(mounted_here);
    done
}

/// Publishes files as the kubelet's AtomicWriter does.
pub fn publish(folder: &Path, version: u32, files: &[(&str, &str)]) -> Result<()> {
    let time = format!("..2026_01_01_{version}");
    let old = fs::read_link(folder.join("..data"));
    fs::create_dir(folder.join(&time))?;
    for (name, content) in files {
        let file = folder.join(&time).join(name);
        fs::create_dir_all(file.parent().context("a file's folder")?)?;
        fs::write(file, content)?;
    }
    symlink(&time, folder.join("..data_tmp"))?;
    fs::rename(folder.join("..data_tmp"), folder.join("..data"))?;
    // A key with folders in its path has a link for the first of them.
    let tops = || files.iter().filter_map(|(name, _)| name.split('/').next());
    for name in tops() {
        let link = folder.join(name);
        if link.symlink_metadata().is_err() {
            symlink(Path::new("..data").join(name), link)?;
        }
    }
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.starts_with("..") && tops().all(|top| top != name) {
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

fn sockets_in_an_empty_dir(ctx: &Context<'_>) -> Result<()> {
    let disk = volume(ctx, "empty-dir", "disk")?;
    let memory = volume(ctx, "empty-dir", "memory")?;
    let _mounted = InMemory::mount(ctx, &memory, "size=8m,mode=1777")?;
    let pod = ctx.pod("sockets")?;
    let both = |config| mounted(mounted(probed(config), "/d", &disk, false), "/m", &memory, false);
    let script = "/probe serve /d/socket & /probe serve /m/socket & wait";
    let server = pod.start(&both(pod::script("server", script)))?;
    server.wait_output("listens\nlistens\n", pod::SOON)?;
    let client = pod.start(&both(pod::script("client", "sleep 1000")))?;
    for (folder, kind) in [("/d", "disk"), ("/m", "memory")] {
        let socket = format!("{folder}/socket");
        let answer = client.exec(&["/probe", "ask", &socket, kind])?.text();
        same("the answer", answer, format!("you said {kind}"))?;
        // Whoever listened is gone; the name is not.
        let later = client.sh(&format!("stat -c %F {socket}; /probe ask {socket} more 2>&1"))?;
        holds("its name", &later.text(), "socket")?;
        holds("nobody listens", &later.text(), "Connection refused")?;
    }
    same("the server's end", server.wait(pod::SOON)?.exit_code, 0)?;
    pod.remove()
}

/// Secrets, projected and downwardAPI volumes are in the host's memory, and watched by those who use them.
fn watchers_are_told(ctx: &Context<'_>) -> Result<()> {
    let folder = |plugin| Ok::<_, anyhow::Error>((plugin, volume(ctx, plugin, "v")?));
    let folders = [folder("secret")?, folder("projected")?, folder("downward-api")?];
    let mut memories = Vec::new();
    let mut config = pod::container("c", &["/probe", "watch"]);
    for (plugin, folder) in &folders {
        let memory = InMemory::mount(ctx, folder, "size=1m,mode=1777")?;
        publish(&memory.inside(), 1, &[("key", "first"), ("deep/er/key", "first")])?;
        config = mounted(config, &format!("/{plugin}"), folder, true);
        config.command.push(format!("/{plugin}"));
        memories.push((plugin, memory));
    }
    let pod = ctx.pod("watchers")?;
    let watcher = pod.start(&probed(config.clone()))?;
    watcher.wait_output("watches", pod::SOON)?;
    config.command = vec!["sleep".into(), "1000".into()];
    config.log_path = "other.log".into();
    config.metadata = Some(ContainerMetadata { name: "other".into(), attempt: 0 });
    let other = pod.start(&config)?;
    for (plugin, memory) in &memories {
        let look = format!(
            "cd /{plugin}; cat key deep/er/key; for l in key deep ..data; do readlink $l; done"
        );
        let layout = |version: u32, text: &str| {
            format!("{text}{text}..data/key\n..data/deep\n..2026_01_01_{version}")
        };
        same("before", other.sh(&look)?.text(), layout(1, "first"))?;
        publish(&memory.inside(), 2, &[("key", "second"), ("deep/er/key", "second")])?;
        watcher.wait_output(&format!("/{plugin}: second"), PROMPT)?;
        same("after", other.sh(&look)?.text(), layout(2, "second"))?;
        let write = other.sh(&format!("echo x 2>&1 > /{plugin}/key"))?;
        ensure!(write.code != 0, "{plugin} was written to");
    }
    same("the watcher's end", watcher.wait(pod::SOON)?.exit_code, 0)?;
    pod.remove()
}

//! A test node: a private containerd with its own namespaces, folders, network and images.
//!
//! Everything is below one folder and one pid namespace. `Node::up` starts it, `down` ends it and names
//! what was left behind. A node made by `cargo xtask node up` outlives the command; one made by the tests
//! ends with the test runner even if that is killed.

pub mod cgroups;
pub mod config;
pub mod holder;
pub mod traces;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use self::config::Version;
use self::traces::Traces;
use crate::cri::Cri;
use crate::{image, paths};

/// Where all nodes live: short, as sockets' paths have little room.
const NODES: &str = "/tmp/joey-node";

/// A running node.
pub struct Node {
    /// The containerd release it runs.
    pub version: Version,
    /// Connection to its containerd.
    pub cri: Cri,
    dir: PathBuf,
    holder: u32,
    holder_child: Mutex<Option<Child>>,
    containerd: Mutex<Option<Child>>,
    snapshotter: Mutex<Option<Child>>,
    network: Mutex<Option<Child>>,
}

/// How a node is started.
pub struct Options<'a> {
    /// The containerd release.
    pub version: Version,
    /// Short name; names folder and cgroup.
    pub name: &'a str,
    /// The `joey-node` binary, which is also the holder.
    pub tool: &'a Path,
    /// End the node with this process.
    pub tied: bool,
}

impl Node {
    /// Starts a node and imports the standard images.
    pub fn up(options: &Options<'_>) -> Result<Self> {
        sweep();
        let dir = folder(options.name);
        if dir.join("holder").exists() {
            bail!("node {} is up already: end it with `cargo xtask node down`", options.name);
        }
        for folder in ["cni", "jrun", "joey", "logs"] {
            fs::create_dir_all(dir.join(folder))?;
        }
        let containerd = config::containerd(options.version, &dir, config::OVERLAYFS);
        fs::write(dir.join("config.toml"), containerd)?;
        fs::write(dir.join("cni/10-joey.conflist"), config::cni(&dir))?;
        fs::write(dir.join("joey.toml"), config::joey(&dir))?;
        fs::write(dir.join("snapshotter.toml"), config::snapshotter(&dir))?;
        fs::write(dir.join("policy.yaml"), config::POLICY)?;
        fs::write(dir.join("version"), options.version.name())?;
        let child = holder::spawn(options.tool, options.tied)?;
        fs::write(dir.join("holder"), child.id().to_string())?;
        let node = Self {
            version: options.version,
            cri: Cri::connect(&dir.join("c.sock"))?,
            holder: child.id(),
            holder_child: Mutex::new(Some(child)),
            containerd: Mutex::new(None),
            snapshotter: Mutex::new(None),
            network: Mutex::new(None),
            dir,
        };
        fs::write(node.dir.join(config::LIMITS), config::limits(&node.ctr(&["oci", "spec"])?)?)?;
        node.start_snapshotter()?;
        node.start_containerd()?;
        for archive in image::standard(&node.dir.join("images"), config::PAUSE)? {
            node.import(&archive)?;
        }
        // Once per node; without them the first pods would wait for it or boot cold.
        node.joey(&["ebpf", "load"])?;
        node.joey(&["policy", "apply", "-f", &node.dir.join("policy.yaml").to_string_lossy()])?;
        node.start_network()?;
        node.joey(&["template", "build"])?;
        Ok(node)
    }

    /// Finds a node that an earlier command started.
    pub fn attach(name: &str) -> Result<Self> {
        let dir = folder(name);
        let read = |file: &str| fs::read_to_string(dir.join(file));
        let holder = read("holder").map_err(|_| anyhow!("no node {name} is up"))?.trim().parse()?;
        Ok(Self {
            version: read("version")?.trim().parse().map_err(|error: String| anyhow!(error))?,
            cri: Cri::connect(&dir.join("c.sock"))?,
            holder,
            holder_child: Mutex::new(None),
            containerd: Mutex::new(None),
            snapshotter: Mutex::new(None),
            network: Mutex::new(None),
            dir,
        })
    }

    /// The node's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The CRI socket, for any client.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    /// Pid of the process that keeps the node's namespaces.
    pub fn holder(&self) -> u32 {
        self.holder
    }

    /// The cgroup below which the node's pods are.
    pub fn cgroup(&self) -> String {
        let name = self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        format!("/joey-node-{name}")
    }

    /// Starts joey-snapshotter (again) and waits until it serves.
    pub fn start_snapshotter(&self) -> Result<()> {
        let mut command = Command::new(paths::binaries().join("joey-snapshotter"));
        command.arg("--config").arg(self.dir.join("snapshotter.toml"));
        let child = self.serve("snapshotter", command, &self.dir.join("s.sock"))?;
        *lock(&self.snapshotter) = Some(child);
        Ok(())
    }

    /// Where `joey network serve` tells its metrics.
    pub fn metrics(&self) -> PathBuf {
        self.dir.join("jrun/metrics.sock")
    }

    /// Starts `joey network serve` (again) and waits until it serves.
    pub fn start_network(&self) -> Result<()> {
        let mut command = Command::new(paths::joey());
        command.args(["network", "serve", "--metrics"]);
        command.arg(format!("unix:{}", self.metrics().display()));
        command.env("JOEY_CONFIG", self.dir.join("joey.toml"));
        let child = self.serve("network", command, &self.dir.join("jrun/network.sock"))?;
        *lock(&self.network) = Some(child);
        Ok(())
    }

    /// Starts a daemon of the node, whose pid and log get its name, and waits until it listens.
    fn serve(&self, name: &str, mut command: Command, socket: &Path) -> Result<Child> {
        let path = self.dir.join(format!("{name}.log"));
        let log = File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("open {}", path.display()))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child = holder::spawn_inside(self.holder, command)?;
        fs::write(self.dir.join(name), child.id().to_string())?;
        cgroups::count_cpu(&format!("{}/system", self.cgroup()), child.id())?;
        let end = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            if child.try_wait()?.is_some() || Instant::now() > end {
                let text = fs::read_to_string(path);
                bail!("{name} did not come up: {}", text.unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(child)
    }

    /// Starts containerd (again) and waits until it serves the runtime interface.
    pub fn start_containerd(&self) -> Result<()> {
        let bin = paths::deps().join(format!("containerd-{}/usr/bin", self.version.name()));
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("containerd.log"))
            .context("open containerd's log")?;
        let mut command = Command::new(bin.join("containerd"));
        command
            .arg("--config")
            .arg(self.dir.join("config.toml"))
            .env(
                "PATH",
                // With a sandboxer of its own containerd 2.x looks for the shim here, too.
                format!(
                    "{}:{}:/usr/sbin:/usr/bin:/sbin:/bin",
                    bin.display(),
                    paths::binaries().display()
                ),
            )
            .env("JOEY_CONFIG", self.dir.join("joey.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = holder::spawn_inside(self.holder, command)?;
        fs::write(self.dir.join("containerd"), child.id().to_string())?;
        cgroups::count_cpu(&format!("{}/system", self.cgroup()), child.id())?;
        *lock(&self.containerd) = Some(child);
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            // The version answers before the CRI plugin is ready; a list of images does not.
            match self.cri.images() {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > end => {
                    return Err(
                        error.context(format!("containerd did not come up: {}", self.log()))
                    );
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Pid of containerd.
    pub fn containerd_pid(&self) -> Result<u32> {
        Ok(fs::read_to_string(self.dir.join("containerd"))?.trim().parse()?)
    }

    /// Ends containerd with SIGKILL, as a crash would.
    pub fn kill_containerd(&self) -> Result<()> {
        let pid = self.containerd_pid()?;
        crate::process::kill(pid)?;
        if let Some(mut child) = lock(&self.containerd).take() {
            child.wait()?;
        }
        Ok(())
    }

    /// Makes a snapshotter containerd's default, which is restarted.
    pub fn default_snapshotter(&self, name: &str) -> Result<()> {
        let text = config::containerd(self.version, &self.dir, name);
        fs::write(self.dir.join("config.toml"), text)?;
        self.kill_containerd()?;
        self.start_containerd()
    }

    /// Ends joey-snapshotter with SIGKILL, as a crash would.
    pub fn kill_snapshotter(&self) -> Result<()> {
        self.kill_daemon("snapshotter", &self.snapshotter)
    }

    /// Ends `joey network serve` with SIGKILL.
    pub fn kill_network(&self) -> Result<()> {
        self.kill_daemon("network", &self.network)
    }

    fn kill_daemon(&self, name: &str, child: &Mutex<Option<Child>>) -> Result<()> {
        let pid = fs::read_to_string(self.dir.join(name))?.trim().parse()?;
        crate::process::kill(pid)?;
        if let Some(mut child) = lock(child).take() {
            child.wait()?;
        }
        Ok(())
    }

    /// Folder of joey-snapshotter's store.
    pub fn store(&self) -> PathBuf {
        self.dir.join("snapshots")
    }

    /// Last lines of containerd's log.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.dir.join("containerd.log")).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    /// Imports an image archive.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let local: &[&str] = if self.version == Version::V2_1 { &["--local"] } else { &[] };
        let archive = archive.to_string_lossy();
        self.ctr(&[&["images", "import"], local, &[&*archive]].concat()).map(drop)
    }

    /// Runs containerd's own client; returns its standard output.
    pub fn ctr(&self, arguments: &[&str]) -> Result<String> {
        self.finish(arguments, self.ctr_command(arguments))
    }

    /// As [`Self::ctr`], with what a shell command prints as its input.
    pub fn ctr_fed(&self, feed: &str, arguments: &[&str]) -> Result<String> {
        let ctr = self.ctr_command(arguments);
        let mut command = Command::new("sh");
        command.args(["-c", &format!("({feed}) | exec \"$@\""), "sh"]);
        command.arg(ctr.get_program()).args(ctr.get_args()).stdin(Stdio::null());
        command.envs(ctr.get_envs().filter_map(|(name, value)| Some((name, value?))));
        self.finish(arguments, command)
    }

    fn finish(&self, arguments: &[&str], command: Command) -> Result<String> {
        let output = self.run_inside(command)?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("ctr {}: {}\n{text}", arguments.join(" "), output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts containerd's own client, its output into a file.
    pub fn ctr_to(&self, arguments: &[&str], file: &Path) -> Result<Child> {
        let mut command = self.ctr_command(arguments);
        command.stdout(File::create(file)?).stderr(Stdio::null());
        holder::spawn_inside(self.holder, command)
    }

    fn ctr_command(&self, arguments: &[&str]) -> Command {
        let bin = paths::deps().join(format!("containerd-{}/usr/bin", self.version.name()));
        let mut command = Command::new(bin.join("ctr"));
        command.arg("--address").arg(self.socket()).args(["-n", "k8s.io"]).args(arguments);
        // It asks the runtime what it is before it asks containerd.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", paths::binaries().display()));
        command.stdin(Stdio::null());
        command
    }

    /// Starts a command in the node's namespaces.
    pub fn spawn_inside(&self, command: Command) -> Result<Child> {
        holder::spawn_inside(self.holder, command)
    }

    /// Runs a command in the node's namespaces to its end.
    pub fn run_inside(&self, mut command: Command) -> Result<std::process::Output> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(holder::spawn_inside(self.holder, command)?.wait_with_output()?)
    }

    /// Runs `joey` with this node's configuration; returns its standard output.
    pub fn joey(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(paths::joey());
        command.args(arguments).env("JOEY_CONFIG", self.dir.join("joey.toml"));
        command.stdin(Stdio::null());
        let output = self.run_inside(command)?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("joey {}: {}\n{text}", arguments.join(" "), output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs `work` on a thread in the node's network, where pods' addresses can be reached.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        holder::in_network(self.holder, work)
    }

    /// What exists on the node now.
    pub fn traces(&self) -> Traces {
        Traces::take(self.holder, &self.dir, &self.cgroup())
    }

    /// Processes that run on the node, by pid and command line, but for machines in reserve.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let mut pids = traces::processes(self.holder);
        let keepers: Vec<u32> =
            pids.iter().copied().filter(|pid| traces::is_keeper(*pid)).collect();
        pids.retain(|pid| !traces::waits(*pid, &keepers));
        pids.into_iter().filter_map(|pid| Some((pid, traces::command(pid)?))).collect()
    }

    /// Adds a line to Joey's configuration.
    pub fn configure(&self, line: &str) -> Result<()> {
        let path = self.dir.join("joey.toml");
        let text = fs::read_to_string(&path)?;
        fs::write(path, format!("{line}\n{text}")).context("write Joey's configuration")
    }

    /// The number that a process of the node has outside of it.
    pub fn outside(&self, inside: u32) -> Option<u32> {
        traces::processes(self.holder)
            .into_iter()
            .find(|pid| traces::levels(*pid).is_some_and(|levels| levels.get(1) == Some(&inside)))
    }

    /// Removes all pods, stops containerd, ends the namespaces, removes the files; returns leaks by name.
    pub fn down(&self) -> Result<Vec<String>> {
        let mut leaks = Vec::new();
        for pod in self.cri.pods().unwrap_or_default() {
            let removed = self.cri.stop_pod(&pod).and_then(|()| self.cri.remove_pod(&pod));
            if let Err(error) = removed {
                leaks.push(format!("pod {pod} could not be removed: {error:#}"));
            }
        }
        if let Ok(pid) = self.containerd_pid() {
            crate::process::terminate(pid, Duration::from_secs(10))?;
        }
        if let Err(error) = self.joey(&["standby", "rm"]) {
            leaks.push(format!("machines in reserve: {error:#}"));
        }
        // Nobody waits for a template that is still being built.
        for pid in traces::processes(self.holder).into_iter().filter(|pid| traces::is_keeper(*pid))
        {
            crate::process::kill(pid)?;
        }
        for daemon in ["snapshotter", "network"] {
            if let Ok(pid) = fs::read_to_string(self.dir.join(daemon)) {
                crate::process::terminate(pid.trim().parse()?, Duration::from_secs(10))?;
            }
        }
        for child in [&self.containerd, &self.snapshotter, &self.network] {
            if let Some(mut child) = lock(child).take() {
                child.wait()?;
            }
        }
        let end = Instant::now() + Duration::from_secs(5);
        while !traces::processes(self.holder).is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
        }
        // What a builder had, Joey collects when the builder is gone.
        if let Err(error) = self.joey(&["template", "rm", "--stale"]) {
            leaks.push(format!("templates: {error:#}"));
        }
        leaks.extend(self.leaks_at_end());
        crate::process::terminate(self.holder, Duration::ZERO)?;
        if let Some(mut child) = lock(&self.holder_child).take() {
            child.wait()?;
        }
        cgroups::purge(&self.cgroup());
        fs::remove_dir_all(&self.dir).with_context(|| format!("remove {}", self.dir.display()))?;
        Ok(leaks)
    }

    fn leaks_at_end(&self) -> Vec<String> {
        let harmless = |name: &str| {
            // What the node itself set up; the bridge stays after its last pod.
            name.starts_with("mount /")
                && !name.contains(&*self.dir.to_string_lossy())
                && !name.contains("netns/")
                || name.starts_with("BPF object")
                || name.starts_with("network device") && !name.contains("veth")
                || name.starts_with("cgroup") && !name.contains("/pod-")
        };
        let traces = self.traces();
        traces.names().filter(|name| !harmless(name)).map(str::to_owned).collect()
    }
}

/// Removes what nodes left whose runner was killed: their processes and mounts went with the holder.
fn sweep() {
    for name in names() {
        let holder = fs::read_to_string(folder(&name).join("holder")).unwrap_or_default();
        if holder.trim().parse().is_ok_and(|pid| !crate::process::alive(pid)) {
            cgroups::purge(&format!("/joey-node-{name}"));
            let _ = fs::remove_dir_all(folder(&name));
        }
    }
}

/// Names of the nodes that are up.
pub fn names() -> Vec<String> {
    let entries = fs::read_dir(NODES).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn folder(name: &str) -> PathBuf {
    Path::new(NODES).join(name)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

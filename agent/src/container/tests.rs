//! Runs real containers on this machine, as root, in mount namespaces of their own.
//!
//! A container's child is forked without the C library's knowledge, which needs a process with one
//! thread: each test runs itself again as the only test of a fresh process, on its main thread.
//! Without root or cgroup version 2 a test says why it was skipped.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};

use super::*;
use crate::containers::ContainerEntry;
use crate::events::Events;
use crate::reap::Reaper;
use crate::storage::SlotClaim;
use crate::streams::Pumps;

const AGAIN: &str = "JOEY_CONTAINER_TEST";
const BUSYBOX: &str = "/usr/bin/busybox";
const PATH: &str = "PATH=/bin";

/// A directory with busybox as the root.
struct Bundle {
    directory: tempfile::TempDir,
}

const SOURCES: Sources = Sources { root: bind_root, bind: crate::volumes::bind_source };

fn bind_root(path: &str) -> Result<PathBuf, String> {
    mount(Some(path), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|error| error.to_string())?;
    Ok(path.into())
}

fn bundle() -> Bundle {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    for name in ["bin", "etc", "tmp", "proc", "sys", "dev", "root"] {
        fs::create_dir(root.join(name)).unwrap();
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    for name in [
        "sh", "cat", "id", "pwd", "ls", "echo", "mkdir", "stat", "sleep", "mount", "touch", "grep",
        "wc", "hostname", "tty", "env", "readlink", "dd", "stty", "head", "true",
    ] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/srv:/bin/sh\n",
    )
    .unwrap();
    fs::write(root.join("bin/garbage"), [0x7f, 0, 1, 2]).unwrap();
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(root.join("bin/garbage"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
    Bundle { directory }
}

/// A specification as containerd writes them, for a shell command.
fn spec(script: &str) -> Value {
    let caps = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", format!("exec 2>&1; {script}")], "cwd": "/",
            "env": [PATH, "A=b c"], "noNewPrivileges": true,
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps}
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}],
            "maskedPaths": ["/proc/kcore", "/proc/sys/vm/swappiness", "/proc/acpi", "/sys/firmware", "/proc/scsi", "/nowhere"],
            "readonlyPaths": ["/proc/bus", "/proc/sys", "/nowhere"]
        }
    })
}

fn parse(value: Value) -> Spec {
    serde_json::from_value(value).unwrap()
}

/// Where this machine has cgroup version 2.
fn cgroup_root() -> Option<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(Path::new)
        .find(|path| path.join("cgroup.procs").exists() && path.join("cgroup.controllers").exists())
        .map(Path::to_path_buf)
}

/// Runs the named test's body in a process of its own.
fn alone(name: &str, body: impl AsyncFnOnce(&Path)) {
    let Some(root) = cgroup_root().filter(|_| nix::unistd::geteuid().is_root()) else {
        crate::log::skipped(name, "needs root and cgroup version 2");
        return;
    };
    if !Path::new(BUSYBOX).exists() {
        crate::log::skipped(name, &format!("needs {BUSYBOX} (busybox-static)"));
        return;
    }
    if std::env::var(AGAIN).as_deref() == Ok(name) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body(&root));
        return;
    }
    let again = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("container::tests::{name}"), "--test-threads=1", "--nocapture"])
        .env(AGAIN, name)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&again.stdout) + String::from_utf8_lossy(&again.stderr);
    assert!(again.status.success(), "{text}");
}

const OUTPUT: ProcessIo = ProcessIo::Pipes([false, true, true]);
const NOTHING: ProcessIo = ProcessIo::Pipes([false; 3]);

struct Ran {
    output: String,
    status: i32,
}

fn status(pid: i32) -> i32 {
    match waitpid(Pid::from_raw(pid), None).unwrap() {
        WaitStatus::Exited(_, code) => code,
        WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
        other => panic!("{other:?}"),
    }
}

fn read_all(fd: OwnedFd) -> String {
    let mut bytes = Vec::new();
    // A terminal whose other end is closed reads as an error.
    let _ = File::from(fd).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// All of standard output, then all of standard error; a test writes to one or little to the other.
fn read_both(io: &mut AgentEnds) -> String {
    let [_, stdout, stderr] = std::mem::take(&mut io.pipes);
    read_all(stdout.unwrap()) + &read_all(stderr.unwrap())
}

fn id() -> String {
    format!("joey-test-{}", std::process::id())
}

async fn create(
    root: &Path,
    bundle: &Bundle,
    spec: Value,
    io: ProcessIo,
) -> Result<Container, Error> {
    let id = id();
    let shared_pid = spec["linux"]["namespaces"][0]
        .get("path")
        .map(|path| OwnedFd::from(File::open(path.as_str().unwrap()).unwrap()));
    let json = serde_json::to_vec(&spec).unwrap();
    let spec = parse(spec);
    Container::create(CreateRequest {
        id: &id,
        cgroup_root: root,
        spec,
        json: &json,
        rootfs: bundle.directory.path().display().to_string(),
        spares: &Spares::new(SOURCES),
        io,
        shared_pid: shared_pid.as_ref(),
    })
    .await
}

async fn try_run(root: &Path, bundle: &Bundle, spec: Value) -> Result<Ran, Error> {
    let mut container = create(root, bundle, spec, OUTPUT).await?;
    let started = container.start().await;
    let output = read_both(&mut container.io);
    let status = status(container.pid);
    container.destroy().await?;
    assert!(!container.cgroup().exists());
    started.map(|()| Ran { output, status })
}

async fn run(root: &Path, spec: Value) -> Ran {
    try_run(root, &bundle(), spec).await.unwrap()
}

async fn refusal(root: &Path, spec: Value) -> String {
    let refused = try_run(root, &bundle(), spec).await;
    assert!(!root.join(id()).exists(), "the cgroup stayed");
    refused.map(|ran| ran.output).unwrap_err().to_string()
}

#[test]
fn a_command_runs_in_its_own_world() {
    alone("a_command_runs_in_its_own_world", async |root| {
        let script = "echo $A $HOME $$; pwd; id -u; hostname; umask; ls /dev; ls /proc/self/fd; \
                      readlink /dev/fd; grep -c . /proc/mounts >/dev/null && exit 7";
        let mut value = spec(script);
        value["hostname"] = json!("inner");
        let ran = run(root, value).await;
        assert_eq!(ran.status, 7, "{}", ran.output);
        let lines: Vec<&str> = ran.output.lines().collect();
        assert_eq!(lines[..5], ["b c /root 1", "/", "0", "inner", "0022"]);
        for name in ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "shm"] {
            assert_eq!(lines.contains(&name), name != "shm", "{name} in {}", ran.output);
        }
        assert!(lines.contains(&"/proc/self/fd"));
        // 0, 1, 2 and the one that ls itself has open.
        assert!(!lines.contains(&"4"), "{}", ran.output);
    });
}

#[test]
fn user_directory_and_rights_are_as_specified() {
    alone("user_directory_and_rights_are_as_specified", async |root| {
        let script = "id -u; id -g; id -G; pwd; umask; echo $HOME; echo x > /dev/stdout; \
                      grep -E '^(Cap|NoNew)' /proc/self/status; ulimit -n; \
                      cat /proc/self/oom_score_adj; touch /x 2>&1";
        let mut value = spec(script);
        let process = &mut value["process"];
        process["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 63});
        process["cwd"] = json!("/made/here");
        process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}]);
        process["oomScoreAdj"] = json!(321);
        process["capabilities"]["ambient"] = json!(["CAP_KILL"]);
        process["capabilities"]["inheritable"] = json!(["CAP_KILL"]);
        let ran = run(root, value).await;
        let want = "1000\n1001\n1001 5 6\n/made/here\n0077\n/srv\nx\n\
                    CapInh:\t0000000000000020\nCapPrm:\t0000000000000020\n\
                    CapEff:\t0000000000000020\nCapBnd:\t0000000000000421\n\
                    CapAmb:\t0000000000000020\nNoNewPrivs:\t1\n99\n321\n";
        assert!(ran.output.starts_with(want), "{}", ran.output);
        assert!(ran.output.contains("Permission denied"), "{}", ran.output);
    });
}

#[test]
fn paths_are_hidden_and_read_only() {
    alone("paths_are_hidden_and_read_only", async |root| {
        let script = "cat /proc/sys/vm/swappiness | wc -c; ls /sys/firmware | wc -l; touch /new; \
                      echo 1 > /proc/sys/kernel/pid_max; touch /sys/x; touch /dev/ok && echo fine; \
                      touch /sys/fs/cgroup/x; cat /proc/self/cgroup | grep 0::";
        let mut value = spec(script);
        value["root"]["readonly"] = json!(true);
        let ran = run(root, value).await;
        assert!(ran.output.starts_with("0\n0\n"), "{}", ran.output);
        assert_eq!(ran.output.matches("Read-only file system").count(), 4, "{}", ran.output);
        assert!(ran.output.contains("fine\n"), "{}", ran.output);
        assert!(ran.output.contains("0::/\n"), "{}", ran.output);
    });
}

#[test]
fn seccomp_is_in_force_with_and_without_no_new_privileges() {
    alone("seccomp_is_in_force_with_and_without_no_new_privileges", async |root| {
        for no_new_privileges in [true, false] {
            let mut value = spec("mkdir /tmp/x; echo $?; grep Seccomp: /proc/self/status");
            value["process"]["noNewPrivileges"] = json!(no_new_privileges);
            value["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 28}]
            });
            let ran = run(root, value).await;
            assert!(ran.output.contains("No space left on device"), "{}", ran.output);
            assert!(ran.output.contains("Seccomp:\t2"), "{}", ran.output);
        }
    });
}

#[test]
fn bad_requests_are_refused_and_leave_nothing() {
    alone("bad_requests_are_refused_and_leave_nothing", async |root| {
        let with = |mount: Value| {
            let mut value = spec("true");
            value["mounts"].as_array_mut().unwrap().push(mount);
            value
        };
        let out = with(json!({"destination": "/../../etc", "type": "tmpfs", "source": "tmpfs"}));
        assert!(refusal(root, out).await.contains("leads out of the container's root"));
        let kind = with(json!({"destination": "/x", "type": "nosuchfs", "source": "x"}));
        assert!(refusal(root, kind).await.contains("unknown file system type \"nosuchfs\""));
        let bind = with(json!({"destination": "/x", "source": "/no/such", "options": ["bind"]}));
        assert!(refusal(root, bind).await.contains("has no \"/no/such\""));
        let option = with(json!({"destination": "/x", "type": "tmpfs", "options": ["sizzle=1"]}));
        assert!(refusal(root, option).await.contains("option \"sizzle=1\""));
        let mut missing = spec("true");
        missing["process"]["args"] = json!(["no-such-command"]);
        assert_eq!(
            refusal(root, missing.clone()).await,
            "unable to start container process: exec: \"no-such-command\": \
             executable file not found in $PATH"
        );
        missing["process"]["args"] = json!(["/bin/garbage"]);
        assert_eq!(refusal(root, missing).await, "exec /bin/garbage: exec format error");
    });
}

#[test]
fn binds_are_read_only_and_stay_inside() {
    alone("binds_are_read_only_and_stay_inside", async |root| {
        let bundle = bundle();
        let volume = tempfile::tempdir().unwrap();
        fs::write(volume.path().join("file"), "content").unwrap();
        std::os::unix::fs::symlink("/../../../../tmp", bundle.directory.path().join("link"))
            .unwrap();
        let own = volume.path().file_name().unwrap().to_string_lossy().into_owned() + "-escape";
        let script =
            format!("cat /link/{own}/file /one; touch /tmp/{own}/x; echo >> /one; echo $?");
        let mut value = spec(&script);
        let mounts = value["mounts"].as_array_mut().unwrap();
        mounts.push(
            json!({"destination": format!("/link/{own}"), "type": "bind", "source": volume.path(),
            "options": ["rbind", "rprivate", "ro"]}),
        );
        mounts.push(json!({"destination": "/one", "type": "bind",
            "source": volume.path().join("file"), "options": ["bind", "ro"]}));
        let ran = try_run(root, &bundle, value).await.unwrap();
        assert!(ran.output.starts_with("contentcontent"), "{}", ran.output);
        assert_eq!(ran.output.matches("Read-only file system").count(), 2, "{}", ran.output);
        assert!(!Path::new("/tmp").join(own).exists());
    });
}

#[test]
fn a_terminal_is_the_containers_own() {
    alone("a_terminal_is_the_containers_own", async |root| {
        let mut value = spec("tty; stty size; test -c /dev/console && echo console");
        value["process"]["terminal"] = json!(true);
        let bundle = bundle();
        let io = ProcessIo::Terminal { width: 91, height: 17 };
        let mut container = create(root, &bundle, value, io).await.unwrap();
        let master = container.io.terminal.take().unwrap();
        container.start().await.unwrap();
        let output = read_all(master);
        assert_eq!(status(container.pid), 0);
        assert_eq!(output.lines().collect::<Vec<_>>(), ["/dev/pts/0", "17 91", "console"]);
        container.destroy().await.unwrap();
    });
}

#[test]
fn exec_joins_freeze_stops_destroy_kills() {
    alone("exec_joins_freeze_stops_destroy_kills", async |root| {
        let bundle = bundle();
        let container = create(root, &bundle, spec("sleep 1000"), NOTHING).await.unwrap();
        let mut process = parse(spec("x")).process().clone().unwrap();
        // Its name is the last thing that a process gets of its program.
        let script = "until grep -x sleep /proc/1/comm; do :; done; cat /proc/self/cgroup; ls /; \
                      mkdir /from-exec; exit 3";
        process.set_args(Some(vec!["sh".into(), "-c".into(), script.into()]));
        assert_eq!(container.exec(&process, NOTHING).await.unwrap_err().kind, Kind::NotRunning);
        container.start().await.unwrap();
        assert!(container.start().await.is_err());
        let mut exec = container.exec(&process, OUTPUT).await.unwrap();
        exec.start().await.unwrap();
        let output = read_both(&mut exec.io);
        assert_eq!(status(exec.pid), 3, "{output}");
        assert!(output.starts_with("sleep\n"), "{output}");
        assert!(output.contains("0::/\n") && output.contains("\nproc\n"), "{output}");
        assert!(bundle.directory.path().join("from-exec").is_dir());
        assert_eq!(container.pids().unwrap(), [container.pid as u32]);
        container.stats().unwrap();
        container.freeze(true).await.unwrap();
        assert_eq!(container.exec(&process, NOTHING).await.unwrap_err().kind, Kind::NotRunning);
        container.freeze(false).await.unwrap();
        container.kill_all(Signal::SIGKILL).unwrap();
        assert_eq!(status(container.pid), 137);
        let stopped = container.exec(&process, NOTHING).await.unwrap_err();
        assert_eq!(stopped.to_string(), "cannot exec in a container that has stopped");
        container.destroy().await.unwrap();
        container.destroy().await.unwrap();
    });
}

#[test]
fn the_rest_of_a_shared_pid_namespace_ends_with_the_first_process() {
    alone("the_rest_of_a_shared_pid_namespace_ends_with_the_first_process", async |root| {
        let bundle = bundle();
        let mut spec = spec("sleep 1000 & exit 4");
        spec["linux"]["namespaces"][0]["path"] = json!("/proc/self/ns/pid");
        let mut container = create(root, &bundle, spec, OUTPUT).await.unwrap();
        let mut io = std::mem::take(&mut container.io);
        let reaper = Reaper::default();
        let init = reaper.adopted(Pid::from_raw(container.pid));
        tokio::spawn(reaper.run());
        let slots = SlotClaim::take(&Default::default(), &[]).unwrap();
        let devices = crate::block_devices::Users::default();
        let devices = crate::block_devices::name(&mut Spec::default(), &[], &devices).unwrap();
        let (events, _told) = Events::new();
        let process = crate::containers::Process::new(init.clone(), Pumps::default());
        let entry =
            ContainerEntry::watched("c", container, process, (slots, devices, None), true, events);
        entry.engine.start().await.unwrap();
        assert_eq!(init.wait().await.status, 4);
        while !entry.engine.pids().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // Ends only when nobody has the output open any more.
        assert_eq!(read_both(&mut io), "");
        entry.engine.destroy().await.unwrap();
    });
}

#[test]
fn big_arguments_and_big_pipes() {
    alone("big_arguments_and_big_pipes", async |root| {
        let mut value = spec("");
        let piece = "x".repeat(100_000);
        let mut arguments = vec!["sh".to_string(), "-c".into(), "echo $# ${#1}".into(), "s".into()];
        arguments.extend(std::iter::repeat_n(piece, 10));
        value["process"]["args"] = json!(arguments);
        assert_eq!(run(root, value).await.output, "10 100000\n");
        let ran = run(root, spec("dd if=/dev/zero bs=65536 count=128 2>/dev/null | cat")).await;
        assert_eq!(ran.output.len(), 8 << 20);
        let mut value = spec("true");
        value["process"]["args"] = json!(["true", "x".repeat(200_000)]);
        assert_eq!(refusal(root, value).await, "exec /bin/true: argument list too long");
    });
}

#[test]
fn devices_are_made_and_policed() {
    alone("devices_are_made_and_policed", async |root| {
        let script = "stat -c '%t:%T %a %u' /dev/my/dev; cat /dev/my/dev; cat /dev/other; \
                      head -c 3 /dev/zero | wc -c";
        let mut value = spec(script);
        value["linux"]["devices"] = json!([
            {"path": "/dev/my/dev", "type": "c", "major": 1, "minor": 11, "fileMode": 432, "uid": 3},
            {"path": "/dev/other", "type": "c", "major": 10, "minor": 235}]);
        value["linux"]["resources"] = json!({"devices": [{"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "m"}]});
        let ran = run(root, value).await;
        assert!(ran.output.starts_with("1:b 660 3\n"), "{}", ran.output);
        assert_eq!(ran.output.matches("not permitted").count(), 2, "{}", ran.output);
        assert!(ran.output.ends_with("3\n"), "{}", ran.output);
    });
}

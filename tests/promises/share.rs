//! Files of the host that a pod sees live.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use joey_tests::node::config::Version;
use joey_tests::paths;
use joey_tests::pod::{self, Pod};
use k8s_cri::v1::{Int64Value, MountPropagation};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::context::{Context, Test, holds, refused, same};
use crate::volumes::{mounted, probed, publish, volume};

pub const TESTS: &[Test] = &[
    Test { name: "share::both_sides_see_each_other", run: both_sides_see_each_other },
    Test { name: "share::owners_and_groups", run: owners_and_groups },
    Test { name: "share::read_only_is_the_hosts_word", run: read_only_is_the_hosts_word },
    Test { name: "share::read_only_all_the_way_down", run: read_only_all_the_way_down },
    Test { name: "share::large_and_many", run: large_and_many },
    Test { name: "share::more_files_than_can_be_open", run: more_files_than_can_be_open },
    Test { name: "share::one_file", run: one_file },
    Test { name: "share::later_mounts", run: later_mounts },
    Test { name: "share::server_is_confined_and_may_die", run: server_is_confined_and_may_die },
    Test { name: "share::kernel_paths_are_the_guests", run: kernel_paths_are_the_guests },
    Test { name: "share::sub_path_of_an_empty_dir", run: sub_path_of_an_empty_dir },
    Test {
        name: "share::sub_path_that_was_published_again",
        run: sub_path_that_was_published_again,
    },
    Test { name: "share::programs_run", run: programs_run },
    Test { name: "share::locks_hold_within_the_pod", run: locks_hold_within_the_pod },
    Test { name: "share::mappings_reach_the_host", run: mappings_reach_the_host },
    Test { name: "share::sub_paths_of_the_host", run: sub_paths_of_the_host },
];

/// A directory of the host.
fn directory(ctx: &Context<'_>) -> Result<PathBuf> {
    let path = ctx.node.dir().join(format!("host-path-{}", pod::serial()));
    fs::create_dir_all(&path)?;
    Ok(path)
}

fn both_sides_see_each_other(ctx: &Context<'_>) -> Result<()> {
    let folder = directory(ctx)?;
    fs::write(folder.join("ours"), "host")?;
    symlink("/etc/hostname", folder.join("link"))?;
    let pod = ctx.pod("live")?;
    let container = pod.start(&mounted(pod::script("c", "sleep 1000"), "/data", &folder, false))?;
    let other = pod.start(&mounted(pod::script("o", "sleep 1000"), "/other", &folder, false))?;
    same("the host's file", container.sh("cat /data/ours")?.text(), "host")?;
    container.sh("echo guest > /data/theirs; mkdir -p /data/a/b; echo deep > /data/a/b/c")?;
    same("on the host", fs::read_to_string(folder.join("theirs"))?.as_str(), "guest\n")?;
    same("below", fs::read_to_string(folder.join("a/b/c"))?.as_str(), "deep\n")?;
    same("in another container", other.sh("cat /other/theirs")?.text(), "guest")?;
    fs::write(folder.join("ours"), "changed on the host")?;
    fs::rename(folder.join("theirs"), folder.join("moved"))?;
    let script = "cat /data/ours; echo; ls /data | tr '\\n' ' '";
    same("at once", container.sh(script)?.text(), "changed on the host\na link moved ours")?;
    let script = "cd /data; ln moved again; mv ours a/ours; rm link; stat -c %h moved; \
                  exec 3<>moved; rm moved again; echo still >&3; ls";
    same("renames and links", container.sh(script)?.text(), "2\na")?;
    same("renamed", fs::read_to_string(folder.join("a/ours"))?.as_str(), "changed on the host")?;
    ensure!(!folder.join("moved").exists(), "removed in the guest");
    let script = "cd /data; echo 12345 > f; truncate -s 3 f; echo x >> f; cat f; \
                  touch -d '2001-02-03 04:05:06' f; mkfifo p; (echo through > p &) ; cat p";
    same("files", container.sh(script)?.text(), "123x\nthrough")?;
    same("time", fs::metadata(folder.join("f"))?.mtime(), 981_173_106)?;
    let link = "ln -s /etc/hostname /data/out; cat /data/out";
    same("links are the guest's", container.sh(link)?.text(), "live")?;
    if ctx.handler != "runc" {
        let device = container.sh("mknod /data/disk b 8 0 2>&1; echo $?")?;
        holds("no device on the host", &device.text(), "Operation not permitted")?;
    }
    pod.remove()
}

fn owners_and_groups(ctx: &Context<'_>) -> Result<()> {
    let folder = directory(ctx)?;
    // As the kubelet leaves a volume of a pod with fsGroup 2000.
    chown(&folder, Some(0), Some(2000))?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o2770))?;
    let pod = ctx.pod("owners")?;
    let mut config = mounted(pod::script("c", "sleep 1000"), "/data", &folder, false);
    let security = pod::security(&mut config);
    security.run_as_user = Some(Int64Value { value: 1000 });
    security.supplemental_groups = vec![2000];
    let container = pod.start(&config)?;
    let made = container.sh("echo x > /data/f; mkdir /data/d; stat -c %u:%g:%a /data/f; id -G")?;
    holds("made", &made.text(), "1000:2000:644")?;
    let meta = fs::metadata(folder.join("f"))?;
    same("owner on the host", (meta.uid(), meta.gid()), (1000, 2000))?;
    let meta = fs::metadata(folder.join("d"))?;
    same("directory", (meta.uid(), meta.gid(), meta.mode() & 0o7777), (1000, 2000, 0o2755))?;
    fs::write(folder.join("secret"), "x")?;
    fs::set_permissions(folder.join("secret"), fs::Permissions::from_mode(0o600))?;
    let read = container.sh("cat /data/secret 2>&1")?;
    holds("root's file", &read.text(), "Permission denied")?;
    let root = pod.start(&mounted(pod::script("r", "sleep 1000"), "/data", &folder, false))?;
    let script = "cat /data/secret; chown 5:6 /data/secret; chmod 4711 /data/secret; stat -c %u:%g:%a /data/secret";
    same("as root", root.sh(script)?.text(), "x5:6:4711")?;
    pod.remove()
}

fn read_only_is_the_hosts_word(ctx: &Context<'_>) -> Result<()> {
    let folder = directory(ctx)?;
    fs::write(folder.join("f"), "host")?;
    let mut config = pod::config(ctx.node, "readonly");
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let pod = Pod::run_with(ctx.node, ctx.handler, config)?;
    let mut config = mounted(pod::script("c", "sleep 1000"), "/data", &folder, true);
    pod::security(&mut config).privileged = true;
    let container = pod.start(&config)?;
    let plain = container.sh("cat /data/f; echo x 2>&1 > /data/f; echo $?")?;
    holds("as mounted", &plain.text(), "host")?;
    holds("as mounted", &plain.text(), "1")?;
    ctx.only_joey()?;
    let forced = "mount -o remount,rw,bind /data; echo x > /data/f; rm /data/f; echo x > /data/g";
    holds("by force", &container.sh(&format!("{{ {forced}; }} 2>&1"))?.text(), "Read-only file")?;
    same("on the host", fs::read_to_string(folder.join("f"))?.as_str(), "host")?;
    fs::write(folder.join("f"), "live")?;
    same("live", container.sh("cat /data/f")?.text(), "live")?;
    pod.remove()
}

/// What is read-only is so with all that is mounted below it (`rro`), which containerd 2 is told that it can ask for.
/// Its CRI does not pass that on for any runtime but runc.
fn read_only_all_the_way_down(ctx: &Context<'_>) -> Result<()> {
    if ctx.node.version == Version::V2_1 && ctx.handler != "runc" {
        let shim = paths::shim().display().to_string();
        let told = ctx.node.ctr(&["plugins", "inspect-runtime", "--runtime", &shim])?;
        holds("what containerd is told", &told, "\"rro\"")?;
    }
    ctx.only_joey()?;
    let folder = directory(ctx)?;
    let below = folder.join("below");
    fs::create_dir(&below)?;
    let below = below.display().to_string();
    ctx.inside("mount", &["-t", "tmpfs", "-o", "size=1m", "below", &below])?;
    let pod = ctx.pod("down")?;
    let container = pod.start(&mounted(pod::script("c", "sleep 1000"), "/data", &folder, true))?;
    let written = container.sh("for f in /data/f /data/below/f; do echo x 2>&1 > $f; done")?.text();
    let done = pod.remove();
    ctx.inside("umount", &[&below])?;
    same("writing", written.matches("Read-only file system").count(), 2)?;
    done
}

fn large_and_many(ctx: &Context<'_>) -> Result<()> {
    let folder = directory(ctx)?;
    let pod = ctx.pod("large")?;
    let container = pod.start(&mounted(pod::script("c", "sleep 1000"), "/data", &folder, false))?;
    let script = "dd if=/dev/urandom of=/data/big bs=1M count=8 2>/dev/null; sha256sum < /data/big";
    let guest = container.sh(script)?.text();
    let host = Command::new("sha256sum").arg(folder.join("big")).output()?;
    let host = String::from_utf8(host.stdout)?;
    same("content", guest.split(' ').next(), host.split(' ').next())?;
    let script = "cd /data; for n in 1 2 3 4; do (for m in $(seq 50); do echo $n-$m > f$n-$m; done) & done; \
                  wait; ls | wc -l; cat f* | sort -u | wc -l; rm f*; ls | wc -l";
    same("many", container.sh(script)?.text(), "201\n200\n1")?;
    for number in 0..1000 {
        fs::write(folder.join(format!("host-{number}")), "")?;
    }
    same("listed", container.sh("ls /data | wc -l")?.text(), "1001")?;
    pod.remove()
}

/// The guest's kernel remembers what it has seen, and the server has a file open for each.
fn more_files_than_can_be_open(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    const FILES: usize = 2400;
    let folder = directory(ctx)?;
    for number in 0..FILES {
        fs::write(folder.join(number.to_string()), "")?;
    }
    fs::write(folder.join("last"), "read")?;
    let pod = ctx.pod("crowd")?;
    let container = pod.start(&mounted(pod::script("c", "sleep 1000"), "/data", &folder, false))?;
    let found = servers(&folder.display().to_string());
    let [server] = found[..] else { anyhow::bail!("servers: {found:?}") };
    let limit =
        Command::new("prlimit").args(["--nofile=1600", "--pid", &server.to_string()]).status()?;
    ensure!(limit.success(), "prlimit");
    let script = "find /data -type f -size +1000 2>&1; cat /data/last; echo x > /data/new";
    same("all of them", container.sh(script)?.text(), "read")?;
    let open = fs::read_dir(format!("/proc/{server}/fd"))?.count();
    ensure!(open < 1200, "{open} files are still open");
    pod.remove()
}

fn one_file(ctx: &Context<'_>) -> Result<()> {
    let folder = directory(ctx)?;
    fs::write(folder.join("f"), "one")?;
    fs::write(folder.join("hidden"), "")?;
    let pod = ctx.pod("file")?;
    let config = mounted(pod::script("c", "sleep 1000"), "/data/f", &folder.join("f"), false);
    let container = pod.start(&config)?;
    let script = "cat /data/f; echo two > /data/f; ls /data";
    same("alone", container.sh(script)?.text(), "onef")?;
    same("on the host", fs::read_to_string(folder.join("f"))?.as_str(), "two\n")?;
    fs::write(folder.join("f"), "three")?;
    same("live", container.sh("cat /data/f")?.text(), "three")?;
    for (name, at, path) in [("x", "/etc", folder.join("f")), ("y", "/etc/passwd", folder)] {
        let config = mounted(pod::script(name, "true"), at, &path, false);
        refused("what is a directory on what is none", pod.start(&config), "directory")?;
    }
    pod.remove()
}

fn later_mounts(ctx: &Context<'_>) -> Result<()> {
    let folder = directory(ctx)?;
    let below = folder.join("below");
    fs::create_dir(&below)?;
    let path = folder.display().to_string();
    ctx.inside("mount", &["--bind", &path, &path])?;
    ctx.inside("mount", &["--make-shared", &path])?;
    let pod = ctx.pod("later")?;
    let mut config = mounted(pod::script("c", "sleep 1000"), "/data", &folder, false);
    for mount in &mut config.mounts {
        mount.propagation = MountPropagation::PropagationHostToContainer.into();
    }
    let container = pod.start(&config)?;
    let below = below.display().to_string();
    ctx.inside("mount", &["-t", "tmpfs", "-o", "size=1m", "later", &below])?;
    ctx.inside("sh", &["-c", &format!("echo later > {below}/f")])?;
    let seen = container.sh("cat /data/below/f")?.text();
    // A plain one finds it busy: the guest's kernel remembers what it has seen.
    ctx.inside("umount", &["-l", &below])?;
    same("seen", seen.as_str(), "later")?;
    same("gone", container.sh("ls /data/below")?.text(), "")?;
    let done = pod.remove();
    ctx.inside("umount", &[&path])?;
    done
}

/// The processes that serve a directory of the host.
pub fn servers(path: &str) -> Vec<u32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let serves = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).collect();
        words.get(1) == Some(&b"share".as_slice()) && words.get(2) == Some(&path.as_bytes())
    };
    numbers.filter(serves).collect()
}

fn server_is_confined_and_may_die(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let folder = directory(ctx)?;
    fs::write(folder.join("f"), "x")?;
    let pod = ctx.pod("served")?;
    let container = pod.start(&mounted(pod::script("c", "sleep 1000"), "/data", &folder, false))?;
    let path = folder.display().to_string();
    let found = servers(&path);
    let [server] = found[..] else { anyhow::bail!("servers: {found:?}") };
    let root: Vec<_> = fs::read_dir(format!("/proc/{server}/root"))?.flatten().collect();
    same("its root", root.len(), 1)?;
    same("its root", root[0].file_name().to_str(), Some("shared"))?;
    let status = fs::read_to_string(format!("/proc/{server}/status"))?;
    holds("privileges", &status, "NoNewPrivs:\t1")?;
    holds("a filter of system calls", &status, "Seccomp:\t2")?;
    // CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID.
    holds("capabilities", &status, "CapBnd:\t00000000000000df")?;
    holds("capabilities", &status, "CapEff:\t00000000000000df")?;
    kill(Pid::from_raw(server.cast_signed()), Signal::SIGKILL)?;
    let lost = container.sh("for n in $(seq 50); do cat /data/f 2>&1 || break; sleep 0.1; done")?;
    ensure!(lost.text().contains("not connected") || lost.text().contains("abort"), "{lost:?}");
    same("the pod goes on", container.sh("echo on")?.text(), "on")?;
    pod.remove()?;
    same("servers left", servers(&path).len(), 0)
}

fn kernel_paths_are_the_guests(ctx: &Context<'_>) -> Result<()> {
    ctx.only_joey()?;
    let pod = ctx.pod("kernel")?;
    let config = mounted(pod::script("c", "sleep 1000"), "/host-sys", "/sys".as_ref(), true);
    let container = pod.start(&mounted(config, "/host-dev", "/dev".as_ref(), false))?;
    let script = "ls /host-dev | grep -c vd; ls /host-sys | grep -c kernel";
    same("the guest's", container.sh(script)?.text(), "16\n1")?;
    let whole = mounted(pod::script("w", "sleep 1000"), "/host", "/".as_ref(), true);
    let script = "ls /host/etc | grep -cx passwd; ls /host/proc /host/sys /host/dev | grep -cE '^(1|kernel|loop0)$'";
    same("below the whole", pod.start(&whole)?.sh(script)?.text(), "1\n0")?;
    let absent = mounted(pod::script("a", "true"), "/x", "/dev/loop-control".as_ref(), false);
    refused("what the host alone has", pod.start(&absent), "the guest, whose own it is, has no")?;
    pod.remove()
}

fn sub_path_of_an_empty_dir(ctx: &Context<'_>) -> Result<()> {
    let folder = volume(ctx, "empty-dir", "work")?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777))?;
    // As the kubelet does for `subPath: a/b`.
    let pods = folder.ancestors().nth(3).context("the pod's folder")?.to_owned();
    let (part, target) = (folder.join("a/b"), pods.join("volume-subpaths/work/c/0"));
    fs::create_dir_all(&part)?;
    fs::create_dir_all(&target)?;
    if ctx.handler != "runc" {
        let pod = ctx.pod("nopart")?;
        let config = mounted(pod::script("c", "ls /part"), "/part", &target, false);
        refused("no part", pod.finish(&config), "has mounted no part of a volume")?;
        pod.remove()?;
    }
    // A node may have its kubelet's folder elsewhere.
    let link = pods.with_extension("link");
    symlink(&pods, &link)?;
    let linked = link.join(target.strip_prefix(&pods)?);
    let mut bind = Command::new("mount");
    bind.arg("--bind").arg(&part).arg(&target);
    ctx.node.run_inside(bind)?;
    let pod = ctx.pod("subpath")?;
    let whole = pod.start(&mounted(pod::script("w", "sleep 1000"), "/all", &folder, false))?;
    let config = mounted(pod::script("c", "sleep 1000"), "/part", &target, false);
    let container = pod.start(&config)?;
    container.sh("echo x > /part/f")?;
    let config = mounted(pod::script("n", "ls /part"), "/part", &linked, false);
    if ctx.handler != "runc" {
        let linked = mounted(config, "/all", &link.join(folder.strip_prefix(&pods)?), false);
        same("by a link", pod.finish(&linked)?.text(), "")?;
    }
    same("the same file", whole.sh("cat /all/a/b/f")?.text(), "x")?;
    whole.sh("mkdir /all/d; mv /all/a /all/d/; ln -s d/a /all/a; ln -s /etc /all/d/a/b/out")?;
    let later = mounted(pod::script("l", "cat /part/f; ls /all"), "/part", &target, false);
    let later = mounted(later, "/all", &folder, false);
    same("through a link inside", pod.finish(&later)?.text(), "x\na\nd")?;
    whole.sh("rm /all/a; ln -s /proc /all/a")?;
    let config = mounted(pod::script("e", "ls /part"), "/part", &target, false);
    if ctx.handler != "runc" {
        refused("not out of the volume", pod.finish(&config), "File exists")?;
    }
    container.remove(Duration::ZERO)?;
    let done = pod.remove();
    let mut unmount = Command::new("umount");
    unmount.arg(&target);
    ctx.node.run_inside(unmount)?;
    fs::remove_file(link)?;
    done
}

/// A container that is started again sees a part of a projected volume as it is then published, and nothing more.
fn sub_path_that_was_published_again(ctx: &Context<'_>) -> Result<()> {
    let folder = volume(ctx, "projected", "all")?;
    publish(&folder, 1, &[("dir/a", "old"), ("dir/b", "secret")])?;
    let pods = folder.ancestors().nth(3).context("the pod's folder")?.to_owned();
    let target = pods.join("volume-subpaths/all/c/0");
    fs::create_dir_all(&target)?;
    let place = target.display().to_string();
    let bind = || -> Result<_> {
        let part = folder.join("..data/dir").canonicalize()?.display().to_string();
        ctx.inside("mount", &["--bind", &part, &place])
    };
    let pod = ctx.pod("published")?;
    let script = "cd /part; for f in *; do echo $f $(cat $f); done";
    let seen = || -> Result<String> {
        let config = mounted(pod::script("c", script), "/part", &target, true);
        Ok(pod.finish(&config)?.text())
    };
    bind()?;
    same("at first", seen()?.as_str(), "a old\nb secret")?;
    publish(&folder, 2, &[("dir/a", "new"), ("dir/c", "more")])?;
    ctx.inside("umount", &[&place])?;
    bind()?;
    let again = seen();
    ctx.inside("umount", &[&place])?;
    same("again", again?.as_str(), "a new\nc more")?;
    pod.remove()
}

/// The kubelet mounts what a `subPath` means, or a `subPathExpr` once its variables are known.
fn sub_paths_of_the_host(ctx: &Context<'_>) -> Result<()> {
    let host = directory(ctx)?;
    fs::create_dir_all(host.join("a/b"))?;
    fs::write(host.join("a/secret"), "not this")?;
    let settings = volume(ctx, "configmap", "settings")?;
    publish(&settings, 1, &[("key", "first"), ("other", "not this")])?;
    let pods = settings.ancestors().nth(3).context("the pod's folder")?.to_owned();
    let part = |volume: &str, index: u32| pods.join(format!("volume-subpaths/{volume}/c/{index}"));
    let (folder, file) = (part("host", 0), part("settings", 1));
    fs::create_dir_all(&folder)?;
    fs::create_dir_all(file.parent().context("its folder")?)?;
    fs::write(&file, "")?;
    let bind = std::path::Path::new("--bind");
    ctx.inside("mount", &[bind, &host.join("a/b"), &folder])?;
    ctx.inside("mount", &[bind, &settings.join("..data/key").canonicalize()?, &file])?;
    let pod = ctx.pod("subpaths")?;
    let config = mounted(pod::script("c", "sleep 1000"), "/part", &folder, false);
    let container = pod.start(&mounted(config, "/etc/key", &file, true))?;
    let script = "ls -A /part | wc -l; cat /etc/key; echo from the guest > /part/f";
    same("the parts alone", container.sh(script)?.text(), "0\nfirst")?;
    same("live", fs::read_to_string(host.join("a/b/f"))?.as_str(), "from the guest\n")?;
    fs::write(host.join("a/b/f"), "from the host")?;
    same("both ways", container.sh("cat /part/f")?.text(), "from the host")?;
    // As with any runtime: who has a part of a configMap does not see it change.
    publish(&settings, 2, &[("key", "second"), ("other", "not this")])?;
    std::thread::sleep(Duration::from_millis(500));
    same("as it was", container.sh("cat /etc/key")?.text(), "first")?;
    let done = pod.remove();
    ctx.inside("umount", &[&folder])?;
    ctx.inside("umount", &[&file])?;
    done
}

fn programs_run(ctx: &Context<'_>) -> Result<()> {
    let folder = directory(ctx)?;
    let pod = ctx.pod("programs")?;
    let container = pod.start(&mounted(pod::script("c", "sleep 1000"), "/data", &folder, false))?;
    let script = "cp /bin/busybox /data/busybox; /data/busybox echo ran 2>&1";
    same("a program", container.sh(script)?.text(), "ran")?;
    pod.remove()
}

fn locks_hold_within_the_pod(ctx: &Context<'_>) -> Result<()> {
    let folder = directory(ctx)?;
    let pod = ctx.pod("locks")?;
    let mounts = |config| mounted(probed(config), "/data", &folder, false);
    let holder = ["/probe", "lock", "/data/f", "/data/release"];
    let holder = pod.start(&mounts(pod::container("holder", &holder)))?;
    holder.wait_output("locked", pod::SOON)?;
    let other = pod.start(&mounts(pod::script("other", "sleep 1000")))?;
    let lock = || Ok::<_, anyhow::Error>(other.exec(&["/probe", "lock", "/data/f"])?.text());
    same("while it is held", lock()?, "busy".to_owned())?;
    let hosts = fs::File::open(folder.join("f"))?;
    same("on the host", hosts.try_lock().is_ok(), ctx.handler != "runc")?;
    same("whatever the host does", lock()?, "busy".to_owned())?;
    hosts.unlock()?;
    fs::write(folder.join("release"), "")?;
    same("the holder's end", holder.wait(pod::SOON)?.exit_code, 0)?;
    same("after its release", lock()?, "locked".to_owned())?;
    // The kernel releases what a process had that was killed.
    fs::remove_file(folder.join("release"))?;
    let command = ["/probe", "lock", "/data/f", "/data/release"];
    let killed = pod.start(&mounts(pod::container("killed", &command)))?;
    killed.wait_output("locked", pod::SOON)?;
    same("held again", lock()?, "busy".to_owned())?;
    killed.remove(Duration::ZERO)?;
    same("after a kill", lock()?, "locked".to_owned())?;
    pod.remove()
}

fn mappings_reach_the_host(ctx: &Context<'_>) -> Result<()> {
    let folder = directory(ctx)?;
    let (file, at_host) = (folder.join("f"), || fs::read_to_string(folder.join("f")));
    fs::write(&file, "written by the host")?;
    let pod = ctx.pod("mappings")?;
    let mounts = |config| mounted(probed(config), "/data", &folder, false);
    let container = pod.start(&mounts(pod::script("c", "sleep 1000")))?;
    let read = container.exec(&["/probe", "map", "/data/f", "changed by the pod!"])?;
    same("through a mapping", read.text().as_str(), "written by the host")?;
    same("after close", at_host()?.as_str(), "changed by the pod!")?;
    fs::write(&file, "changed by the host")?;
    let command = ["/probe", "map-sync", "/data/f", "synced"];
    let open = pod.start(&mounts(pod::container("open", &command)))?;
    open.wait_output("changed by the host\nsynced\n", pod::SOON)?;
    same("after msync", at_host()?.as_str(), "syncedd by the host")?;
    let read = container.exec(&["/probe", "map", "/data/f", "S"])?;
    same("what another container mapped", read.text().as_str(), "syncedd by the host")?;
    same("while both have it", container.sh("cat /data/f")?.text(), "Syncedd by the host")?;
    open.remove(Duration::ZERO)?;
    same("in the end", at_host()?.as_str(), "Syncedd by the host")?;
    pod.remove()
}

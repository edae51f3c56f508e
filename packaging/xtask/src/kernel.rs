//! Debian's cloud kernels: fetched and unpacked, and the packet programs loaded and run on them.
//!
//! What an older kernel's verifier refuses is seen there and nowhere else, so the tests of `joey-ebpf` run as
//! the only program of a machine that QEMU emulates with that kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::command::{command, output, run, target, tee};
use crate::cpio::Cpio;
use crate::{deps, guest};

const METAPACKAGE: &str = "linux-image-cloud-amd64";
/// Releases whose kernels the programs have to load on: the oldest that Joey supports, and the guest's.
const RELEASES: [(&str, &str); 2] = [("kernel-6.1", "bookworm"), ("kernel", "bookworm-backports")];
/// Random packets there, where everything is emulated.
const PACKETS: &str = "2000";
/// What depends on the kernel: each test loads the programs anew, which takes seconds there.
const TESTS: &str = "loader:: verifier random:: table:: narrow:: events::flows limit::packets";
/// The machine's last words, before the tests' exit code.
const ENDED: &str = "the packet programs' tests ended with";
const INIT: &str = "#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs tmp /tmp
uname -r
";

/// An unpacked kernel.
pub struct Kernel {
    /// Name of the package.
    pub package: String,
    /// Its version.
    pub version: String,
    /// The kernel.
    pub vmlinuz: PathBuf,
    /// Folder of its modules.
    pub tree: PathBuf,
}

/// Downloads and unpacks the kernel of a release once; a newer one is fetched when the folder is gone.
pub fn unpack(name: &str, release: &str) -> Result<Kernel> {
    let unpacked = deps::folder().join(name);
    if !unpacked.join("root").exists() {
        eprintln!("{name}: fetching it from {release}");
        let config = deps::private_apt(name, &[release])?;
        let depends = apt_cache(&config, &["depends", METAPACKAGE])?;
        let package = depends
            .split_whitespace()
            .find(|word| word.starts_with("linux-image-") && *word != METAPACKAGE)
            .with_context(|| format!("{METAPACKAGE} depends on no kernel"))?
            .to_owned();
        let work = deps::folder().join(format!("{name}.new"));
        let _ = fs::remove_dir_all(&work);
        fs::create_dir_all(&work)?;
        run(deps::apt(Some(&config), &["download", "-qq", &package]).current_dir(&work))?;
        let deb = fs::read_dir(&work)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .context("no kernel package was downloaded")?;
        run(command("dpkg", &["-x"]).arg(&deb).arg(work.join("root")))?;
        let version = output(command("dpkg-deb", &["-f"]).arg(&deb).arg("Version"))?;
        fs::write(work.join("version"), format!("{package}\n{}\n", version.trim()))?;
        fs::remove_file(deb)?;
        let _ = fs::remove_dir_all(&unpacked);
        fs::rename(&work, &unpacked)?;
    }
    let named = fs::read_to_string(unpacked.join("version"))?;
    let (package, version) = named.trim().split_once('\n').context("kernel: no version noted")?;
    let boot = unpacked.join("root/boot");
    let vmlinuz = fs::read_dir(&boot)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-")))
        .with_context(|| format!("no kernel in {}", boot.display()))?;
    let lib = ["root/lib/modules", "root/usr/lib/modules"].map(|below| unpacked.join(below));
    let modules = lib.iter().find(|path| path.is_dir()).context("kernel package has no modules")?;
    let tree = fs::read_dir(modules)?.flatten().next().context("kernel package has no modules")?;
    Ok(Kernel {
        package: package.to_owned(),
        version: version.to_owned(),
        vmlinuz,
        tree: tree.path(),
    })
}

fn apt_cache(config: &Path, arguments: &[&str]) -> Result<String> {
    output(command("apt-cache", arguments).env("APT_CONFIG", config))
}

/// Runs the tests of the packet programs on each kernel; returns what they printed.
pub fn test_programs() -> Result<String> {
    let tests = build_tests()?;
    let initramfs = target().join("kernel-tests.cpio");
    fs::write(&initramfs, archive(&tests)?)?;
    let mut printed = String::new();
    for (name, release) in RELEASES {
        let kernel = unpack(name, release)?;
        println!("= on {} {}", kernel.package, kernel.version);
        let (text, _) = tee(&mut machine(&kernel, &initramfs))?;
        let ended = text.lines().find_map(|line| line.trim().strip_prefix(ENDED));
        let code =
            ended.with_context(|| format!("the machine with {} broke off", kernel.package))?;
        ensure!(code.trim() == "0", "the packet programs' tests failed on {}", kernel.package);
        printed.push_str(&text);
    }
    fs::remove_file(initramfs)?;
    Ok(printed)
}

/// The tests as a program that needs no libraries.
fn build_tests() -> Result<PathBuf> {
    let arguments = ["test", "--quiet", "--no-run", "--lib", "-p", "joey-ebpf", "--features"];
    let more = ["loader", "--target", guest::TARGET, "--message-format", "json"];
    let mut build = command("cargo", &arguments);
    let told = output(build.args(more).env("RUSTFLAGS", guest::static_flags()))?;
    let program = told.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message.get("executable")?.as_str()?))
    });
    program.context("cargo built no tests of joey-ebpf")
}

fn archive(tests: &Path) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    for folder in ["bin", "dev", "proc", "sys", "tmp"] {
        archive.entry(folder, 0o040_755, &[])?;
    }
    let last = format!(
        "JOEY_POLICY_PACKETS={PACKETS} /tests {TESTS} --test-threads 1\n\
         echo \"{ENDED}\" $?\necho o >/proc/sysrq-trigger\nsleep 10\n"
    );
    archive.entry("init", 0o100_755, format!("{INIT}{last}").as_bytes())?;
    archive.entry("bin/busybox", 0o100_755, &fs::read("/bin/busybox")?)?;
    archive.entry("tests", 0o100_755, &fs::read(tests)?)?;
    archive.finish()
}

/// Ends by itself: the program's end is the machine's.
fn machine(kernel: &Kernel, initramfs: &Path) -> Command {
    let mut qemu = command("timeout", &["300", "qemu-system-x86_64"]);
    qemu.args(["-accel", "tcg", "-m", "1024", "-nodefaults", "-no-reboot", "-display", "none"]);
    qemu.args(["-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1"]);
    qemu.arg("-kernel").arg(&kernel.vmlinuz).arg("-initrd").arg(initramfs).stdin(Stdio::null());
    qemu
}

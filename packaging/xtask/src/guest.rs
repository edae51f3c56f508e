//! The guest image: a Debian cloud kernel, an initramfs with the agent and the modules it loads, and the
//! small image that a waiting machine rehearses a container's start with.
//!
//! Reproducible: the same agent and kernel package give the same bytes, since the archive is written
//! here with sorted names and no times. `manifest.json` says what is in it; its digest is part of
//! every template's key.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::unistd::{Whence, lseek};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::command::{command, repository, run, target};
use crate::cpio::Cpio;
use crate::kernel::{self, Kernel};

/// The Debian release that carries the kernel.
const RELEASE: &str = "bookworm-backports";
/// Oldest kernel that serves: EROFS on file-backed mounts, cgroup v2 as the agent uses it.
const OLDEST: (u32, u32) = (6, 12);
/// What the agent's static build runs on.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Modules that the guest needs; what they depend on is found.
const MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "erofs",
    "overlay",
    "dm_verity",
    "dm_crypt",
    "xts",
    "aesni_intel",
    "sha256_ssse3",
    "quota_v2",
    "xfs",
];
/// Layout of the image; raised when the agent expects another one.
const VERSION: u32 = 1;

/// Where the image is put.
pub fn folder() -> PathBuf {
    repository().join("target/guest")
}

/// Builds the image if anything it is made of has changed.
pub fn build() -> Result<()> {
    let agent = build_agent()?;
    let kernel = unpack_kernel()?;
    let modules = Modules::find(&kernel.tree)?;
    let archive = archive(&agent, &modules, &blank()?)?;
    let (rehearsal, rehearsal_description) = rehearsal(&agent)?;
    let vmlinuz = fs::read(&kernel.vmlinuz)?;
    let manifest = serde_json::to_string_pretty(&json!({
        "version": VERSION,
        "kernel": {"package": kernel.package, "version": kernel.version, "sha256": hex(&vmlinuz)},
        "initrd": {"sha256": hex(&archive), "bytes": archive.len()},
        "rehearsal": {"sha256": hex(&rehearsal)},
        "agent": {"sha256": hex(&fs::read(&agent)?)},
        "modules": modules.files.iter().map(|(name, data)| json!({
            "name": name, "sha256": hex(data),
        })).collect::<Vec<_>>(),
    }))?;
    let out = folder();
    if fs::read_to_string(out.join("manifest.json")).is_ok_and(|old| old == manifest) {
        return Ok(());
    }
    fs::create_dir_all(&out)?;
    // The manifest goes last: a build that is cut short is seen as stale.
    let _ = fs::remove_file(out.join("manifest.json"));
    write(&out.join("vmlinuz"), &vmlinuz)?;
    write(&out.join("initrd"), &archive)?;
    write(&out.join("rehearsal"), &rehearsal)?;
    write(&out.join("rehearsal.json"), rehearsal_description.as_bytes())?;
    write(&out.join("manifest.json"), manifest.as_bytes())?;
    eprintln!(
        "guest: kernel {}, initramfs {} KiB, in {}",
        kernel.version,
        archive.len() / 1024,
        out.display()
    );
    Ok(())
}

fn write(path: &Path, data: &[u8]) -> Result<()> {
    let beside = path.with_extension("new");
    fs::write(&beside, data).with_context(|| format!("write {}", beside.display()))?;
    fs::rename(&beside, path).with_context(|| format!("rename to {}", path.display()))
}

fn hex(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn build_agent() -> Result<PathBuf> {
    let agent = build_static("joey-agent")?;
    let stripped = target().join("joey-agent.stripped");
    run(command("strip", &["--strip-all", "-o"]).arg(&stripped).arg(agent))?;
    Ok(stripped)
}

/// Has the compiler make programs that need no libraries, with nothing of this machine's paths in them.
pub fn static_flags() -> String {
    let remap = format!("--remap-path-prefix={}=joey", repository().display());
    let cargo_home = std::env::var("CARGO_HOME")
        .or_else(|_| std::env::var("HOME").map(|home| format!("{home}/.cargo")))
        .unwrap_or_default();
    format!("-C target-feature=+crt-static {remap} --remap-path-prefix={cargo_home}=cargo")
}

/// A program that needs no libraries, with nothing of this machine's paths in it.
pub fn build_static(package: &str) -> Result<PathBuf> {
    let mut build =
        command("cargo", &["build", "--quiet", "--release", "-p", package, "--target", TARGET]);
    run(build.env("RUSTFLAGS", static_flags()))?;
    Ok(target().join(TARGET).join("release").join(package))
}

/// The guest's kernel.
fn unpack_kernel() -> Result<Kernel> {
    let kernel = kernel::unpack("kernel", RELEASE)?;
    check_age(&kernel.version)?;
    Ok(kernel)
}

fn check_age(version: &str) -> Result<()> {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        bail!("kernel version {version:?} is not one");
    };
    if (major, minor) < OLDEST {
        bail!("kernel {version} is too old: {}.{} or newer is needed", OLDEST.0, OLDEST.1);
    }
    Ok(())
}

/// The modules, decompressed, in the order in which they are loaded.
struct Modules {
    files: Vec<(String, Vec<u8>)>,
}

impl Modules {
    fn find(tree: &Path) -> Result<Self> {
        let built_in = fs::read_to_string(tree.join("modules.builtin")).unwrap_or_default();
        let mut modules = Self { files: Vec::new() };
        for name in MODULES {
            modules.add(tree, &built_in, name)?;
        }
        Ok(modules)
    }

    /// Adds a module after those it depends on (`depends=` in its .modinfo section).
    fn add(&mut self, tree: &Path, built_in: &str, name: &str) -> Result<()> {
        let file = format!("{name}.ko");
        let same = |line: &str| line.rsplit('/').next().is_some_and(|last| normal(last) == file);
        if self.files.iter().any(|(known, _)| *known == file) || built_in.lines().any(same) {
            return Ok(());
        }
        let path = search(tree, &file)?
            .with_context(|| format!("kernel module {name} is not in the package"))?;
        let data = decompress(&path)?;
        for needed in depends(&data) {
            self.add(tree, built_in, &needed)?;
        }
        self.files.push((file, data));
        Ok(())
    }
}

/// Module names are the same with `-` and `_`.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn search(folder: &Path, file: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if let Some(found) = search(&path, file)? {
                return Ok(Some(found));
            }
        } else if normal(&entry.file_name().to_string_lossy()).trim_end_matches(".xz") == file {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

fn decompress(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(fs::read(path)?);
    }
    let mut xz = command("xz", &["--decompress", "--stdout"]);
    let output = xz.arg(path).output().context("start xz (package xz-utils)")?;
    if !output.status.success() {
        bail!("xz cannot decompress {}", path.display());
    }
    Ok(output.stdout)
}

fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(normal).collect()
}

/// The initramfs: directories, the agent as /init, modules and the order they are loaded in.
fn archive(agent: &Path, modules: &Modules, blank: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    for folder in ["dev", "lib", "lib/modules", "proc", "run", "sys"] {
        archive.entry(folder, 0o040_755, &[])?;
    }
    let order: String = modules.files.iter().map(|(name, _)| format!("{name}\n")).collect();
    archive.entry("init", 0o100_755, &fs::read(agent)?)?;
    archive.entry("blank", 0o100_644, blank)?;
    archive.entry("lib/modules/order", 0o100_644, order.as_bytes())?;
    for (name, data) in &modules.files {
        archive.entry(&format!("lib/modules/{name}"), 0o100_644, data)?;
    }
    archive.finish()
}

/// The disk of the container that a waiting machine runs before it is anybody's, and its description:
/// the agent alone, as joey-snapshotter would have made it.
fn rehearsal(agent: &Path) -> Result<(Vec<u8>, String)> {
    // One fixed id: the same content gives the same image.
    const UUID: &str = "6a6f6579-0000-4000-8000-726568656172";
    let work = target().join("rehearsal");
    let _ = fs::remove_dir_all(&work);
    let root = work.join("root");
    for folder in ["dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::copy(agent, root.join("agent"))?;
    let image = work.join("image");
    let options = ["--quiet", "-T0", "-U", UUID, "--all-root"];
    run(command("mkfs.erofs", &options).args([&image, &root]))?;
    let mut disk = fs::read(&image)?;
    disk.resize(disk.len().next_multiple_of(BLOCK), 0);
    let data_blocks = disk.len() / BLOCK;
    let root_hash = append_hash_tree(&mut disk);
    let description = serde_json::to_string(&json!({
        "version": 1,
        "data_blocks": data_blocks,
        "root_hash": root_hash,
        "extents": [{"file": "rehearsal", "first": 0, "blocks": disk.len() / BLOCK}],
    }))?;
    Ok((disk, description))
}

/// The blank of a pod's disk: the blocks that are not zero of an empty file system of the largest size that
/// a disk can have, each after its number. The guest takes the block groups that it needs.
///
/// No journal and no checksums, since the disk dies with its machine, and no copies of the superblock;
/// project quotas count what each container uses.
fn blank() -> Result<Vec<u8>> {
    const UUID: &str = "6a6f6579-0000-4000-8000-00626c616e6b";
    const FEATURES: &str = "^has_journal,^metadata_csum,uninit_bg,^64bit,^resize_inode,sparse_super2,\
                            dir_index,flex_bg,quota,project";
    const BYTES: u64 = 256 << 30;
    let extended =
        format!("lazy_itable_init=1,nodiscard,num_backup_sb=0,hash_seed={UUID},quotatype=prjquota");
    let image = target().join("blank");
    let _ = fs::remove_file(&image);
    fs::File::create(&image)?.set_len(BYTES)?;
    let mut mkfs = command("mkfs.ext4", &["-q", "-F", "-b", "4096", "-m", "0", "-I", "256"]);
    mkfs.args(["-i", "16384", "-U", UUID, "-O", FEATURES, "-E", &extended]).arg(&image);
    // As reproducible as the rest (libext2fs, `ext2fs_initialize`).
    run(mkfs.env("E2FSPROGS_FAKE_TIME", "1"))?;
    let file = fs::File::open(&image)?;
    let (mut blank, mut block, mut at) = (Vec::new(), [0; BLOCK], 0);
    // The file is nearly all hole, and ends in one (`ENXIO`).
    while let Ok(data) = lseek(&file, at, Whence::SeekData) {
        let number = data.unsigned_abs() / BLOCK as u64;
        file.read_exact_at(&mut block, number * BLOCK as u64)?;
        if block.iter().any(|byte| *byte != 0) {
            blank.extend_from_slice(&number.to_le_bytes());
            blank.extend_from_slice(&block);
        }
        at = i64::try_from((number + 1) * BLOCK as u64)?;
    }
    fs::remove_file(&image)?;
    Ok(blank)
}

/// Bytes of a block of data or hashes.
const BLOCK: usize = 4096;

/// Appends dm-verity's tree: SHA-256 without salt, the level of the root first. Returns the root's hash.
fn append_hash_tree(disk: &mut Vec<u8>) -> String {
    let above = |level: &[u8]| {
        let mut hashes: Vec<u8> = level.chunks(BLOCK).flat_map(Sha256::digest).collect();
        hashes.resize(hashes.len().next_multiple_of(BLOCK), 0);
        hashes
    };
    let mut levels = vec![above(disk)];
    while let Some(top) = levels.last().filter(|top| top.len() > BLOCK) {
        levels.push(above(top));
    }
    let root_hash = levels.last().map(|top| hex(top)).unwrap_or_default();
    disk.extend(levels.into_iter().rev().flatten());
    root_hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_depends_on_its_content_only() {
        let dir = std::env::temp_dir().join(format!("joey-guest-test-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let agent = dir.join("agent");
        fs::write(&agent, b"agent").unwrap();
        let modules = Modules { files: vec![("a.ko".to_owned(), b"abc".to_vec())] };
        let first = archive(&agent, &modules, b"").unwrap();
        let touched = fs::OpenOptions::new().append(true).open(&agent).unwrap();
        touched.set_modified(std::time::UNIX_EPOCH).unwrap();
        let second = archive(&agent, &modules, b"").unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(first, second);
        assert_eq!(first.len() % 4, 0);
        assert!(first.starts_with(b"070701"));
    }

    #[test]
    fn a_modules_needs_are_found() {
        assert_eq!(depends(b"x\0depends=net-failover,a\0name=b\0"), ["net_failover", "a"]);
        assert!(depends(b"\0depends=\0").is_empty());
        assert!(depends(b"nothing").is_empty());
    }

    #[test]
    fn old_kernels_are_refused() {
        assert!(check_age("6.12.95-1~bpo12+1").is_ok());
        assert!(check_age("7.2.1-1").is_ok());
        assert!(check_age("6.1.192-2").unwrap_err().to_string().contains("6.1.192"));
    }
}

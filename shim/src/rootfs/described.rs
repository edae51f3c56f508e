//! Disks of joey-snapshotter: a `disk.json` says which parts of which files they consist of.
//!
//! The mount that containerd carries over shows the host next to nothing of the image; its option
//! `joey.disk=PATH` names the description (`docs/storage.md`).

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use containerd_shim::protos::api::Mount;
use joey_image::disk::{self, VERSION};
use joey_image::layer::{BLOCK, HASH};

use super::{FileSystem, Image, RootfsError, Verity, io_error};
use crate::host::mounts;
use crate::vmm::{Disk, Extent};

const OPTION: &str = "joey.disk=";

/// Where a block of a disk lies on the host.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// The file.
    pub(crate) file: PathBuf,
    /// The block in it.
    pub(crate) block: u64,
    /// The layer whose content it is; empty: of what joins the layers.
    pub(crate) layer: String,
}

/// Finds a block of the described disk.
pub(crate) fn find(path: &Path, block: u64) -> Option<Place> {
    let described: disk::Disk = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let mut left = block;
    for part in described.extents {
        if left < part.blocks {
            let file = path.parent()?.join(part.file);
            let file = file.canonicalize().unwrap_or(file);
            let block = part.first.checked_add(left)?;
            return Some(Place { file, block, layer: part.layer.unwrap_or_default() });
        }
        left -= part.blocks;
    }
    None
}

/// The description's path, if the mount is one of joey-snapshotter's.
pub(super) fn path(mount: &Mount) -> Option<&Path> {
    mount.options.iter().find_map(|option| option.strip_prefix(OPTION)).map(Path::new)
}

/// The description's path, if a mount on the host is one of joey-snapshotter's: it shows the folder `users`
/// beside the description.
pub(crate) fn of_mount(place: &Path) -> Option<PathBuf> {
    let users = mounts::bound_from(place).filter(|from| from.ends_with("users"))?;
    Some(users.with_file_name("disk.json")).filter(|path| path.exists())
}

/// Opens what the disk of the description at `path` consists of.
///
/// # Errors
/// A file cannot be opened, or the description is not one; the message names it.
pub fn open(path: &Path) -> Result<Image, RootfsError> {
    let wrong = |reason: String| RootfsError::Description { path: path.to_owned(), reason };
    let text = std::fs::read(path).map_err(io_error("read", path))?;
    let described: disk::Disk =
        serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    if described.version != VERSION {
        let version = described.version;
        return Err(wrong(format!(
            "version {version}, but this shim knows version {VERSION}: update Joey and joey-snapshotter together"
        )));
    }
    let root_hash = hash(&described.root_hash)
        .ok_or_else(|| wrong(format!("root_hash {:?} is no SHA-256", described.root_hash)))?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut disk = Disk {
        files: Vec::new(),
        extents: Vec::with_capacity(described.extents.len()),
        ephemeral: false,
    };
    let mut opened = HashMap::new();
    for part in described.extents {
        let file = match opened.get(&part.file) {
            Some(index) => *index,
            None => {
                let path = folder.join(&part.file);
                let file = File::open(&path).map_err(io_error("open layer", &path))?;
                disk.files.push(file.into());
                opened.insert(part.file.clone(), disk.files.len() - 1);
                disk.files.len() - 1
            }
        };
        let bytes = |blocks: u64, what: &str| {
            blocks.checked_mul(BLOCK as u64).ok_or_else(|| wrong(format!("{what} {blocks}")))
        };
        let (offset, length) = (bytes(part.first, "first")?, bytes(part.blocks, "blocks")?);
        disk.extents.push(Extent { file, offset, length });
    }
    if disk.extents.is_empty() {
        return Err(wrong("extents: none".to_owned()));
    }
    Ok(Image {
        disk,
        verity: Some(Verity { root_hash, data_blocks: described.data_blocks }),
        file_system: FileSystem::Erofs,
        writable: false,
        key: described.root_hash,
        description: Some(path.to_owned()),
        lock: None,
    })
}

fn hash(hex: &str) -> Option<Vec<u8>> {
    let digit =
        |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let bytes = hex.as_bytes().chunks_exact(2).map(|pair| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    });
    let bytes: Vec<u8> = bytes.collect::<Option<_>>()?;
    (bytes.len() == HASH && hex.len() == 2 * HASH).then_some(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn described(folder: &Path, text: &str) -> Result<Image, RootfsError> {
        let written = folder.join("disk.json");
        std::fs::write(&written, text).unwrap();
        let options = vec!["ro".into(), format!("{OPTION}{}", written.display())];
        open(path(&Mount { type_: "bind".into(), options, ..Mount::new() }).unwrap())
    }

    #[test]
    fn files_are_opened_once_and_faults_are_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("index"), "x").unwrap();
        let root = "ab".repeat(HASH);
        let part = |first: u64| format!(r#"{{"file": "index", "first": {first}, "blocks": 2}}"#);
        let describe = |version: u32, root: &str, parts: &str| {
            format!(
                r#"{{"version": {version}, "data_blocks": 2, "root_hash": "{root}", "extents": [{parts}]}}"#
            )
        };
        let parts = [part(0), part(2)].join(",");
        let image = described(dir.path(), &describe(1, &root, &parts)).unwrap();
        assert_eq!(image.disk.files.len(), 1);
        assert_eq!(image.disk.extents[1], Extent { file: 0, offset: 8192, length: 8192 });
        let at = |block| find(&dir.path().join("disk.json"), block);
        let place = Place { file: dir.path().join("index"), block: 3, layer: String::new() };
        assert_eq!((at(3), at(4)), (Some(place), None));
        assert_eq!(image.verity.unwrap().root_hash, [0xab; HASH]);
        for (text, named) in [
            (describe(2, &root, &parts), "version 2"),
            (describe(1, "ab", &parts), "root_hash"),
            (describe(1, &root, ""), "extents"),
            (describe(1, &root, &parts.replace("index", "gone")), "gone"),
            (describe(1, &root, &parts).replace("first", "fist"), "fist"),
            (describe(1, &root, &part(u64::MAX)), "first"),
        ] {
            let error = described(dir.path(), &text).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}

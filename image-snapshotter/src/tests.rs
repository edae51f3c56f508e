//! Layers as builders and attackers write them, read back by the reference reader (`fsck.erofs`).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod large;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use tar::{Builder, EntryType, Header};

use joey_image::directory::Directory;
use joey_image::disk::{self, Disk};
use joey_image::layer::{self, BLOCK, LayerError, Source};
use joey_image::tar::Archive;
use joey_image::tree::{Body, Limits, Tree};

const MUCH: u64 = 1 << 30;

fn limits() -> Limits {
    Limits::of(crate::memory::LARGE)
}

/// A tar stream in the making.
struct Stream(Builder<Vec<u8>>);

impl Stream {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn add(mut self, path: &str, kind: EntryType, link: &str, data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        // Names as they are: the library would refuse the hostile ones.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(if kind == EntryType::Directory { 0o750 } else { 0o640 });
        header.set_uid(1000);
        header.set_gid(70_000);
        header.set_mtime(1_700_000_000);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn file(self, path: &str, data: &[u8]) -> Self {
        self.add(path, EntryType::Regular, "", data)
    }

    fn dir(self, path: &str) -> Self {
        self.add(path, EntryType::Directory, "", &[])
    }

    fn link(self, path: &str, target: &str) -> Self {
        self.add(path, EntryType::Symlink, target, &[])
    }

    fn hard(self, path: &str, target: &str) -> Self {
        self.add(path, EntryType::Link, target, &[])
    }

    fn pax(mut self, key: &str, value: &[u8]) -> Self {
        self.0.append_pax_extensions([(key, value)]).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn write(folder: &Path, stream: &[u8]) -> Result<(), LayerError> {
    fs::create_dir_all(folder).unwrap();
    layer::write(folder, Archive::new(stream), MUCH).map(drop)
}

/// Layers in a folder, and the disk made of them.
struct Image {
    dir: tempfile::TempDir,
    disk: Disk,
}

impl Image {
    fn of(streams: &[Vec<u8>]) -> Result<Self, LayerError> {
        Self::of_sources(streams.iter().map(|stream| Archive::new(stream.as_slice())))
    }

    fn of_sources(sources: impl Iterator<Item = impl Source>) -> Result<Self, LayerError> {
        let dir = tempfile::tempdir().unwrap();
        let mut layers = Vec::new();
        for (number, source) in sources.enumerate() {
            let name = format!("layer{number}");
            fs::create_dir_all(dir.path().join(&name)).unwrap();
            layer::write(&dir.path().join(&name), source, MUCH)?;
            let folder = dir.path().join(&name);
            let relative = Path::new("..").join(&name);
            layers.push(disk::Layer { digest: name, folder, relative });
        }
        let folder = dir.path().join("disk");
        fs::create_dir(&folder).unwrap();
        Ok(Self { disk: disk::make(&folder, &layers, limits())?, dir })
    }

    /// The disk as a guest sees it.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for extent in &self.disk.extents {
            let file = fs::read(self.dir.path().join("disk").join(&extent.file)).unwrap();
            let first = extent.first as usize * BLOCK;
            bytes.extend_from_slice(&file[first..first + extent.blocks as usize * BLOCK]);
        }
        bytes
    }

    /// What the reference reader makes of it.
    fn extract(&self) -> PathBuf {
        let (flat, out) = (self.dir.path().join("flat"), self.dir.path().join("out"));
        fs::write(&flat, self.bytes()).unwrap();
        let mut fsck = Command::new("fsck.erofs");
        let ran = fsck.arg(format!("--extract={}", out.display())).arg(&flat).output();
        let ran = ran.expect("fsck.erofs of the package erofs-utils");
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        out
    }
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

#[test]
fn files_of_all_sizes_and_kinds_come_back() {
    let sizes = [0, 1, 1000, 1024, 1025, 4095, 4096, 4097, 5000, 65_535, 65_536, 65_537, 300_000];
    let mut stream = Stream::new().dir("many").dir("d");
    for size in sizes {
        stream = stream.file(&format!("d/{size}"), &noise(size));
    }
    for number in 0..2000 {
        stream = stream.file(&format!("many/a-file-with-a-long-name-{number}"), &[7; 3]);
    }
    let stream = stream
        .link("d/link", "../d/1")
        .link("d/long", &"x/".repeat(49))
        .hard("d/again", "d/5000")
        .add("d/fifo", EntryType::Fifo, "", &[])
        .add("d/null", EntryType::Char, "", &[]);
    let image = Image::of(&[stream.bytes()]).unwrap();
    let out = image.extract();
    for size in sizes {
        assert!(fs::read(out.join(format!("d/{size}"))).unwrap() == noise(size), "{size} bytes");
    }
    assert_eq!(fs::read_dir(out.join("many")).unwrap().count(), 2000);
    assert_eq!(fs::read_link(out.join("d/link")).unwrap(), Path::new("../d/1"));
    assert_eq!(fs::read_link(out.join("d/long")).unwrap().as_os_str().len(), 98);
    let meta = fs::metadata(out.join("d/again")).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mtime()), (1000, 70_000, 1_700_000_000));
    assert_eq!(meta.permissions().mode() & 0o7777, 0o640);
    assert!(fs::read(out.join("d/again")).unwrap() == noise(5000));
    assert!(fs::symlink_metadata(out.join("d/fifo")).unwrap().file_type().is_fifo());
}

#[test]
fn upper_layers_replace_remove_and_hide() {
    let lower = Stream::new()
        .dir("etc")
        .file("etc/kept", b"kept")
        .file("etc/gone", b"gone")
        .file("etc/other", b"old")
        .dir("hidden")
        .file("hidden/below", b"x")
        .dir("usr")
        .dir("usr/lib")
        .link("lib", "usr/lib")
        .file("becomes-dir", b"x")
        .dir("becomes-file")
        .file("becomes-file/inside", b"x");
    let upper = Stream::new()
        .file("etc/.wh.gone", b"")
        .file("etc/other", b"new")
        // The marker may come after what it does not hide.
        .file("hidden/above", b"y")
        .file("hidden/.wh..wh..opq", b"")
        .file("lib/through-the-link", b"z")
        .dir("becomes-dir")
        .file("becomes-dir/inside", b"w")
        .file("becomes-file", b"v")
        .hard("linked", "etc/kept")
        .file("etc/.wh..wh.aufs", b"");
    let image = Image::of(&[lower.bytes(), upper.bytes()]).unwrap();
    let out = image.extract();
    let read = |path: &str| fs::read_to_string(out.join(path)).unwrap();
    assert_eq!(read("etc/kept"), "kept");
    assert_eq!(read("etc/other"), "new");
    assert_eq!(read("hidden/above"), "y");
    assert_eq!(read("usr/lib/through-the-link"), "z");
    assert_eq!(read("becomes-dir/inside"), "w");
    assert_eq!(read("becomes-file"), "v");
    assert_eq!(read("linked"), "kept");
    for path in ["etc/gone", "hidden/below", "etc/.wh.gone", "etc/.wh..wh.aufs"] {
        assert!(!out.join(path).exists(), "{path}");
    }
}

#[test]
fn files_with_the_longest_names_can_be_removed() {
    let name = "n".repeat(255);
    let named = |name: &str| Stream::new().pax("path", name.as_bytes()).file("f", b"");
    let image = Image::of(&[named(&name).bytes(), named(&format!(".wh.{name}")).bytes()]);
    assert_eq!(fs::read_dir(image.unwrap().extract()).unwrap().count(), 0);
    for name in [format!(".wh.{name}n"), format!(".wh.{name}/f"), format!("n{name}")] {
        let error = Image::of(&[named(&name).bytes()]).err().unwrap().to_string();
        assert!(error.contains("Linux takes 255"), "{error}");
    }
}

#[test]
fn a_removal_spares_its_own_layer() {
    let layer = Stream::new().dir("d").file("d/f", b"1").file("d/.wh.f", b"");
    let image = Image::of(&[layer.bytes()]).unwrap();
    let out = image.extract();
    assert!(out.join("d/f").exists());
}

#[test]
fn a_directory_in_place_of_a_link_hides_nothing_of_its_target() {
    let lower = Stream::new()
        .dir("usr")
        .dir("usr/lib")
        .file("usr/lib/kept", b"kept")
        .link("lib", "usr/lib")
        .link("lib64", "usr/lib");
    let upper = Stream::new()
        .dir("lib")
        .file("lib/.wh..wh..opq", b"")
        .file("lib/new", b"new")
        .dir("lib64")
        .file("lib64/.wh.kept", b"");
    let image = Image::of(&[lower.bytes(), upper.bytes()]).unwrap();
    let out = image.extract();
    let read = |path: &str| fs::read_to_string(out.join(path)).unwrap();
    assert_eq!((read("usr/lib/kept"), read("lib/new")), ("kept".to_owned(), "new".to_owned()));
    assert!(!out.join("usr/lib/new").exists() && !out.join("lib/kept").exists());
    assert_eq!(fs::read_dir(out.join("lib64")).unwrap().count(), 0);
}

#[test]
fn names_are_within_the_root_whatever_they_say() {
    let stream = Stream::new()
        .file("/etc/absolute", b"1")
        .file("./a/../b//c", b"2")
        .link("out", "/../../etc")
        .file("out/through", b"3")
        .file("twice", b"first")
        .file("twice", b"second");
    let image = Image::of(&[stream.bytes()]).unwrap();
    let out = image.extract();
    assert_eq!(fs::read_to_string(out.join("etc/absolute")).unwrap(), "1");
    assert_eq!(fs::read_to_string(out.join("b/c")).unwrap(), "2");
    assert_eq!(fs::read_to_string(out.join("etc/through")).unwrap(), "3");
    assert_eq!(fs::read_to_string(out.join("twice")).unwrap(), "second");
}

#[test]
fn hostile_streams_are_refused_by_entry() {
    let cut = |stream: Stream, keep: usize| stream.bytes()[..keep].to_vec();
    let mut checksum = Stream::new().file("before", b"x").file("sum", b"x").bytes();
    checksum[1024] = b'S';
    let mut lone = Stream::new().file("before", b"x").file("after", b"x").bytes();
    lone.splice(1024..1024, [0; BLOCK / 8]);
    let mut huge = Stream::new().file("huge", b"x").bytes();
    huge[124..136].copy_from_slice(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff");
    let sum: u32 = huge[..512].iter().enumerate().fold(0, |sum, (at, byte)| {
        sum + if (148..156).contains(&at) { 32 } else { u32::from(*byte) }
    });
    huge[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let cases: Vec<(Vec<u8>, &str, &str)> = vec![
        (Stream::new().file("../escape", b"x").bytes(), "../escape", "leaves the image's root"),
        (Stream::new().file("a/../../b", b"x").bytes(), "a/../../b", "leaves the image's root"),
        (Stream::new().hard("h", "../../etc/shadow").bytes(), "h", "leaves the image's root"),
        (Stream::new().hard("h", "nowhere").bytes(), "h", "nowhere"),
        (Stream::new().dir("d").hard("h", "d").bytes(), "h", "directory"),
        (Stream::new().link("a", "b").link("b", "a").file("a/x", b"").bytes(), "a/x", "symbolic"),
        (Stream::new().file("f", b"").file("f/x", b"").bytes(), "f/x", "not a directory"),
        (Stream::new().file(&"d/".repeat(48), b"").file("x", b"").bytes(), "", ""),
        (Stream::new().link("empty", "").bytes(), "empty", "link to nothing"),
        (Stream::new().add("what", EntryType::new(b'Z'), "", b"").bytes(), "what", "type"),
        (Stream::new().pax("mtime", b"soon").file("f", b"").bytes(), "mtime", "soon"),
        (Stream::new().file(".wh.", b"").bytes(), ".wh.", "whiteout"),
        (cut(Stream::new().file("cut", &noise(9000)), 5000), "cut", "end of file"),
        (cut(Stream::new().file("cut", b"x"), 700), "cut", "end of file"),
        (checksum, "Sum", "checksum"),
        (b"\xfd7zXZ\0".repeat(9), "tar stream", "gzip or zstd"),
        (b"<html>404 not found</html>".repeat(90), "tar stream", "gzip or zstd"),
        (lone, "before", "one block of zeros"),
        (huge, "huge", "max_layer_bytes"),
        (
            Stream::new().pax("size", b"18446744073709551615").file("endless", b"x").bytes(),
            "endless",
            "a size of 18446744073709551615",
        ),
    ];
    for (stream, entry, problem) in cases {
        let Err(error) = Image::of(&[stream]) else {
            assert_eq!(entry, "", "{entry} was taken");
            continue;
        };
        let error = error.to_string();
        assert!(error.contains(entry) && error.contains(problem), "{entry}, {problem}: {error}");
    }
}

#[test]
fn only_files_have_a_content() {
    let sized = |stream: Stream| stream.pax("size", b"512");
    let stream = sized(Stream::new()).dir("d");
    let stream = sized(sized(stream).link("l", "d")).add("p", EntryType::Fifo, "", b"");
    let image = Image::of(&[stream.file("d/after", b"after").bytes()]).unwrap();
    let out = image.extract();
    assert_eq!(fs::read_to_string(out.join("l/after")).unwrap(), "after");
    assert!(out.join("p").exists());
}

#[test]
fn sums_of_signed_bytes_are_taken() {
    let mut stream = Stream::new().file("name", b"content").bytes();
    stream[0] = 0xe9;
    let sum: i64 = stream[..512].iter().enumerate().fold(0, |sum, (at, byte)| {
        sum + if (148..156).contains(&at) { 32 } else { i64::from(byte.cast_signed()) }
    });
    stream[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert!(Image::of(&[stream]).is_ok());
}

#[test]
fn records_without_value_leave_the_header_as_it_is() {
    let mut stream = Stream::new();
    for key in ["path", "linkpath", "size", "uid", "gid", "mtime"] {
        stream = stream.pax(key, b"");
    }
    let image = Image::of(&[stream.file("f", b"content").bytes()]).unwrap();
    let path = image.extract().join("f");
    assert_eq!(fs::read_to_string(&path).unwrap(), "content");
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mtime()), (1000, 70_000, 1_700_000_000));
}

#[test]
fn headers_without_end_are_refused() {
    let mut stream = Stream::new();
    for number in 0..20 {
        stream = stream.pax(&format!("SCHILY.xattr.user.{number}"), &[7; 100_000]);
    }
    let error = Image::of(&[stream.file("f", b"").bytes()]).err().unwrap().to_string();
    assert!(error.contains("extended attributes of 1"), "{error}");
}

#[test]
fn attributes_without_end_are_refused() {
    let mut records = Vec::new();
    for number in 0..1025 {
        records.push((format!("SCHILY.xattr.user.{number}"), *b"x"));
    }
    let mut stream = Stream::new();
    stream.0.append_pax_extensions(records.iter().map(|(k, v)| (k.as_str(), &v[..]))).unwrap();
    let error = Image::of(&[stream.file("f", b"").bytes()]).err().unwrap().to_string();
    assert!(error.contains("user.1024"), "{error}");
}

/// Links whose targets, beside their inodes and attributes, would cross a block: old kernels refuse
/// those, so such a link is moved, or has a block of its own.
#[test]
fn long_links_with_attributes_can_be_read() {
    let target = |length: usize| format!("{length}/").repeat(length)[..length].to_owned();
    let cases: Vec<(usize, usize)> = [1, 60, 1000, 3900, 4031, 4032, 4033, 4095]
        .into_iter()
        .flat_map(|length| [0, 100, 3900, 6000].map(|value| (length, value)))
        .collect();
    let mut stream = Stream::new();
    for (length, value) in &cases {
        stream = match value {
            0 => stream,
            _ => stream.pax("SCHILY.xattr.trusted.x", &vec![b'v'; *value]),
        };
        let link = target(*length);
        stream = stream.pax("linkpath", link.as_bytes());
        stream = stream.add(&format!("l{length}-{value}"), EntryType::Symlink, "x", &[]);
    }
    let image = Image::of(&[stream.bytes()]).unwrap();
    let out = image.extract();
    for (length, value) in &cases {
        let link = fs::read_link(out.join(format!("l{length}-{value}"))).unwrap();
        assert!(link == Path::new(&target(*length)), "{length} bytes, attributes of {value}");
    }
    // As Linux before 6.10 looks at inline links.
    let index = image.bytes();
    let mut inline = 0;
    for at in (BLOCK..index.len() - 64).step_by(64) {
        let half = |at: usize| u16::from_le_bytes([index[at], index[at + 1]]);
        let (format, xattrs, mode) = (half(at), usize::from(half(at + 2)), half(at + 4));
        if format != 5 || mode & 0o170_000 != 0o120_000 {
            continue;
        }
        let size = usize::from(half(at + 8));
        let attributes = if xattrs > 0 { 12 + (xattrs - 1) * 4 } else { 0 };
        assert!(at % BLOCK + 64 + attributes + size <= BLOCK, "a link of {size} bytes at {at}");
        inline += 1;
    }
    assert!(inline >= 10, "{inline} inline links were found");
}

/// A file with holes as a layer has it. Not by fsck.erofs, of which 1.5 reads holes wrongly; the kernel does it in
/// the node's tests.
fn with_holes(folder: &Path, path: &[u8]) -> Vec<u8> {
    let mut tree = Tree::of_layers([folder], limits()).unwrap();
    let Body::Regular(content) = &tree.find(path).unwrap().body else { panic!() };
    let data = fs::read(folder.join("data")).unwrap();
    let mut seen = Vec::new();
    for chunk in &content.chunks {
        match *chunk {
            layer::HOLE => seen.resize(seen.len() + layer::CHUNK * BLOCK, 0),
            first => {
                let begin = first as usize * BLOCK;
                seen.extend_from_slice(&data[begin..begin + layer::CHUNK * BLOCK]);
            }
        }
    }
    seen.truncate(content.size as usize);
    seen
}

#[test]
fn sparse_files_keep_their_holes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(&noise(10_000)).unwrap();
    file.set_len(50 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"end of it", (50 << 20) - 5).unwrap();
    for format in ["gnu", "posix"] {
        let tar = Command::new("tar")
            .args(["--sparse", "--format", format, "-C"])
            .arg(dir.path())
            .args(["-c", "sparse"])
            .output()
            .unwrap();
        assert!(tar.stdout.len() < 1 << 20);
        let image = Image::of(&[tar.stdout]).unwrap();
        assert!(image.disk.data_blocks < 1024, "{format}: {} blocks", image.disk.data_blocks);
        let seen = with_holes(&image.dir.path().join("layer0"), b"sparse");
        assert!(seen == fs::read(&path).unwrap(), "{format}");
    }
}

/// What overlayfs has of two layers, in folders.
fn overlay_layers(dir: &Path) -> [PathBuf; 2] {
    let [lower, upper] = ["lower", "upper"].map(|name| dir.join(name));
    for folder in ["etc", "hidden", "becomes-file", "usr/lib"] {
        fs::create_dir_all(lower.join(folder)).unwrap();
    }
    for file in ["etc/kept", "etc/gone", "etc/other", "hidden/below", "becomes-file/inside"] {
        fs::write(lower.join(file), file).unwrap();
    }
    fs::hard_link(lower.join("etc/kept"), lower.join("usr/linked")).unwrap();
    std::os::unix::fs::symlink("usr/lib", lower.join("lib")).unwrap();
    std::os::unix::fs::chown(lower.join("etc/kept"), Some(1000), Some(70_000)).unwrap();
    fs::set_permissions(lower.join("etc/kept"), fs::Permissions::from_mode(0o4711)).unwrap();
    let sparse = fs::File::create(lower.join("sparse")).unwrap();
    sparse.set_len(50 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &noise(100_000), 20 << 20).unwrap();
    for folder in ["etc", "hidden", "lib"] {
        fs::create_dir_all(upper.join(folder)).unwrap();
    }
    for file in ["etc/other", "hidden/above", "becomes-file", "lib/own"] {
        fs::write(upper.join(file), "new").unwrap();
    }
    let whiteout = nix::sys::stat::SFlag::S_IFCHR;
    let none = nix::sys::stat::Mode::empty();
    nix::sys::stat::mknod(&upper.join("etc/gone"), whiteout, none, 0).unwrap();
    xattr::set(upper.join("hidden"), "trusted.overlay.opaque", b"y").unwrap();
    xattr::set(upper.join("etc/other"), "user.note", b"of the user").unwrap();
    [lower, upper]
}

#[test]
fn directories_of_overlayfs_are_layers() {
    let dir = tempfile::tempdir().unwrap();
    let layers = overlay_layers(dir.path());
    let sources = layers.iter().map(|layer| Directory::open(layer).unwrap());
    let image = Image::of_sources(sources).unwrap();
    let out = image.extract();
    let read = |path: &str| fs::read_to_string(out.join(path)).unwrap();
    assert_eq!(read("etc/kept"), "etc/kept");
    assert_eq!(read("usr/linked"), "etc/kept");
    for path in ["etc/other", "hidden/above", "becomes-file", "lib/own"] {
        assert_eq!(read(path), "new", "{path}");
    }
    for path in ["etc/gone", "hidden/below", "usr/lib/own"] {
        assert!(!out.join(path).exists(), "{path}");
    }
    let sparse = with_holes(&image.dir.path().join("layer0"), b"sparse");
    assert!(sparse == fs::read(layers[0].join("sparse")).unwrap());
    assert!(image.disk.data_blocks < 1024, "{} blocks", image.disk.data_blocks);
    let folders = ["layer0", "layer1"].map(|name| image.dir.path().join(name));
    let mut tree = Tree::of_layers(folders.iter().map(PathBuf::as_path), limits()).unwrap();
    let xattrs = |tree: &mut Tree, path: &[u8]| tree.find(path).unwrap().meta.xattrs.clone();
    assert_eq!(xattrs(&mut tree, b"hidden"), []);
    let kept = &tree.find(b"etc/kept").unwrap().meta;
    assert_eq!((kept.uid, kept.gid, kept.mode), (1000, 70_000, 0o4711));
    let changed = fs::metadata(layers[0].join("etc/kept")).unwrap().mtime();
    assert_eq!(kept.mtime.0, changed);
    let note = (b"user.note".to_vec(), b"of the user".to_vec());
    assert_eq!(xattrs(&mut tree, b"etc/other"), [note]);
}

#[test]
fn what_overlayfs_keeps_elsewhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    xattr::set(dir.path().join("file"), "trusted.overlay.metacopy", b"").unwrap();
    let refused = Image::of_sources([Directory::open(dir.path()).unwrap()].into_iter());
    let error = refused.err().unwrap().to_string();
    assert!(error.contains("\"file\"") && error.contains("metacopy"), "{error}");
    assert!(Directory::open(&dir.path().join("file")).is_err());
}

#[test]
fn extended_attributes_are_bytes() {
    let value = b"\x01\n\0=\xff 12 x=y\n";
    let stream = Stream::new()
        .pax("SCHILY.xattr.security.capability", value)
        .pax("path", "n\u{e4}me".as_bytes())
        .file("short", b"x");
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &stream.bytes()).unwrap();
    // Extensions in two headers, as some builders write them, all hold for the entry that follows.
    let mut tree = Tree::of_layers([dir.path()], limits()).unwrap();
    let inode = tree.find("n\u{e4}me".as_bytes()).unwrap();
    assert!(matches!(inode.body, Body::Regular(..)));
    assert_eq!(inode.meta.xattrs, [(b"security.capability".to_vec(), value.to_vec())]);
}

#[test]
fn the_hash_tree_is_dm_veritys() {
    use sha2::{Digest as _, Sha256};
    let image = Image::of(&[Stream::new().file("f", &noise(3 << 20)).bytes()]).unwrap();
    let bytes = image.bytes();
    let data = image.disk.data_blocks as usize * BLOCK;
    let above = |level: &[u8]| {
        let mut hashes: Vec<u8> = level.chunks(BLOCK).flat_map(Sha256::digest).collect();
        hashes.resize(hashes.len().next_multiple_of(BLOCK), 0);
        hashes
    };
    let leaves = above(&bytes[..data]);
    let top = above(&leaves);
    assert_eq!(top.len(), BLOCK);
    assert!(bytes[data..] == [top.clone(), leaves].concat());
    let root: String = Sha256::digest(&top).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(image.disk.root_hash, root);
}

#[test]
fn the_host_sees_nothing_but_users() {
    let stream = Stream::new()
        .dir("etc")
        .link("etc/passwd", "../real/passwd")
        .file("real/passwd", b"root:x:0:0::/:/bin/sh\n")
        .file("etc/group", &[b'g'; 5000])
        .file("etc/shadow", b"secret");
    let image = Image::of(&[stream.bytes()]).unwrap();
    let users = image.dir.path().join("disk/users");
    let read = |name: &str| fs::read_to_string(users.join("etc").join(name));
    assert_eq!(read("passwd").unwrap(), "root:x:0:0::/:/bin/sh\n");
    assert_eq!(read("group").unwrap().len(), 5000);
    assert_eq!(fs::read_dir(users.join("etc")).unwrap().count(), 2);
}

#[test]
fn an_empty_image_is_one() {
    for streams in [vec![], vec![Vec::new()], vec![Stream::new().bytes()]] {
        let image = Image::of(&streams).unwrap();
        let out = image.extract();
        assert_eq!(fs::read_dir(out).unwrap().count(), 0);
    }
}

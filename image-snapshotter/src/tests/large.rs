//! Images that are large, honest or not: what the daemon's memory comes to.
//!
//! Each is handled in a process of its own, this test program once more, whose greatest resident
//! size the kernel tells.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Cursor, Read};
use std::process::Command;

use joey_image::layer::HOLE;
use tar::Header;

use super::*;
use crate::memory::{self, APPLIES, LARGE, SMALL};
use crate::service::apply::{self, Window};
use crate::store::{Kind, Store};

/// What the daemon promises to stay below.
const PROMISE: u64 = 256 << 20;
/// Tells the child which test is its own, and where the parent has left a file for it.
const CHILD: &str = "JOEY_MEASURED";
const INPUT: &str = "JOEY_MEASURED_INPUT";

/// The process's greatest resident size so far.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Runs `work` in a process of its own, which must stay below the promise. It prints the peak, for
/// whoever runs the tests with `--nocapture`.
#[allow(clippy::print_stdout)]
fn measured(name: &str, input: &Path, work: impl FnOnce(&Path)) {
    if std::env::var(CHILD).is_ok_and(|own| own == name) {
        work(&PathBuf::from(std::env::var_os(INPUT).unwrap()));
        let peak = peak();
        println!("peak of {name}: {} MiB", peak >> 20);
        assert!(peak < PROMISE, "{peak} bytes");
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "--nocapture", &format!("tests::large::{name}")]);
    let output = child.env(CHILD, name).env(INPUT, input).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    println!(
        "{}",
        text.lines().find(|line| line.contains("peak of")).expect("a test of that name")
    );
}

/// A tar stream whose entries are made as they are read.
struct Many<F> {
    entry: F,
    next: usize,
    count: usize,
    current: Cursor<Vec<u8>>,
}

impl<F: FnMut(usize) -> Vec<u8>> Many<F> {
    fn new(count: usize, entry: F) -> Self {
        Self { entry, next: 0, count, current: Cursor::default() }
    }
}

impl<F: FnMut(usize) -> Vec<u8>> Read for Many<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.current.read(buffer)?;
            if read > 0 || self.next == self.count {
                return Ok(read);
            }
            self.current = Cursor::new((self.entry)(self.next));
            self.next += 1;
        }
    }
}

/// A file's header and content.
fn file(path: &str, content: &[u8]) -> Vec<u8> {
    let mut header = Header::new_ustar();
    header.set_path(path).unwrap();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// Files so deep that each brings more than 200 directories that nothing else has.
fn deep(count: usize) -> impl Read {
    Many::new(count, |number| {
        let path = format!("{number}/{}f", "d/".repeat(250));
        let record = format!(" path={path}\n");
        let length = record.len() + 3;
        let mut header = Header::new_ustar();
        header.set_path("pax").unwrap();
        header.set_entry_type(EntryType::XHeader);
        header.set_size(length as u64);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(format!("{length}{record}").as_bytes());
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes.extend_from_slice(&file("f", b""));
        bytes
    })
}

/// Commits a layer of this stream on `parent`, under a name that is its digest as well.
fn commit(store: &Store, name: &str, parent: &str, stream: impl Read) {
    let key = format!("extract-{name}");
    store.prepare(&key, parent, Kind::Active, BTreeMap::new()).unwrap();
    let new = store.begin().unwrap();
    layer::write(&new.path, Archive::new(stream), 64 << 30).unwrap();
    store.apply(&key, &format!("sha256:{name}"), &new).unwrap();
    store.commit(&key, name, BTreeMap::new()).unwrap();
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

fn description(folder: &Path) -> Disk {
    serde_json::from_slice(&fs::read(folder.join("disk.json")).unwrap()).unwrap()
}

#[test]
fn an_image_of_127_layers() {
    measured("an_image_of_127_layers", Path::new(""), |_| {
        let (_dir, store) = store();
        let mut parent = String::new();
        for number in 0..127 {
            let mut stream = Stream::new().file("etc/replaced", number.to_string().as_bytes());
            for other in 0..50 {
                stream = stream.file(&format!("l{number}/{other}"), &[1; 5000]);
            }
            if number > 0 {
                stream = stream.file(&format!("l{}/.wh.7", number - 1), b"");
            }
            let name = number.to_string();
            commit(&store, &name, &parent, &*stream.bytes());
            parent = name;
        }
        let disk = description(&store.disk("126").unwrap());
        assert_eq!(disk.extents.len(), 129);
        let folders: Vec<_> = (0..127).map(|n| store.root().join(format!("layers/{n}"))).collect();
        let folders = folders.iter().map(PathBuf::as_path);
        let mut tree = Tree::of_layers(folders, Limits::of(SMALL)).unwrap();
        let Some(Body::Regular(data)) = tree.find(b"etc/replaced").map(|inode| &inode.body) else {
            panic!("no file")
        };
        assert_eq!((data.layer, data.size), (126, 3));
        assert!(tree.find(b"l5/7").is_none() && tree.find(b"l126/7").is_some());
        // Files that are gone take no number: 126 copies of the one, and 126 removed.
        assert!(tree.numbers() < 127 * 52 + 10, "{} numbers", tree.numbers());
    });
}

#[test]
fn two_hundred_thousand_small_files() {
    measured("two_hundred_thousand_small_files", Path::new(""), |_| {
        let (_dir, store) = store();
        let stream = Many::new(200_000, |number| {
            let path = format!("srv/node_modules/package-{}/lib/file-{number}.js", number / 40);
            file(&path, &[b'x'; 100])
        });
        commit(&store, "1", "", stream);
        let disk = store.disk("1").unwrap();
        assert!(fs::metadata(disk.join("index")).unwrap().len() > 200_000 * 164);
    });
}

#[test]
fn a_sparse_layer_of_2_gib() {
    measured("a_sparse_layer_of_2_gib", Path::new(""), |_| {
        let (dir, store) = store();
        let path = dir.path().join("sparse");
        let file = File::create(&path).unwrap();
        file.set_len(2 << 30).unwrap();
        let write = |bytes: &[u8], at| {
            std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).unwrap();
        };
        write(&[7; 128 << 10], 0);
        write(b"end of it", (2 << 30) - 9);
        let mut tar = Command::new("tar");
        tar.args(["--sparse", "--format", "posix", "-C"]).arg(dir.path()).args(["-c", "sparse"]);
        commit(&store, "1", "", &*tar.output().unwrap().stdout);
        let disk = description(&store.disk("1").unwrap());
        assert!(disk.data_blocks <= 256, "{} blocks", disk.data_blocks);
        let folder = dir.path().join("layers/1");
        let mut tree = Tree::of_layers([folder.as_path()], Limits::of(SMALL)).unwrap();
        let Some(Body::Regular(data)) = tree.find(b"sparse").map(|inode| &inode.body) else {
            panic!("no file")
        };
        assert_eq!((data.size, data.chunks.len()), (2 << 30, (2 << 30) / (64 << 10)));
        let stored: Vec<u32> = data.chunks.iter().copied().filter(|chunk| *chunk != HOLE).collect();
        assert_eq!(stored, [0, 16, 32]);
    });
}

#[test]
fn a_bomb_is_refused_without_memory_for_it() {
    measured("a_bomb_is_refused_without_memory_for_it", Path::new(""), |_| {
        use flate2::{Compression, write::GzEncoder};
        let (_dir, store) = store();
        store.prepare("key", "", Kind::Active, BTreeMap::new()).unwrap();
        let gzip = |bytes: &[u8]| {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let mut header = Header::new_ustar();
        header.set_path("bomb").unwrap();
        header.set_size(1 << 30);
        header.set_cksum();
        let mut bomb = gzip(header.as_bytes());
        let zeros = gzip(&vec![0; 1 << 20]);
        (0..1024).for_each(|_| bomb.extend_from_slice(&zeros));
        // The header says what it is; a stream that says nothing is stopped by its length.
        for (stream, named) in
            [(&bomb[..], "\"bomb\""), (&bomb[gzip(header.as_bytes()).len()..], "")]
        {
            let error = apply::write(&store, stream, "key", 64 << 20, Window::Usual);
            let error = error.map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("max_layer_bytes"), "{error}");
        }
    });
}

/// A zstd stream of a file of zeros, with that window.
fn zstd(size: u64, window: u32) -> Vec<u8> {
    let mut encoder = ::zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(window).unwrap();
    let mut header = Header::new_ustar();
    header.set_path("zeros").unwrap();
    header.set_size(size);
    header.set_cksum();
    encoder.write_all(header.as_bytes()).unwrap();
    io::copy(&mut io::repeat(0).take(size), &mut encoder).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn a_zstd_layer_with_a_window_of_128_mib() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("zstd");
    let name = "a_zstd_layer_with_a_window_of_128_mib";
    if std::env::var_os(CHILD).is_none() {
        fs::write(&input, zstd(150 << 20, 27)).unwrap();
    }
    measured(name, &input, |input| {
        let (_dir, store) = store();
        store.prepare("key", "", Kind::Active, BTreeMap::new()).unwrap();
        let write = |window| {
            let stream = File::open(input).unwrap();
            apply::write(&store, stream, "key", 1 << 30, window).unwrap()
        };
        assert!(write(Window::Usual).is_none());
        assert!(peak() < 64 << 20, "a window of {} bytes was made", peak());
        assert!(write(Window::Wide).is_some());
    });
}

/// All shares in use: the largest image that is taken, and layers beside it.
#[test]
fn the_largest_image_and_layers_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("zstd");
    let name = "the_largest_image_and_layers_at_once";
    if std::env::var_os(CHILD).is_none() {
        fs::write(&input, zstd(50 << 20, 23)).unwrap();
    }
    measured(name, &input, |input| {
        let (_dir, store) = store();
        commit(&store, "1", "", deep(LARGE / (252 * (192 + 240 + 104 + 1)) - 2));
        std::thread::scope(|scope| {
            for number in 0..APPLIES {
                let key = format!("key-{number}");
                let store = &store;
                scope.spawn(move || {
                    store.prepare(&key, "", Kind::Active, BTreeMap::new()).unwrap();
                    let stream = File::open(input).unwrap();
                    apply::write(store, stream, &key, 1 << 30, Window::Usual).unwrap().unwrap();
                });
            }
            store.disk("1").unwrap();
        });
    });
}

/// What one has used and given back does not add up with what others use, of whom each is a thread.
#[test]
fn images_and_files_without_end_in_turn() {
    measured("images_and_files_without_end_in_turn", Path::new(""), |_| {
        memory::bound();
        let (_dir, store) = store();
        commit(&store, "1", "", Many::new(350_000, |number| file(&format!("d/{number}"), b"")));
        for round in 2..4 {
            let name = round.to_string();
            commit(&store, &name, "1", &*Stream::new().file(&name, b"").bytes());
            let all = std::sync::Barrier::new(30);
            std::thread::scope(|scope| {
                for number in 0..30 {
                    let (store, all) = (&store, &all);
                    scope.spawn(move || {
                        all.wait();
                        let share = store.memory.applies.take();
                        let key = format!("key-{round}-{number}");
                        store.prepare(&key, "", Kind::Active, BTreeMap::new()).unwrap();
                        let size = ((64_u64 << 30) - round * 100 - number).to_string();
                        let hole = Stream::new().pax("GNU.sparse.size", size.as_bytes());
                        let stream = hole.file("hole", b"").bytes();
                        apply::write(store, &*stream, &key, 64 << 30, Window::Usual).unwrap();
                        drop(share);
                        all.wait();
                    });
                }
                store.disk(&name).unwrap();
            });
        }
        assert!(peak() < PROMISE * 3 / 4, "threads keep memory: {} bytes", peak());
    });
}

#[test]
fn an_image_without_end_is_refused_by_entry_and_layer() {
    measured("an_image_without_end_is_refused_by_entry_and_layer", Path::new(""), |_| {
        let (_dir, store) = store();
        commit(&store, "1", "", &*Stream::new().dir("honest").bytes());
        commit(&store, "2", "1", deep(2000));
        let error = store.disk("2").unwrap_err().to_string();
        assert!(error.starts_with("layer 2: entry \"1"), "{error}");
        assert!(error.contains(&format!("more than {LARGE} bytes of memory")), "{error}");
        assert_eq!(store.metrics.disks_refused.get(), 1);
        // The daemon goes on, and the other image is whole.
        store.disk("1").unwrap();
    });
}

#[test]
fn paths_of_too_many_steps_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut stream = Stream::new().dir("d").link("a0", "d");
    for number in 1..40 {
        stream =
            stream.link(&format!("a{number}"), &format!("a{}/{}", number - 1, "./".repeat(40)));
    }
    for number in 0..200 {
        stream = stream.file(&format!("a39/{number}"), b"");
    }
    write(dir.path(), &stream.bytes()).unwrap();
    let limits = Limits { steps: 100_000, ..limits() };
    let error = Tree::of_layers([dir.path()], limits).unwrap_err().to_string();
    assert!(error.contains("a39/") && error.contains("100000 steps"), "{error}");
    assert!(Tree::of_layers([dir.path()], super::limits()).is_ok());
}

#[test]
fn what_is_replaced_or_removed_takes_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let folders: Vec<_> = (0..20).map(|number| dir.path().join(number.to_string())).collect();
    for (number, folder) in folders.iter().enumerate() {
        let mut stream = Stream::new().dir("e");
        if number % 2 == 1 {
            stream = stream.file("d/.wh..wh..opq", b"").file(".wh.e", b"");
        }
        for other in 0..200 {
            stream = stream.file(&format!("d/{other}"), b"x").file(&format!("e/{other}"), b"x");
            stream = stream.hard(&format!("d/again-{other}"), &format!("d/{other}"));
        }
        // A directory with all in it becomes a file, and one of those a directory again.
        write(folder, &stream.file("e", b"").bytes()).unwrap();
    }
    let tight = Limits::of(600 << 10);
    let mut tree = Tree::of_layers(folders.iter().map(PathBuf::as_path), tight).unwrap();
    assert!(tree.numbers() < 700, "{} numbers", tree.numbers());
    assert!(matches!(tree.find(b"e").unwrap().body, Body::Regular(_)));
    assert!(tree.find(b"d/again-7").is_some());
}

//! The store alone, without containerd.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use joey_image::tar::Archive;

use super::*;

fn add(store: &Store, name: &str, parent: &str, digest: &str, content: &[u8]) {
    let key = format!("extract-{name}");
    store.prepare(&key, parent, Kind::Active, BTreeMap::new()).unwrap();
    let new = store.begin().unwrap();
    layer::write(&new.path, Archive::new(content), 1 << 20).unwrap();
    store.apply(&key, digest, &new).unwrap();
    store.commit(&key, name, BTreeMap::new()).unwrap();
}

fn folders(root: &Path, kind: &str) -> usize {
    fs::read_dir(root.join(kind)).unwrap().count()
}

#[test]
fn layers_are_shared_and_go_with_their_last_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    add(&store, "a", "", "sha256:1", &[]);
    add(&store, "b", "a", "sha256:2", &[]);
    add(&store, "c", "", "sha256:2", &[]);
    assert_eq!(folders(dir.path(), "layers"), 2);
    let disk = store.disk("b").unwrap();
    assert_eq!(store.disk("b").unwrap(), disk);
    store.prepare("container", "b", Kind::Active, BTreeMap::new()).unwrap();
    for (name, why) in [("a", "parent of b"), ("b", "parent of container")] {
        assert!(store.remove(name).unwrap_err().to_string().contains(why));
    }
    store.remove("container").unwrap();
    store.remove("b").unwrap();
    store.collect().unwrap();
    assert!(!disk.exists());
    assert_eq!(folders(dir.path(), "layers"), 2);
    store.remove("c").unwrap();
    store.remove("a").unwrap();
    store.collect().unwrap();
    assert_eq!((folders(dir.path(), "layers"), folders(dir.path(), "new")), (0, 0));
}

#[test]
fn a_crash_leaves_whole_snapshots_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = Store::open(dir.path()).unwrap();
        add(&store, "a", "", "sha256:1", &[]);
        store.disk("a").unwrap();
        // Half a layer, and a whole one that no transaction has named.
        std::mem::forget(store.begin().unwrap());
        fs::create_dir(dir.path().join("layers/2")).unwrap();
        assert!(Store::open(dir.path()).is_err(), "two processes had the store");
    }
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.get("a").unwrap().layer.as_deref(), Some("sha256:1"));
    assert_eq!((folders(dir.path(), "layers"), folders(dir.path(), "new")), (1, 0));
    assert_eq!(folders(dir.path(), "disks"), 1);
}

#[test]
fn what_contradicts_the_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    add(&store, "a", "", "sha256:1", &[]);
    let none = BTreeMap::new;
    assert!(matches!(store.get("x"), Err(StoreError::NotFound(_))));
    let exists = store.prepare("a", "", Kind::Active, none());
    assert!(matches!(exists, Err(StoreError::Exists(_))));
    assert!(matches!(store.prepare("b", "x", Kind::View, none()), Err(StoreError::NotFound(_))));
    store.prepare("b", "a", Kind::View, none()).unwrap();
    for refused in [
        store.commit("b", "c", none()),
        store.prepare("c", "b", Kind::Active, none()),
        store.apply("b", "sha256:1", &store.begin().unwrap()),
    ] {
        assert!(matches!(refused, Err(StoreError::Precondition { .. })), "{refused:?}");
    }
    let one = |key: &str| [(key.to_owned(), "1".to_owned())].into();
    store.label("b", one("x"), None).unwrap();
    store.label("b", one("y"), Some(vec!["y".to_owned(), "x".to_owned()])).unwrap();
    assert_eq!(store.get("b").unwrap().labels, one("y"));
}

#[test]
fn a_snapshot_without_layer_is_not_committed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.prepare("k", "", Kind::Active, BTreeMap::new()).unwrap();
    let error = store.commit("k", "n", BTreeMap::new()).unwrap_err();
    assert!(matches!(&error, StoreError::Precondition { name, .. } if name == "k"), "{error}");
    assert_eq!(store.get("k").unwrap().kind, Kind::Active);
    // A layer without entries is one.
    add(&store, "empty", "", "sha256:0", &[]);
}

#[test]
fn a_second_daemon_leaves_the_firsts_work_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let new = store.begin().unwrap();
    fs::write(new.path.join("half"), "x").unwrap();
    assert!(Store::open(dir.path()).is_err(), "two processes had the store");
    assert!(new.path.join("half").exists());
}

#[test]
fn the_store_is_its_users_alone() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("deep/store");
    fs::create_dir_all(&root).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
    drop(Store::open(&root).unwrap());
    assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o7777, 0o700);
}

#[test]
fn a_refused_layer_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let new = store.begin().unwrap();
    layer::write(&new.path, Archive::new(&[][..]), 1).unwrap();
    assert!(store.apply("nobody", "sha256:1", &new).is_err());
    assert_eq!(folders(dir.path(), "layers"), 0);
}

#[test]
fn one_images_disk_waits_for_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    add(&store, "a", "", "sha256:1", &[]);
    let name = disk_name(&["sha256:1".to_owned()]);
    // As if it were being made, and that took long.
    store.building.0.lock().unwrap().insert(name.clone());
    add(&store, "b", "", "sha256:2", &[]);
    store.disk("b").unwrap();
    std::thread::scope(|scope| {
        let same = scope.spawn(|| store.disk("a").unwrap());
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!same.is_finished(), "one disk was made twice at once");
        store.building.0.lock().unwrap().remove(&name);
        store.building.1.notify_all();
        assert!(same.join().unwrap().exists());
    });
    assert!(store.building.0.lock().unwrap().is_empty());
    assert_eq!(store.metrics.disks.get(), 2);
}

#[test]
fn an_empty_images_disk_stays_while_it_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let wanted = std::sync::atomic::AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while wanted.load(std::sync::atomic::Ordering::Relaxed) {
                store.collect().unwrap();
            }
        });
        for number in 0..100 {
            let name = number.to_string();
            store.prepare(&name, "", Kind::View, BTreeMap::new()).unwrap();
            let disk = store.disk("").unwrap();
            std::thread::yield_now();
            assert!(disk.join("disk.json").exists(), "round {number}");
            store.remove(&name).unwrap();
        }
        wanted.store(false, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn an_images_index_is_counted_before_it_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    for number in 0..3000 {
        let mut header = tar::Header::new_gnu();
        header.set_size(600);
        let path = format!("usr/share/some/where/file-{number}");
        builder.append_data(&mut header, path, &[1; 600][..]).unwrap();
    }
    let mut header = tar::Header::new_gnu();
    header.set_size(8 << 20);
    builder.append_data(&mut header, "large", &*vec![1; 8 << 20]).unwrap();
    let stream = builder.into_inner().unwrap();
    for (name, parent, digest) in [("a", "", "sha256:1"), ("b", "a", "sha256:2")] {
        let key = format!("extract-{name}");
        store.prepare(&key, parent, Kind::Active, BTreeMap::new()).unwrap();
        let new = store.begin().unwrap();
        let content = if parent.is_empty() { &stream[..] } else { &[] };
        layer::write(&new.path, Archive::new(content), 1 << 30).unwrap();
        store.apply(&key, digest, &new).unwrap();
        store.commit(&key, name, BTreeMap::new()).unwrap();
    }
    let layers = |digest| layer::disk_bytes(&dir.path().join("layers").join(digest));
    // In the middle of an image: its own layer.
    assert_eq!(store.usage("a").unwrap().0, layers("1"));
    let estimated = store.usage("b").unwrap().0;
    let disk = store.disk("b").unwrap();
    let exact = store.usage("b").unwrap().0;
    assert_eq!(exact, layers("2") + layer::disk_bytes(&disk));
    assert!(estimated > exact * 3 / 4 && estimated < exact * 3 / 2, "{estimated} for {exact}");
}

#[test]
fn a_store_that_another_has_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let _store = Store::open(dir.path()).unwrap();
    let taken = Store::open(dir.path());
    assert!(matches!(taken, Err(StoreError::Taken(_))), "{taken:?}");
    assert!(dir.path().join(RESERVE).exists());
}

/// The database itself takes a disk that was full for its end.
#[test]
fn a_disk_that_failed_may_be_well_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.prepare("before", "", Kind::Active, BTreeMap::new()).unwrap();
    let failed = store.change(|rows| {
        rows.remove("before")?;
        Err::<(), _>(StoreError::Database("no space left on device".to_owned()))
    });
    assert!(failed.is_err() && store.database.read().unwrap().is_none());
    store.prepare("after", "", Kind::Active, BTreeMap::new()).unwrap();
    assert_eq!(store.all().unwrap().into_keys().collect::<Vec<_>>(), ["after", "before"]);
}

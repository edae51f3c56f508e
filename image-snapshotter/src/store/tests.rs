//! The store alone, without containerd.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use super::*;

fn add(store: &Store, name: &str, parent: &str, digest: &str, content: &[u8]) {
    let key = format!("extract-{name}");
    store.prepare(&key, parent, Kind::Active, BTreeMap::new()).unwrap();
    let new = store.begin().unwrap();
    layer::write(&new.path, content, 1 << 20).unwrap();
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

//! A store tells a good template from every kind of bad one. No VMM runs here.

use std::fs;
use std::path::Path;

use super::*;
use crate::host::jail::IdRange;

fn config(root: &Path) -> VmmConfig {
    VmmConfig {
        qemu: "/nonexistent/qemu".into(),
        guest_dir: root.join("guest"),
        templates_dir: root.join("templates"),
        run_dir: root.join("run"),
        use_templates: true,
        ids: IdRange { first: 1 << 20, count: 16 },
        builder: None,
        home: Vec::new(),
    }
}

fn store(config: &VmmConfig) -> TemplateStore<'_> {
    TemplateStore {
        config,
        acceleration: Acceleration {
            kvm: false,
            reason: String::new(),
            tsc_khz: None,
            processor: String::new(),
        },
        qemu: Version { text: "10.0.0".to_owned(), identity: String::new() },
        guest: "0".repeat(64),
    }
}

/// Publishes a template of three small files.
fn publish(store: &TemplateStore<'_>) -> String {
    let key = store.key(1, 256).unwrap();
    let directory = store.config.templates_dir.join(&key);
    fs::create_dir_all(&directory).unwrap();
    let mut files = BTreeMap::new();
    for (name, content) in [(MEMORY, "memory"), (STATE, "state"), (KERNEL, "kernel")] {
        fs::write(directory.join(name), content).unwrap();
        files.insert(name.to_owned(), record(&directory.join(name)).unwrap());
    }
    let manifest = Manifest {
        key: key.clone(),
        qemu: store.qemu.text.clone(),
        accelerator: store.acceleration.name().to_owned(),
        vcpus: 1,
        memory_mib: 256,
        guest: store.guest.clone(),
        files,
    };
    fs::write(directory.join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
    key
}

#[test]
fn damage_of_every_kind_is_told_and_named() {
    type Harm = (&'static str, fn(&Path));
    let harms: [Harm; 7] = [
        ("memory has 3 of 6 bytes", |t| fs::write(t.join(MEMORY), "mem").unwrap()),
        ("state has 0 of 5 bytes", |t| fs::write(t.join(STATE), "").unwrap()),
        ("the content of state has changed", |t| fs::write(t.join(STATE), "statf").unwrap()),
        ("kernel: ", |t| fs::remove_file(t.join(KERNEL)).unwrap()),
        ("its manifest", |t| fs::write(t.join(MANIFEST), "{]").unwrap()),
        ("manifest.json", |t| fs::remove_file(t.join(MANIFEST)).unwrap()),
        ("its manifest is that of", |t| {
            let text = fs::read_to_string(t.join(MANIFEST)).unwrap();
            let key = t.file_name().unwrap().to_string_lossy().into_owned();
            fs::write(t.join(MANIFEST), text.replace(&key, "another")).unwrap();
        }),
    ];
    for (what, harm) in harms {
        let root = tempfile::tempdir().unwrap();
        let config = config(root.path());
        let store = store(&config);
        let key = publish(&store);
        // Good, and remembered as such.
        store.open(&key).unwrap();
        harm(&config.templates_dir.join(&key));
        let error = store.open(&key).unwrap_err();
        assert!(error.is_damage(), "{error}");
        assert!(error.to_string().contains(what), "{error}");
        store.condemn(&key);
        assert!(matches!(store.open(&key), Err(TemplateError::Missing(_))), "{what}");
    }
}

#[test]
fn what_other_images_and_dead_builders_left_is_collected() {
    let root = tempfile::tempdir().unwrap();
    let config = config(root.path());
    let old = TemplateStore { guest: "1".repeat(64), ..store(&config) };
    let (stale, store) = (publish(&old), store(&config));
    let good = publish(&store);
    let [half, gone] = ["7.new", "7.old"].map(|kind| format!("{good}.{kind}"));
    let ours = format!("{}.7.new", "a".repeat(24));
    for name in [&half, &gone, &ours] {
        fs::create_dir(config.templates_dir.join(name)).unwrap();
    }
    let lock =
        File::create(config.templates_dir.join(&ours).with_extension("").with_extension("lock"));
    let building = Flock::lock(lock.unwrap(), FlockArg::LockExclusive).unwrap();
    let mut removed = store.collect_stale().unwrap();
    removed.sort();
    let mut expected = [stale, half, gone];
    expected.sort();
    assert_eq!(removed, expected);
    store.open(&good).unwrap();
    assert!(config.templates_dir.join(&ours).exists());
    drop(building);
    assert_eq!(sweep(&config.templates_dir), [ours]);
}

#[test]
fn a_template_in_doubt_is_checked_again() {
    let root = tempfile::tempdir().unwrap();
    let config = config(root.path());
    let store = store(&config);
    let key = publish(&store);
    assert!(store.open_known(&key).is_none());
    store.open(&key).unwrap();
    assert!(store.open_known(&key).is_some());
    store.doubt(&key);
    assert!(store.open_known(&key).is_none());
    store.open(&key).unwrap();
}

#[test]
fn a_template_is_of_one_processor() {
    let root = tempfile::tempdir().unwrap();
    let config = config(root.path());
    let with = |khz, processor: &str| {
        let acceleration = Acceleration {
            tsc_khz: khz,
            processor: processor.to_owned(),
            ..store(&config).acceleration
        };
        TemplateStore { acceleration, ..store(&config) }.key(1, 256).unwrap()
    };
    let key = with(Some(2_449_998), "one");
    assert_eq!(key, with(Some(2_450_002), "one"));
    assert_ne!(key, with(Some(2_650_000), "one"));
    assert_ne!(key, with(Some(2_449_998), "another"));
}

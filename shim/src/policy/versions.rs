//! Several versions of Joey on one node: one whose maps have another layout pins its own, and pods that run keep the
//! programs and maps that they were started with.

use std::fs;
use std::io;
use std::path::PathBuf;

use joey_ebpf::policy::maps::{directory, others};

use crate::config::Config;
use crate::sandbox::record::Record;

/// Pods that are named in one message.
const NAMED: usize = 20;

/// The pods, by name or else by id, that have the policy of another layout: no change reaches them.
///
/// # Errors
/// The records cannot be listed.
pub fn unreached(config: &Config) -> io::Result<Vec<String>> {
    let here = directory(&config.bpf_dir);
    let records = Record::all(&config.run_dir)?.into_iter();
    let old = records.filter(|it| it.network.as_ref().is_some_and(|place| place.maps != here));
    Ok(old.map(|record| record.pod.unwrap_or(record.id)).collect())
}

/// The same in words; `None` if there are none.
///
/// # Errors
/// As [`unreached`].
pub fn warning(config: &Config) -> io::Result<Option<String>> {
    let pods = unreached(config)?;
    let named = pods.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = match pods.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let plural = if pods.len() == 1 { "pod has" } else { "pods have" };
    Ok((!pods.is_empty()).then(|| {
        format!(
            "{} {plural} the policy of another version of Joey, which changes do not reach: {named}{more}; \
             replace them",
            pods.len()
        )
    }))
}

/// Removes what versions with another layout have pinned, once no pod has it any more. Returns what was removed.
///
/// # Errors
/// The records cannot be read, so that it is not known, or a directory not be removed.
pub fn remove_unused(config: &Config) -> io::Result<Vec<PathBuf>> {
    // Those that are started now have this version's.
    let other = others(&config.bpf_dir);
    if other.is_empty() {
        return Ok(other);
    }
    let records = Record::each(&config.run_dir)?;
    let places = || records.iter().filter_map(|record| record.network.as_ref());
    let unused = other.into_iter().filter(|path| !places().any(|place| place.maps == *path));
    let remove = |path: PathBuf| match fs::remove_dir_all(&path) {
        Err(error) => Err(io::Error::other(format!("remove {}: {error}", path.display()))),
        Ok(()) => Ok(path),
    };
    unused.map(remove).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::record::{PodNetwork, directory as of};

    fn place(config: &Config, id: &str, pod: Option<&str>, maps: PathBuf) {
        let network = Some(PodNetwork { maps, ..PodNetwork::default() });
        let pod = pod.map(str::to_owned);
        let record = Record { id: id.to_owned(), pod, network, ..Record::default() };
        record.write(&of(&config.run_dir, id)).unwrap();
    }

    #[test]
    fn other_layouts_are_told_while_pods_have_them_and_go_when_none_has() {
        let root = tempfile::tempdir().unwrap();
        let [bpf_dir, run_dir] = ["bpf", "run"].map(|name| root.path().join(name));
        let config = Config { bpf_dir: bpf_dir.clone(), run_dir, ..Config::default() };
        // Nothing is loaded, and no pod was ever there.
        assert_eq!(remove_unused(&config).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(warning(&config).unwrap(), None);
        let [here, used, unused] =
            [directory(&bpf_dir), bpf_dir.join("policy-1"), bpf_dir.join("policy-2")];
        for directory in [&here, &used, &unused, &bpf_dir.join("wire-1")] {
            fs::create_dir_all(directory).unwrap();
            fs::write(directory.join("pods"), "").unwrap();
        }
        place(&config, "new", Some("a/new"), here.clone());
        assert_eq!(warning(&config).unwrap(), None);
        place(&config, "old", Some("a/old"), used.clone());
        place(&config, "nameless", None, used.clone());
        assert_eq!(unreached(&config).unwrap(), ["nameless", "a/old"]);
        let words = warning(&config).unwrap().unwrap();
        assert!(
            words.starts_with("2 pods have") && words.contains(": nameless, a/old; replace"),
            "{words}"
        );
        // What is not known is not taken for nobody's.
        let broken = of(&config.run_dir, "broken");
        fs::create_dir(&broken).unwrap();
        fs::write(broken.join("record.json"), "{").unwrap();
        remove_unused(&config).unwrap_err();
        fs::remove_dir_all(broken).unwrap();
        assert_eq!(remove_unused(&config).unwrap(), std::slice::from_ref(&unused));
        assert_eq!([&here, &used, &unused].map(|path| path.exists()), [true, true, false]);
        for id in ["old", "nameless"] {
            fs::remove_dir_all(of(&config.run_dir, id)).unwrap();
        }
        assert_eq!(remove_unused(&config).unwrap(), [used]);
        assert!(here.exists() && bpf_dir.join("wire-1").exists());
        assert_eq!(warning(&config).unwrap(), None);
        for number in 0..30 {
            place(&config, &number.to_string(), Some(&format!("a/{number}")), unused.clone());
        }
        assert!(warning(&config).unwrap().unwrap().contains(" and 10 more; replace"));
    }
}

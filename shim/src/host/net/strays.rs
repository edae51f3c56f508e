//! Places in the node's policy that no record names: whoever removed a sandbox's record by hand left one.
//!
//! A place is written down before it is taken and its record is removed after it was given back, so one without a
//! record is nobody's, unless a shim lives that has no record either: then nothing is taken from anybody. Records may
//! be missed in a list that changes, so a place must be without one at two looks.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::Path;

use joey_ebpf::policy::abi::PodId;
use joey_ebpf::policy::maps::{Maps, directory};

use super::admission::{AdmissionError, dismiss};
use crate::sandbox::record::{PodNetwork, ProcessId, Record};

/// What the program of a shim is called.
const SHIM: &str = "containerd-shim-joey-v2";

/// What was seen at the last look.
#[derive(Debug, Default)]
pub struct Strays(HashMap<PodId, u64>);

/// The shims that run, as far as this process sees processes.
///
/// # Errors
/// `/proc` cannot be listed.
pub fn shims() -> io::Result<Vec<ProcessId>> {
    let is_shim = |path: &Path| {
        let program = fs::read_link(path.join("exe")).ok();
        // An update leaves "(deleted)" behind the name.
        program.is_some_and(|it| {
            it.to_string_lossy().rsplit('/').next().unwrap_or("").starts_with(SHIM)
        })
    };
    let processes = fs::read_dir("/proc")?.flatten().map(|entry| entry.path());
    let pids = processes.filter(|path| is_shim(path));
    let pids = pids.filter_map(|path| path.file_name()?.to_str()?.parse().ok());
    // One that has ended meanwhile is none.
    Ok(pids.filter_map(|pid| ProcessId::of(pid).ok()).collect())
}

impl Strays {
    /// Gives back the places that were without a record at the last look and still are, if each of `shims`, those
    /// that live, has one. Returns their numbers.
    ///
    /// # Errors
    /// The maps cannot be used, or a record not be read: then nothing is given back.
    pub fn look(
        &mut self,
        bpf_dir: &Path,
        run_dir: &Path,
        shims: &[ProcessId],
    ) -> Result<Vec<PodId>, AdmissionError> {
        let maps = match Maps::open(bpf_dir) {
            // Nothing is loaded, so nobody has a place.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|source| AdmissionError::Policy {
                dir: bpf_dir.to_owned(),
                step: "open its maps",
                source,
            })?,
        };
        // Places first: what is taken after this is not among them.
        let places = maps.pods()?;
        let records = Record::each(run_dir).map_err(AdmissionError::Record)?;
        let known: HashSet<ProcessId> = records.iter().filter_map(|record| record.shim).collect();
        let (here, all) = (directory(bpf_dir), records.iter());
        let named = all.filter_map(|it| it.network.as_ref()).filter(|place| place.maps == here);
        let named: HashSet<(PodId, u64)> = named.map(|place| (place.id, place.since)).collect();
        let strays = places.iter().map(|(id, pod)| (*id, pod.since));
        let strays: HashMap<_, _> = strays.filter(|place| !named.contains(place)).collect();
        let last = std::mem::replace(&mut self.0, strays);
        if !shims.iter().all(|shim| known.contains(shim)) {
            return Ok(Vec::new());
        }
        let mut gone = Vec::new();
        for (id, since) in self.0.iter().filter(|(id, since)| last.get(*id) == Some(*since)) {
            dismiss(&PodNetwork {
                bpf_dir: bpf_dir.to_owned(),
                maps: here.clone(),
                id: *id,
                since: *since,
                addresses: maps.addresses(*id)?,
                tenant: String::new(),
            })?;
            gone.push(*id);
        }
        Ok(gone)
    }
}

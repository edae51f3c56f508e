//! Loading the policy's programs, filling their maps, and running them by hand.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::time::Duration;

use aya::maps::{Map, MapData};
use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfError, EbpfLoader, include_bytes_aligned};

use super::Reason;
use super::abi::{NODE, PodId, Ports, Rule, Scope, Side};
use super::attach::Program;
use super::maps::{Lock, MapError, Maps, NAMES, directory};

static OBJECT: &[u8] = include_bytes_aligned!(env!("JOEY_POLICY_OBJECT"));
/// Length of the kernel's `struct __sk_buff`.
const CONTEXT: usize = 192;
/// In it, `mark`, `cb[0]` and `gso_size`.
const MARK: usize = 8;
const CB: usize = 48;
const GSO_SIZE: usize = 176;
/// `TC_ACT_SHOT` and `TC_ACT_REDIRECT`.
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

/// Flows that a table of the node holds; the same as in `bpf/policy.h`. Where maps go with their maker a few
/// are enough.
const FLOWS: u32 = 8192;
const FEW: u32 = 2048;
/// The epoch that is in force before any policy is applied.
const FIRST: u32 = 1;

/// Why the policy is not there or not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The object could not be read or its maps made.
    #[error("the policy's object: {0}")]
    Object(#[from] EbpfError),
    /// The kernel did not take a program, or not run it.
    #[error("the policy's program {name}: {source}")]
    Program {
        /// Which.
        name: &'static str,
        /// What the kernel says, with the verifier's log.
        source: ProgramError,
    },
    /// A map could not be read or written, or its layout is another than this crate's.
    #[error(transparent)]
    Map(#[from] MapError),
    /// What is to be in force is not.
    #[error("the policy that was applied last cannot be put in force: {0}")]
    Fill(String),
    /// The maps could not be opened.
    #[error("the policy's maps: {0}")]
    Maps(io::Error),
    /// The object has no such program or map.
    #[error("the policy's object has no {0}")]
    Missing(&'static str),
    /// A program returned what it never does.
    #[error("the policy's program {name} returned {action} with reason {reason}")]
    Outcome {
        /// Which.
        name: &'static str,
        /// Its return value.
        action: u32,
        /// The reason it gave.
        reason: u32,
    },
}

/// How a run by hand ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome<T = ()> {
    /// The decision.
    pub decision: Result<T, Reason>,
    /// Mean time of a run.
    pub time: Duration,
}

/// The loaded programs and their maps. Only one at a time may change what a node's programs share.
#[derive(Debug)]
pub struct Policy {
    object: Ebpf,
    /// What they read and write.
    pub maps: Maps,
}

/// The program that judges what this side sends.
fn program_of(sender: Side) -> Program {
    match sender {
        Side::Vm => Program::FromVm,
        Side::Peer => Program::ToVm,
    }
}

/// What all kinds of maps have that the policy uses.
fn data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data)
        | Map::ArrayOfMaps(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::LruHashMap(data)
        | Map::PerCpuHashMap(data)
        | Map::RingBuf(data) => Some(data),
        _ => None,
    }
}

fn map(object: &Ebpf, name: &str) -> io::Result<OwnedFd> {
    let map = object.map(name).and_then(data).ok_or(io::ErrorKind::NotFound)?;
    map.fd().as_fd().try_clone_to_owned()
}

impl Policy {
    /// Loads the programs: each judges for the pod that its filter's classid names. Its maps go with it.
    pub fn load() -> Result<Self, PolicyError> {
        let mut policy = Self::load_with(0, None)?;
        policy.maps.put_tables(FEW)?;
        policy.verify()?;
        Ok(policy)
    }

    /// Loads the programs to be run by hand, which [`Policy::run`] tells the pod by the packet's mark.
    /// They are never to be attached: marks can be anybody's.
    pub fn load_to_run() -> Result<Self, PolicyError> {
        let mut policy = Self::load_with(1, None)?;
        policy.maps.put_tables(FEW)?;
        policy.verify()?;
        Ok(policy)
    }

    /// Loads and pins what of programs and maps is not pinned yet; for one caller at a time. Whenever it
    /// ends early, the next call goes on: the programs, by which pods see that all is there, are pinned last,
    /// when the maps are complete and `fill` has put into new ones what is to be in force.
    pub(crate) fn pin(
        bpf_dir: &Path,
        fill: impl FnOnce() -> Result<(), String>,
    ) -> Result<(), PolicyError> {
        let directory = directory(bpf_dir);
        let pins = Program::ALL.map(|program| (program, program.pinned_path(bpf_dir)));
        if pins.iter().all(|(_, path)| fs::symlink_metadata(path).is_ok()) {
            return Ok(());
        }
        match DirBuilder::new().mode(0o700).create(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(PolicyError::Maps(error));
            }
            _ => {}
        }
        let mut policy = Self::load_with(0, Some(&directory))?;
        policy.maps.put_tables(FLOWS)?;
        let lock = Lock::take(bpf_dir).map_err(PolicyError::Maps)?;
        if policy.maps.active()?.epoch == 0 {
            // The node may open anything on its own pods, as the kubelet's probes do.
            let scope = Scope::Service { class: NODE, opener: Side::Peer };
            policy.maps.put_rule(FIRST, &Rule { scope, ports: Ports::Any })?;
            policy.maps.activate(&lock, FIRST)?;
        }
        drop(lock);
        if policy.maps.active()?.epoch == FIRST {
            fill().map_err(PolicyError::Fill)?;
        }
        policy.verify()?;
        for (program, path) in pins {
            if fs::symlink_metadata(&path).is_err() {
                let fail = |error| PolicyError::Maps(io::Error::other(error));
                policy.program(program)?.pin(&path).map_err(fail)?;
            }
        }
        Ok(())
    }

    /// Makes the maps, or opens those that are pinned in a directory and pins the others there.
    fn load_with(pod_by_mark: u32, pins: Option<&Path>) -> Result<Self, PolicyError> {
        let mut loader = EbpfLoader::new();
        loader.override_global("pod_by_mark", &pod_by_mark, true);
        for name in NAMES.into_iter().chain(["events"]) {
            if let Some(directory) = pins {
                loader.map_pin_path(name, directory.join(name));
            }
        }
        let object = loader.load(OBJECT)?;
        let maps = Maps::with(|name| map(&object, name)).map_err(PolicyError::Maps)?;
        maps.put_strays()?;
        Ok(Self { object, maps })
    }

    fn verify(&mut self) -> Result<(), PolicyError> {
        for program in Program::ALL {
            let name = program.name();
            let fail = |source| PolicyError::Program { name, source };
            self.program(program)?.load().map_err(fail)?;
        }
        Ok(())
    }

    /// A map, for another [`Maps`].
    #[cfg(test)]
    pub(super) fn map(&self, name: &str) -> io::Result<OwnedFd> {
        map(&self.object, name)
    }

    /// The events, to be read by one reader.
    #[cfg(test)]
    pub(super) fn take_events(&mut self) -> aya::maps::RingBuf<MapData> {
        self.object.take_map("events").unwrap().try_into().unwrap()
    }

    fn program(&mut self, program: Program) -> Result<&mut SchedClassifier, PolicyError> {
        let name = program.name();
        let program = self.object.program_mut(name).ok_or(PolicyError::Missing(name))?;
        program.try_into().map_err(|source| PolicyError::Program { name, source })
    }

    /// The program that judges what a side sends, to be attached.
    pub fn classifier(&mut self, sender: Side) -> Result<&mut SchedClassifier, PolicyError> {
        self.program(program_of(sender))
    }

    /// How many instructions the verifier went through for a program.
    pub fn verified(&mut self, program: Program) -> Result<Option<u32>, PolicyError> {
        let info = self.program(program)?.info();
        let fail = |source| PolicyError::Program { name: program.name(), source };
        Ok(info.map_err(fail)?.verified_instruction_count())
    }

    /// Runs a program over a frame that `sender` sends on a device of `pod`, `repeat` times in a row.
    pub fn run(
        &mut self,
        sender: Side,
        pod: PodId,
        frame: &[u8],
        repeat: u32,
    ) -> Result<Outcome, PolicyError> {
        self.run_segmented(sender, pod, frame, repeat, 0)
    }

    /// The same with a packet that is to be cut into segments of this size later, if it is not 0.
    pub(super) fn run_segmented(
        &mut self,
        sender: Side,
        pod: PodId,
        frame: &[u8],
        repeat: u32,
        segment: u32,
    ) -> Result<Outcome, PolicyError> {
        let program = program_of(sender);
        let ended = self.run_program(program, pod, frame, repeat, segment)?;
        let decision = match ended.decision {
            Ok(REDIRECT) => Ok(()),
            Err(reason) => Err(reason),
            Ok(action) => {
                return Err(PolicyError::Outcome { name: program.name(), action, reason: 0 });
            }
        };
        Ok(Outcome { decision, time: ended.time })
    }

    /// Runs any of the programs; allowed, it returns the kernel's number of what is done with the packet.
    pub(super) fn run_program(
        &mut self,
        program: Program,
        pod: PodId,
        frame: &[u8],
        repeat: u32,
        segment: u32,
    ) -> Result<Outcome<u32>, PolicyError> {
        let name = program.name();
        let mut context = [0; CONTEXT];
        context[MARK..MARK + 4].copy_from_slice(&u32::from(pod).to_ne_bytes());
        context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&segment.to_ne_bytes());
        let mut after = [0; CONTEXT];
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(&context),
            ctx_out: Some(&mut after),
            repeat,
            ..TestRunOptions::default()
        };
        let fail = |source| PolicyError::Program { name, source };
        let result = self.program(program)?.test_run(options).map_err(fail)?;
        let mut reason = [0; 4];
        reason.copy_from_slice(&after[CB..CB + 4]);
        let (action, reason) = (result.return_value, u32::from_ne_bytes(reason));
        let decision = match (action, Reason::from_number(reason)) {
            (SHOT, Some(reason)) => Err(reason),
            (SHOT, None) => return Err(PolicyError::Outcome { name, action, reason }),
            (action, None) if reason == 0 => Ok(action),
            _ => return Err(PolicyError::Outcome { name, action, reason }),
        };
        Ok(Outcome { decision, time: result.duration })
    }
}

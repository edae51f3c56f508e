//! Loading the policy's programs, filling their maps, and running them by hand.

use std::net::IpAddr;
use std::time::Duration;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapError, PerCpuHashMap, PerCpuValues};
use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfError, EbpfLoader, include_bytes_aligned};

use super::Reason;
use super::abi::{
    Allow, Counters, Flow, FlowKey, FragmentKey, Identity, Pod, PodId, Prefix, Service, Side,
    address_key, pod_key,
};

static OBJECT: &[u8] = include_bytes_aligned!(env!("JOEY_POLICY_OBJECT"));
/// Length of the kernel's `struct __sk_buff`.
const CONTEXT: usize = 192;
/// In it, `mark` and `cb[0]`.
const MARK: usize = 8;
const CB: usize = 48;
/// `BPF_NOEXIST`, a flag of map updates.
const NO_EXIST: u64 = 1;
/// `TC_ACT_SHOT` and `TC_ACT_REDIRECT`.
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

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
    #[error("the policy's map {name}: {source}")]
    Map {
        /// Which.
        name: &'static str,
        /// Why.
        source: MapError,
    },
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
pub struct Outcome {
    /// The decision.
    pub decision: Result<(), Reason>,
    /// Mean time of a run.
    pub time: Duration,
}

/// The loaded programs and their maps. Only one at a time may change what a node's programs share.
#[derive(Debug)]
pub struct Policy {
    object: Ebpf,
}

/// The function in `bpf/policy.bpf.c` that judges what this side sends.
fn program_of(sender: Side) -> &'static str {
    match sender {
        Side::Vm => "from_vm",
        Side::Peer => "to_vm",
    }
}

impl Policy {
    /// Loads the programs: each judges for the pod that its filter's classid names.
    pub fn load() -> Result<Self, PolicyError> {
        Self::load_with(0)
    }

    /// Loads the programs to be run by hand, which [`Policy::run`] tells the pod by the packet's mark.
    /// They are never to be attached: marks can be anybody's.
    pub fn load_to_run() -> Result<Self, PolicyError> {
        Self::load_with(1)
    }

    fn load_with(pod_by_mark: u32) -> Result<Self, PolicyError> {
        let mut loader = EbpfLoader::new();
        let object = loader.override_global("pod_by_mark", &pod_by_mark, true).load(OBJECT)?;
        let mut policy = Self { object };
        for sender in [Side::Vm, Side::Peer] {
            let name = program_of(sender);
            let fail = |source| PolicyError::Program { name, source };
            policy.program(sender)?.load().map_err(fail)?;
        }
        policy.put_counters(0)?;
        Ok(policy)
    }

    fn program(&mut self, sender: Side) -> Result<&mut SchedClassifier, PolicyError> {
        let name = program_of(sender);
        let program = self.object.program_mut(name).ok_or(PolicyError::Missing(name))?;
        program.try_into().map_err(|source| PolicyError::Program { name, source })
    }

    /// The program that judges what a side sends, to be attached.
    pub fn classifier(&mut self, sender: Side) -> Result<&mut SchedClassifier, PolicyError> {
        self.program(sender)
    }

    /// Has `change` write to a map, whose keys and values are as long as the kernel has them.
    fn with<'a, M: TryFrom<&'a mut Map, Error = MapError>, T>(
        &'a mut self,
        name: &'static str,
        change: impl FnOnce(M) -> Result<T, MapError>,
    ) -> Result<T, PolicyError> {
        let map = self.object.map_mut(name).ok_or(PolicyError::Missing(name))?;
        M::try_from(map).and_then(change).map_err(|source| PolicyError::Map { name, source })
    }

    fn put<K: aya::Pod, V: aya::Pod>(
        &mut self,
        name: &'static str,
        key: K,
        value: V,
    ) -> Result<(), PolicyError> {
        self.with(name, |mut map: HashMap<_, K, V>| map.insert(key, value, 0))
    }

    /// Fine when it is not there.
    fn remove<const K: usize, const V: usize>(
        &mut self,
        name: &'static str,
        key: [u8; K],
    ) -> Result<(), PolicyError> {
        self.with(name, |mut map: HashMap<_, [u8; K], [u8; V]>| gone(map.remove(&key)))
    }

    /// Makes or replaces a pod with these addresses. Its counters begin at zero, or go on. A pod that is to
    /// have fewer addresses than before has to be removed first.
    pub fn put_pod(&mut self, id: PodId, pod: &Pod, own: &[IpAddr]) -> Result<(), PolicyError> {
        self.put_counters(id)?;
        for address in own {
            self.put("addresses", address_key(id, *address), 1_u32)?;
        }
        self.put("pods", pod_key(id), pod.encode(own))?;
        self.changed()
    }

    /// Removes a pod with these addresses, and its counters: from now on all of its packets are dropped.
    pub fn remove_pod(&mut self, id: PodId, own: &[IpAddr]) -> Result<(), PolicyError> {
        self.remove::<4, 32>("pods", pod_key(id).to_ne_bytes())?;
        for address in own {
            self.remove::<24, 4>("addresses", address_key(id, *address))?;
        }
        self.with("counters", |mut map: PerCpuHashMap<_, u32, [u8; Counters::SIZE]>| {
            gone(map.remove(&pod_key(id)))
        })
    }

    /// Has flows be judged anew: what was changed before counts from now on. Who changes a node's maps
    /// excludes others meanwhile, so that no generation comes twice.
    fn changed(&mut self) -> Result<(), PolicyError> {
        self.with("generation", |mut map: Array<_, u32>| {
            let generation = map.get(&0, 0)?;
            map.set(0, generation.wrapping_add(1), 0)
        })
    }

    /// Says whose the addresses of a prefix are.
    pub fn put_identity(&mut self, prefix: Prefix, identity: Identity) -> Result<(), PolicyError> {
        let (bits, bytes) = prefix.encode();
        self.with("identities", |mut map: LpmTrie<_, [u8; 20], [u8; 8]>| {
            map.insert(&Key::new(bits, bytes), identity.encode(), 0)
        })?;
        self.changed()
    }

    /// Forgets whose they are.
    pub fn remove_identity(&mut self, prefix: Prefix) -> Result<(), PolicyError> {
        let (bits, bytes) = prefix.encode();
        self.with("identities", |mut map: LpmTrie<_, [u8; 20], [u8; 8]>| {
            gone(map.remove(&Key::new(bits, bytes)))
        })?;
        self.changed()
    }

    /// Shares a service.
    pub fn put_service(&mut self, service: &Service) -> Result<(), PolicyError> {
        self.put("services", service.encode(), 1_u32)?;
        self.changed()
    }

    /// Shares it no longer.
    pub fn remove_service(&mut self, service: &Service) -> Result<(), PolicyError> {
        self.remove::<8, 4>("services", service.encode())?;
        self.changed()
    }

    /// Allows something across tenants.
    pub fn put_allow(&mut self, allow: &Allow) -> Result<(), PolicyError> {
        self.put("allows", allow.encode(), 1_u32)?;
        self.changed()
    }

    /// Allows it no longer.
    pub fn remove_allow(&mut self, allow: &Allow) -> Result<(), PolicyError> {
        self.remove::<12, 4>("allows", allow.encode())?;
        self.changed()
    }

    /// Writes down a flow.
    pub fn put_flow(&mut self, key: &FlowKey, flow: &Flow) -> Result<(), PolicyError> {
        self.put("flows", key.encode(), flow.encode())
    }

    /// What is known of a flow.
    pub fn flow(&mut self, key: &FlowKey) -> Result<Option<Flow>, PolicyError> {
        self.with("flows", |map: HashMap<_, [u8; 44], [u8; 16]>| match map.get(&key.encode(), 0) {
            Ok(flow) => Ok(Flow::decode(&flow)),
            Err(error) => gone(Err(error)).map(|()| None),
        })
    }

    /// All flows that are written down, those whose time is over among them.
    pub fn flows(&mut self) -> Result<Vec<(FlowKey, Flow)>, PolicyError> {
        self.with("flows", |map: HashMap<_, [u8; 44], [u8; 16]>| {
            let mut flows = Vec::new();
            for entry in map.iter() {
                let (key, flow) = entry?;
                flows.extend(FlowKey::decode(&key).zip(Flow::decode(&flow)));
            }
            Ok(flows)
        })
    }

    /// Forgets a flow.
    pub fn remove_flow(&mut self, key: &FlowKey) -> Result<(), PolicyError> {
        self.remove::<44, 16>("flows", key.encode())
    }

    /// Writes down when a first fragment was let through.
    pub fn put_fragment(&mut self, key: &FragmentKey, seen: u64) -> Result<(), PolicyError> {
        self.put("fragments", key.encode(), seen.to_ne_bytes())
    }

    /// Forgets a first fragment.
    pub fn remove_fragment(&mut self, key: &FragmentKey) -> Result<(), PolicyError> {
        self.remove::<44, 8>("fragments", key.encode())
    }

    fn put_counters(&mut self, pod: PodId) -> Result<(), PolicyError> {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| PolicyError::Map {
            name: "counters",
            source: MapError::IoError(error),
        })?;
        self.with("counters", |mut map: PerCpuHashMap<_, u32, [u8; Counters::SIZE]>| {
            let zero = PerCpuValues::try_from(vec![[0; Counters::SIZE]; cpus])?;
            match map.insert(pod_key(pod), zero, NO_EXIST) {
                Err(MapError::SyscallError(error))
                    if error.io_error.kind() == std::io::ErrorKind::AlreadyExists =>
                {
                    Ok(())
                }
                other => other,
            }
        })
    }

    /// What was counted for a pod on all CPUs; pod 0 has what belongs to no pod.
    pub fn counters(&mut self, pod: PodId) -> Result<Counters, PolicyError> {
        self.with("counters", |map: PerCpuHashMap<_, u32, [u8; Counters::SIZE]>| {
            let mut sum = Counters::default();
            for bytes in map.get(&pod_key(pod), 0)?.iter() {
                sum.add(bytes);
            }
            Ok(sum)
        })
    }

    /// How many instructions the verifier went through for a program.
    pub fn verified(&mut self, sender: Side) -> Result<Option<u32>, PolicyError> {
        let info = self.program(sender)?.info();
        let fail = |source| PolicyError::Program { name: program_of(sender), source };
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
        let name = program_of(sender);
        let mut context = [0; CONTEXT];
        context[MARK..MARK + 4].copy_from_slice(&u32::from(pod).to_ne_bytes());
        let mut after = [0; CONTEXT];
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(&context),
            ctx_out: Some(&mut after),
            repeat,
            ..TestRunOptions::default()
        };
        let fail = |source| PolicyError::Program { name, source };
        let result = self.program(sender)?.test_run(options).map_err(fail)?;
        let mut reason = [0; 4];
        reason.copy_from_slice(&after[CB..CB + 4]);
        let (action, reason) = (result.return_value, u32::from_ne_bytes(reason));
        let decision = match (action, Reason::from_number(reason)) {
            (REDIRECT, None) if reason == 0 => Ok(()),
            (SHOT, Some(reason)) => Err(reason),
            _ => return Err(PolicyError::Outcome { name, action, reason }),
        };
        Ok(Outcome { decision, time: result.duration })
    }
}

fn gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        other => other,
    }
}

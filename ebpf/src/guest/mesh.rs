//! Sidecar and observe modes in the guest: what the pod asks for, as entries of the maps in `bpf/mesh_guest.h`.

use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use aya::include_bytes_aligned;

use super::events::Events;
use super::{Attached, GuestError};
use crate::map::{Map, MapError};

static OBJECT: &[u8] = include_bytes_aligned!(env!("JOEY_MESH_GUEST_OBJECT"));
/// The only key of `settings`.
const ONLY: [u8; 4] = [0; 4];
/// `enum range`.
const EXCLUDED: u32 = 1;
const INCLUDED: u32 = 2;
const OWN: u32 = 3;
/// Bits that a list takes of a range's key.
const LIST_BITS: u32 = 32;
/// `enum owner`.
const USER: u32 = 1;
const GROUP: u32 = 2;
/// What the maps hold of each.
pub const MOST_PORTS: usize = 1024;
/// Ranges of all lists, and the pod's addresses.
pub const MOST_RANGES: usize = 1024;
/// Users and groups.
pub const MOST_OWNERS: usize = 256;

/// What is said of a port: bits of `enum port_mark`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Connections to it are left alone.
    OutExcluded = 1,
    /// Connections to it are redirected wherever they go.
    OutIncluded = 2,
    /// Connections from outside reach it directly.
    InExcluded = 4,
    /// Connections from outside to it are redirected, where not all are.
    InIncluded = 8,
}

/// A prefix of addresses.
pub type Prefix = (IpAddr, u8);

/// What the programs are to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Connections are redirected to the pod's proxy.
    pub capture: bool,
    /// Connections are told of, as [`Event`](super::events::Event)s.
    pub observe: bool,
    /// Where the proxy listens for what leaves the pod, on loopback.
    pub outbound: u16,
    /// Where it listens for what comes in.
    pub inbound: u16,
    /// Where it answers DNS queries; 0: they are left alone.
    pub dns: u16,
    /// Connections from outside are redirected but to excluded ports; else only those to included ones.
    pub every_port: bool,
    /// Users whose connections are left alone, and who may listen where the proxy does.
    pub users: Vec<u32>,
    /// Groups, likewise.
    pub groups: Vec<u32>,
    /// Ports of which there is something to say, each once.
    pub ports: Vec<(u16, u32)>,
    /// Where connections are left alone.
    pub excluded: Vec<Prefix>,
    /// Where they are redirected, if not excluded.
    pub included: Vec<Prefix>,
    /// The pod's own addresses.
    pub own: Vec<IpAddr>,
}

/// The attached programs. Without settings they do nothing.
#[derive(Debug)]
pub struct Mesh {
    settings: Map<4, 12>,
    ports: Map<4, 4>,
    ranges: Map<24, 4>,
    owners: Map<8, 4>,
    events: Option<Events>,
    _attached: Attached,
}

impl Mesh {
    /// Loads and attaches them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn attach(cgroup: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> Result<Self, GuestError> {
        let mut attached = Attached::new(OBJECT, cgroup, netns)?;
        let events = Events::new(attached.map("events")?, attached.map("lost")?)?;
        Ok(Self {
            events: Some(events),
            settings: attached.map("settings")?,
            ports: attached.map("ports")?,
            ranges: attached.map("ranges")?,
            owners: attached.map("owners")?,
            _attached: attached,
        })
    }

    /// Puts settings in force, in place of none; on an error some of them may be written, but none is in force.
    ///
    /// # Errors
    /// A map is full, or the kernel refuses otherwise.
    pub fn apply(&self, settings: &Settings) -> Result<(), MapError> {
        for (port, marks) in &settings.ports {
            self.ports.put(&u32::from(*port).to_ne_bytes(), &marks.to_ne_bytes())?;
        }
        let own = settings.own.iter().map(|ip| (*ip, if ip.is_ipv4() { 32 } else { 128 }));
        let lists = [(EXCLUDED, &settings.excluded), (INCLUDED, &settings.included)];
        for (list, ranges) in lists.into_iter().chain([(OWN, &own.collect())]) {
            for range in ranges {
                self.ranges.put(&range_key(list, *range), &[0; 4])?;
            }
        }
        for (kind, ids) in [(USER, &settings.users), (GROUP, &settings.groups)] {
            for id in ids {
                self.owners.put(&owner_key(kind, *id), &[0; 4])?;
            }
        }
        self.settings.put(&ONLY, &encode(settings))
    }

    /// What is told of connections, for one reader; `None` once it was taken.
    pub fn take_events(&mut self) -> Option<Events> {
        self.events.take()
    }

    /// Takes them back: as if there had been none.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn clear(&self) -> Result<(), MapError> {
        self.settings.put(&ONLY, &[0; 12])?;
        empty(&self.ports)?;
        empty(&self.ranges)?;
        empty(&self.owners)
    }
}

fn empty<const K: usize, const V: usize>(map: &Map<K, V>) -> Result<(), MapError> {
    for key in map.keys()? {
        map.remove(&key)?;
    }
    Ok(())
}

/// `struct settings`.
fn encode(settings: &Settings) -> [u8; 12] {
    let mut value = [0; 12];
    // `enum mode`.
    let mode = u32::from(settings.capture) | u32::from(settings.observe) << 1;
    value[..4].copy_from_slice(&mode.to_ne_bytes());
    let ports = [settings.outbound, settings.inbound, settings.dns, u16::from(settings.every_port)];
    for (at, port) in value[4..].chunks_exact_mut(2).zip(ports) {
        at.copy_from_slice(&port.to_ne_bytes());
    }
    value
}

/// `struct range_key`.
fn range_key(list: u32, (address, bits): Prefix) -> [u8; 24] {
    let (address, bits) = match address {
        IpAddr::V4(address) => (address.to_ipv6_mapped(), 96 + u32::from(bits)),
        IpAddr::V6(address) => (address, u32::from(bits)),
    };
    let mut key = [0; 24];
    key[..4].copy_from_slice(&(LIST_BITS + bits).to_ne_bytes());
    key[4..8].copy_from_slice(&list.to_ne_bytes());
    key[8..].copy_from_slice(&address.octets());
    key
}

/// `struct owner_key`.
fn owner_key(kind: u32, id: u32) -> [u8; 8] {
    let mut key = [0; 8];
    key[..4].copy_from_slice(&kind.to_ne_bytes());
    key[4..].copy_from_slice(&id.to_ne_bytes());
    key
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write as _;
    use std::os::fd::AsFd as _;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn the_kernel_takes_the_programs_and_settings_go_as_they_came() {
        if !nix::unistd::geteuid().is_root() {
            // Not by a macro, whose output a harness keeps for itself when a test passes.
            let why = "\nSKIPPED programs on a cgroup: needs root\n";
            let _ = std::io::stdout().write_all(why.as_bytes());
            return;
        }
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = mounts.lines().filter(|line| line.contains(" cgroup2 "));
        let root = root.filter_map(|line| line.split(' ').nth(1)).next().unwrap();
        let cgroup = format!("{root}/joey-mesh-{}", std::process::id());
        fs::create_dir(&cgroup).unwrap();
        let test = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let netns = File::open("/proc/thread-self/ns/net").unwrap();
            let mesh = Mesh::attach(File::open(&cgroup).unwrap().as_fd(), netns.as_fd()).unwrap();
            let settings = Settings {
                capture: true,
                outbound: 15001,
                inbound: 15006,
                every_port: true,
                users: vec![1337],
                groups: vec![1337],
                ports: vec![(15090, Mark::InExcluded as u32)],
                excluded: vec![("10.0.0.0".parse().unwrap(), 8)],
                included: vec![("::".parse().unwrap(), 0)],
                own: vec!["10.1.2.3".parse().unwrap(), "fd00::1".parse().unwrap()],
                ..Settings::default()
            };
            mesh.apply(&settings).unwrap();
            assert_eq!(mesh.settings.get(&ONLY).unwrap(), Some(encode(&settings)));
            let own = range_key(OWN, ("10.1.2.3".parse().unwrap(), 32));
            assert!(mesh.ranges.get(&own).unwrap().is_some());
            mesh.clear().unwrap();
            assert_eq!(mesh.settings.get(&ONLY).unwrap(), Some([0; 12]));
            assert_eq!(mesh.ranges.keys().unwrap().len(), 0);
        };
        // The namespace ends with the thread.
        let done = std::thread::scope(|scope| scope.spawn(test).join());
        fs::remove_dir(&cgroup).unwrap();
        done.unwrap();
    }
}

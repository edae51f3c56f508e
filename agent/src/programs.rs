//! The eBPF programs that look at containers' sockets: attached once, to the cgroup that all containers are below and
//! to the network namespace they share, before the machine is saved as a template. The agent itself is outside.
//!
//! A pod's start writes maps and nothing else; without entries the programs leave everything alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use joey_ebpf::guest::GuestError;
use joey_ebpf::guest::events::Events;
use joey_ebpf::guest::mesh::{Mark, Mesh, Prefix, Settings};
use joey_ebpf::guest::services::Services;
use joey_ebpf::map::MapError;
use joey_protocol::api;

use crate::network::{HANDED_ON, link_local};

/// The network namespace of the agent's only thread.
const NETNS: &str = "/proc/self/ns/net";

/// Why the programs are not there, or do not do what they are to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramsError {
    /// What they are to be attached to cannot be opened.
    #[error("{path}: {source}")]
    Open {
        /// What.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel does not take them.
    #[error("the mesh's programs: {0}")]
    Mesh(GuestError),
    /// Nor these.
    #[error("the services' programs: {0}")]
    Services(GuestError),
    /// The request cannot be followed.
    #[error("mesh: {field} {problem}")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A map was not written.
    #[error("mesh: {0}")]
    Map(#[from] MapError),
}

impl ProgramsError {
    /// Whether the request, not the guest, is at fault.
    pub(crate) fn is_callers(&self) -> bool {
        matches!(self, Self::Invalid { .. })
    }
}

/// The programs that are attached.
#[derive(Debug)]
pub(crate) struct Programs {
    mesh: Mesh,
    events: Mutex<Option<Events>>,
    /// Services' addresses. They come after the mesh's: what those redirect is no service's any more.
    pub(crate) services: Mutex<Services>,
}

impl Programs {
    /// Loads and attaches them to the cgroup `cgroups` and the agent's network namespace.
    pub(crate) fn attach(cgroups: &Path) -> Result<Self, ProgramsError> {
        let open = |path: &Path| {
            File::open(path).map_err(|source| ProgramsError::Open { path: path.into(), source })
        };
        let (cgroup, netns) = (open(cgroups)?, open(Path::new(NETNS))?);
        let mut mesh = Mesh::attach(cgroup.as_fd(), netns.as_fd()).map_err(ProgramsError::Mesh)?;
        let events = Mutex::new(mesh.take_events());
        let services =
            Services::attach(cgroup.as_fd(), netns.as_fd()).map_err(ProgramsError::Services)?;
        Ok(Self { mesh, events, services: Mutex::new(services) })
    }

    /// Has them do what the pod asks for, before there is a container; `false` if that is nothing.
    pub(crate) fn apply(&self, request: &api::StartSandboxRequest) -> Result<bool, ProgramsError> {
        let Some(mesh) = request.mesh.as_ref() else { return Ok(false) };
        self.mesh.apply(&settings(mesh, &request.network)?)?;
        Ok(true)
    }

    /// What is told of connections; once.
    pub(crate) fn take_events(&self) -> Option<Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Takes that back.
    pub(crate) fn clear(&self) -> Result<(), ProgramsError> {
        Ok(self.mesh.clear()?)
    }
}

fn settings(mesh: &api::Mesh, network: &api::Network) -> Result<Settings, ProgramsError> {
    let mut ports: BTreeMap<u16, u32> = BTreeMap::new();
    let lists = [
        ("exclude_inbound_ports", &mesh.exclude_inbound_ports, Mark::InExcluded),
        ("include_inbound_ports", &mesh.include_inbound_ports, Mark::InIncluded),
        ("exclude_outbound_ports", &mesh.exclude_outbound_ports, Mark::OutExcluded),
        ("include_outbound_ports", &mesh.include_outbound_ports, Mark::OutIncluded),
    ];
    for (field, list, mark) in lists {
        for number in list {
            *ports.entry(port(field, *number)?).or_default() |= mark as u32;
        }
    }
    let listener = |field, number| match number {
        0 if !mesh.capture => Ok(0),
        number => port(field, number),
    };
    let own = network.interfaces.iter().flat_map(|interface| {
        let ip = |own: &api::Address| prefix("address", own).map(|(ip, _)| ip);
        let mac = Some(&interface.mac).filter(|mac| mac.len() == 6);
        let local = mac.map(|mac| api::Address { ip: link_local(mac), ..Default::default() });
        interface.addresses.iter().map(ip).chain(local.map(|local| ip(&local)))
    });
    let handed_on = mesh.capture.then_some(Ok(HANDED_ON.into()));
    let prefixes = |field, list: &[api::Address]| {
        list.iter().map(|it| prefix(field, it)).collect::<Result<Vec<_>, _>>()
    };
    Ok(Settings {
        capture: mesh.capture,
        observe: mesh.observe,
        outbound: listener("outbound_port", mesh.outbound_port)?,
        inbound: listener("inbound_port", mesh.inbound_port)?,
        dns: if mesh.dns_port == 0 { 0 } else { port("dns_port", mesh.dns_port)? },
        every_port: mesh.every_inbound_port,
        users: mesh.users.clone(),
        groups: mesh.groups.clone(),
        ports: ports.into_iter().collect(),
        excluded: prefixes("exclude_outbound", &mesh.exclude_outbound)?,
        included: prefixes("include_outbound", &mesh.include_outbound)?,
        own: own.chain(handed_on).collect::<Result<_, _>>()?,
    })
}

fn port(field: &'static str, number: u32) -> Result<u16, ProgramsError> {
    u16::try_from(number).ok().filter(|port| *port != 0).ok_or_else(|| ProgramsError::Invalid {
        field,
        problem: format!("{number} is not from 1 to 65535"),
    })
}

fn prefix(field: &'static str, address: &api::Address) -> Result<Prefix, ProgramsError> {
    let ip: Option<IpAddr> = match address.ip.len() {
        4 => <[u8; 4]>::try_from(&address.ip[..]).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(&address.ip[..]).ok().map(IpAddr::from),
        _ => None,
    };
    let most = 8 * address.ip.len() as u32;
    match (ip, u8::try_from(address.prefix)) {
        (Some(ip), Ok(bits)) if address.prefix <= most => Ok((ip, bits)),
        _ => Err(ProgramsError::Invalid {
            field,
            problem: format!("{:?}/{} is no prefix", address.ip, address.prefix),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sidecar() -> api::Mesh {
        api::Mesh {
            capture: true,
            outbound_port: 15001,
            inbound_port: 15006,
            every_inbound_port: true,
            exclude_inbound_ports: vec![15090, 80],
            include_outbound_ports: vec![80],
            include_outbound: vec![api::Address { ip: vec![0; 4], ..Default::default() }],
            ..Default::default()
        }
    }

    #[test]
    fn a_request_is_made_settings() {
        let own = api::Address { ip: vec![10, 0, 0, 2], prefix: 24, ..Default::default() };
        let mac = vec![2, 0, 0, 0, 0, 2];
        let interface = api::Interface { addresses: vec![own], mac, ..Default::default() };
        let network = api::Network { interfaces: vec![interface], ..Default::default() };
        let settings = settings(&sidecar(), &network).unwrap();
        let both = Mark::InExcluded as u32 | Mark::OutIncluded as u32;
        assert_eq!(settings.ports, [(80, both), (15090, Mark::InExcluded as u32)]);
        let own = ["10.0.0.2", "fe80::ff:fe00:2", "::6"].map(|own| own.parse::<IpAddr>().unwrap());
        assert_eq!(settings.own, own);
        assert_eq!(settings.included, [("0.0.0.0".parse().unwrap(), 0)]);
    }

    #[test]
    fn what_cannot_be_is_the_callers_fault() {
        let faults: [fn(&mut api::Mesh); 5] = [
            |mesh| mesh.outbound_port = 0,
            |mesh| mesh.inbound_port = 65536,
            |mesh| mesh.exclude_outbound_ports.push(0),
            |mesh| mesh.include_outbound[0].prefix = 33,
            |mesh| mesh.include_outbound[0].ip.clear(),
        ];
        for (index, fault) in faults.iter().enumerate() {
            let mut mesh = sidecar();
            fault(&mut mesh);
            let error = settings(&mesh, &api::Network::new()).unwrap_err();
            assert!(error.is_callers(), "fault {index}: {error}");
        }
    }
}

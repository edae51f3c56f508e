//! A packet's time in the programs, by BPF_PROG_TEST_RUN: caches are warm, and the kernel around is left out.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context as _, Result, ensure};
use joey_ebpf::policy::abi::{Identity, OtherEnd, Pod, Ports, Prefix, Rule, Scope, Side};
use joey_ebpf::policy::loader::Policy;
use joey_ebpf::policy::maps::Lock;

use super::super::stats::Samples;
use crate::lab::{Join, Lab};

const REPEAT: u32 = 200_000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ROUTER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const OWN: Ipv4Addr = Ipv4Addr::new(10, 9, 1, 2);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 9, 2, 2);
/// The pod's number.
const POD: u16 = 1;

pub(super) fn measure(runs: usize, samples: &mut Samples) -> Result<()> {
    // For its lock: these maps are pinned nowhere.
    let lab = Lab::new()?;
    let config = lab.config(Join::Policy);
    let mut first = lab.pod(1)?;
    lab.wire(&mut first, &config)?;
    let lock = Lock::take(&config.bpf_dir).context("lock the policy")?;
    let policy = Policy::load_to_run()?;
    let other_end = Some(OtherEnd { mac: ROUTER, direct: false });
    let (tenant, mac) = (1, MAC);
    let pod = Pod { since: 0, name: 0, tenant, space: 0, table: 0, limited: false, mac, other_end };
    let own: [IpAddr; 1] = [OWN.into()];
    let maps = &policy.maps;
    ensure!(maps.add_pod(POD, &pod, &own)?, "the number is taken");
    let identity = Identity { tenant: 2, ..Identity::default() };
    maps.put_identity(1, Prefix { address: OTHER.into(), bits: 32 }, identity)?;
    maps.put_rule(1, &Rule { scope: Scope::Tenants { from: 1, to: 2 }, ports: Ports::Any })?;
    maps.activate(&lock, 1)?;
    let out = datagram(MAC, ROUTER, OWN, OTHER, 1000, 53);
    let into = datagram(ROUTER, MAC, OTHER, OWN, 53, 1000);
    let spoofed = datagram(MAC, ROUTER, OTHER, OWN, 1000, 53);
    let runs_of = [
        ("packet_from_vm", Side::Vm, out),
        ("packet_to_vm", Side::Peer, into),
        ("packet_spoofed", Side::Vm, spoofed),
    ];
    for _ in 0..runs {
        for (metric, side, frame) in &runs_of {
            let outcome = policy.run(*side, POD, frame, REPEAT)?;
            samples.add("joey", metric, "ns", outcome.time.as_nanos() as f64);
        }
    }
    Ok(())
}

/// A UDP datagram of 100 bytes in its frame.
fn datagram(
    from: [u8; 6],
    to: [u8; 6],
    source: Ipv4Addr,
    destination: Ipv4Addr,
    source_port: u16,
    port: u16,
) -> Vec<u8> {
    const DATA: u16 = 100;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + 8 + DATA).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(source.octets());
    ip.extend(destination.octets());
    let sum = ip
        .chunks(2)
        .fold(0_u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let folded = (sum & 0xFFFF) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    let udp = [source_port, port, 8 + DATA, 0].map(u16::to_be_bytes).concat();
    [&to[..], &from, &[8, 0], &ip, &udp, &[0; DATA as usize]].concat()
}

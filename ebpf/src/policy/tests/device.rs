//! The programs on real devices: which pod is judged for, where packets go, and what BPF_PROG_TEST_RUN
//! cannot give to a program.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike as _, sendto, socket,
};

use super::cases::*;
use super::frames::*;
use super::{Model, World, alone, tell};
use crate::attach::Hook;
use crate::attach::{carry, detach, partner};
use crate::netlink::{Message, Socket};
use crate::policy::Reason;
use crate::policy::abi::Side;
use crate::policy::attach::attach;
use crate::policy::loader::Policy;
use crate::route;

/// Indices of the pod's interface and of the device that stands for the node's end of it. Those of the
/// tap and of the VM's end are their partners.
const ETH0: u32 = 5;
const NODE: u32 = 6;
/// More than 8 bits.
const POD_ID: u16 = 0xABCD;

/// Makes a pair of devices, which are up; not where the kernel has none to make.
fn pair(netlink: &mut Socket, one: u32, other: u32) -> bool {
    let header = |index: u32| {
        let mut header = [0; route::LINK];
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        header
    };
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let make = Message::new("make a pair", libc::RTM_NEWLINK, flags, &header(one)).nest(
        libc::IFLA_LINKINFO,
        |info| {
            info.text(libc::IFLA_INFO_KIND, "veth").nest(libc::IFLA_INFO_DATA, |data| {
                // VETH_INFO_PEER
                data.attribute(1, &header(other))
            })
        },
    );
    match netlink.request(make) {
        Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => return false,
        made => made.unwrap(),
    }
    for index in [one, other] {
        netlink.request(route::link("set it up", libc::RTM_NEWLINK, index, true)).unwrap();
    }
    true
}

/// The address for sending through the device with this index.
fn link(index: u32) -> LinkAddr {
    let all = nix::ifaddrs::getifaddrs().unwrap();
    let mut links = all.filter_map(|interface| interface.address?.as_link_addr().copied());
    let link = links.find(|link| link.ifindex() == index as usize).unwrap();
    assert_eq!(link.family(), Some(AddressFamily::Packet));
    link
}

/// Packets that the device with this index has got.
fn received(index: u32) -> u64 {
    let names = nix::ifaddrs::getifaddrs().unwrap().filter(|interface| {
        let link = interface.address.as_ref().and_then(|address| address.as_link_addr());
        link.is_some_and(|link| link.ifindex() == index as usize)
    });
    let name = names.map(|interface| interface.interface_name).next().unwrap();
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = table.lines().find_map(|line| line.trim().strip_prefix(&format!("{name}:")));
    line.unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// One sender on either side of a pod, in a network namespace of their own.
struct Wires {
    policy: Policy,
    model: Model,
    socket: OwnedFd,
}

impl Wires {
    fn send(&mut self, sender: Side, frame: &[u8]) -> Result<(), Reason> {
        let (through, to) = match sender {
            Side::Vm => (partner(NODE), NODE),
            Side::Peer => (NODE, partner(NODE)),
        };
        let (before, arrived) = (self.policy.maps.counters(POD_ID).unwrap().unwrap(), received(to));
        let descriptor = self.socket.as_raw_fd();
        let sent = sendto(descriptor, frame, &link(through), MsgFlags::empty()).unwrap();
        assert_eq!(sent, frame.len());
        let after = self.policy.maps.counters(POD_ID).unwrap().unwrap();
        let side = sender as usize;
        let allowed = after.packets[side] - before.packets[side];
        assert_eq!(received(to) - arrived, allowed, "what is allowed arrives, and nothing else");
        let mut dropped = Reason::ALL
            .iter()
            .filter(|reason| after.dropped(sender, **reason) != before.dropped(sender, **reason));
        match (allowed, dropped.next()) {
            (1, None) => {
                assert_eq!(after.bytes[side] - before.bytes[side], frame.len() as u64);
                Ok(())
            }
            (0, Some(reason)) => Err(*reason),
            other => panic!("{other:?} of {frame:02x?}"),
        }
    }

    /// As the model decides, too.
    fn check(&mut self, sender: Side, frame: &[u8], expected: Result<(), Reason>) {
        assert_eq!(self.send(sender, frame), expected, "{frame:02x?}");
        assert_eq!(self.model.judge(sender, POD_ID, frame, super::now()), expected);
    }
}

fn judged_on_devices() {
    let Some(World { .. }) = World::new("the policy on devices") else { return };
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    // Else the kernel sends its own reports through new devices.
    if let Err(error) = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1") {
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
    }
    let mut netlink = Socket::open().unwrap();
    if !pair(&mut netlink, ETH0, NODE) || !pair(&mut netlink, partner(ETH0), partner(NODE)) {
        tell("SKIPPED the policy on devices: this kernel makes no veth devices");
        return;
    }

    let mut world = World::of(Policy::load().unwrap());
    node(&mut world);
    let pod = world.model.pods[&1];
    let own = world.model.addresses.iter().filter(|(id, _)| *id == 1);
    let own: Vec<_> = own.map(|(_, address)| *address).collect();
    world.pod(POD_ID, pod, &own);
    world.apply();
    let World { mut policy, model, .. } = world;
    for (sender, index) in [(Side::Vm, partner(ETH0)), (Side::Peer, ETH0)] {
        carry(&mut netlink, index).unwrap();
        let program = policy.classifier(sender).unwrap().fd().unwrap().as_fd();
        netlink.request(attach(index, Hook::Enters, program, POD_ID)).unwrap();
    }
    let kind = SockType::Raw;
    let socket = socket(AddressFamily::Packet, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let mut wires = Wires { policy, model, socket };

    for net in nets() {
        let (ask, answer) = (Ip::new(net.own, net.blue, TCP), Ip::new(net.blue, net.own, TCP));
        let open = out(ask, &tcp(1000, 80, SYN));
        wires.check(Side::Peer, &into(answer, &tcp(80, 1000, SYN | ACK)), Err(Reason::NoFlow));
        wires.check(Side::Vm, &open, Ok(()));
        wires.check(Side::Peer, &into(answer, &tcp(80, 1000, SYN | ACK)), Ok(()));
        wires.check(Side::Vm, &out(ask, &tcp(1000, 81, SYN)), Err(Reason::Tenant));
        let spoofed = Ip::new(net.friend, net.blue, TCP);
        wires.check(Side::Vm, &out(spoofed, &tcp(1000, 80, SYN)), Err(Reason::SpoofedAddress));
        // Cut in the IP header, of which a test run needs all.
        let head = if net.own.is_ipv4() { 20 } else { 40 };
        for length in 1..head {
            wires.check(Side::Vm, &open[..IP + length], Err(Reason::Truncated));
        }
        // The kernel takes the tag off before the programs see the frame.
        for kind in [0x8100_u16, 0x88A8] {
            let mut tagged = open.clone();
            tagged.splice(12..12, [&kind.to_be_bytes()[..], &[0, 5]].concat());
            let seen = wires.send(Side::Vm, &tagged);
            assert_eq!(seen, Err(Reason::Vlan), "{tagged:02x?}");
        }
    }
    // Without its entry a pod has nothing, at once; and a filter without classid is nobody's.
    let open = out(Ip::new(nets()[0].own, nets()[0].friend, TCP), &tcp(1, 2, SYN));
    wires.check(Side::Vm, &open, Ok(()));
    let strays = wires.policy.maps.counters(0).unwrap().unwrap().dropped(Side::Vm, Reason::NoPod);
    wires.policy.maps.remove_pod(&alone(), POD_ID, &own).unwrap();
    let arrived = received(NODE);
    sendto(wires.socket.as_raw_fd(), &open, &link(partner(NODE)), MsgFlags::empty()).unwrap();
    let after = wires.policy.maps.counters(0).unwrap().unwrap().dropped(Side::Vm, Reason::NoPod);
    assert_eq!((after - strays, received(NODE)), (1, arrived));
    detach(&mut netlink, ETH0).unwrap();
    tell("judged on devices, by classid");
}

#[test]
fn devices_belong_to_the_pods_of_their_filters() {
    // A thread of its own, which takes its network namespace with it.
    std::thread::spawn(judged_on_devices).join().unwrap();
}

//! Frames for the interface's other end go past the interface, unless somebody there would miss them.

use joey_ebpf::policy::abi::{Identity, Prefix};
use joey_ebpf::policy::maps::Lock;

use super::*;

/// A plugged pod under the policy, to which the node's address is one of its own tenant.
struct Joined {
    lab: Lab,
    wire: Wire,
    place: PodNetwork,
    maps: Maps,
}

impl Joined {
    fn new(mut lab: Lab) -> Self {
        lab.config.isolation = true;
        let mut place = None;
        let who = Applicant { tenant: "blue".to_owned(), ..Applicant::default() };
        let record = |taken: &PodNetwork| {
            place = Some(taken.clone());
            Ok(())
        };
        let wire = Wire::plug(&lab.path("p"), &lab.config, None, &who, record).unwrap();
        wire.open().unwrap();
        let (dir, place) = (&lab.config.bpf_dir, place.unwrap());
        let (maps, lock) = (Maps::open(dir).unwrap(), Lock::take(dir).unwrap());
        let tenant = maps.pod(place.id).unwrap().unwrap().tenant;
        let identity = Identity { tenant, ..Identity::default() };
        maps.put_identity(1, Prefix { address: v4(1).ip(), bits: 32 }, identity).unwrap();
        maps.activate(&lock, 1).unwrap();
        drop(lock);
        Self { lab, wire, place, maps }
    }

    /// The other end, if frames are handed to it.
    fn direct(&self) -> Option<[u8; 6]> {
        let other_end = self.maps.pod(self.place.id).unwrap().unwrap().other_end;
        other_end.filter(|end| end.direct).map(|end| end.mac)
    }

    fn limit(&self, egress_bits: u64) {
        Wire::limit(&self.lab.path("p"), Some(&self.place), &limits(egress_bits, 0)).unwrap();
    }

    fn tc(&self, command: &str) {
        run(&format!("tc -n {} {command}", self.lab.name("p")));
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let _ = Wire::unplug(&self.lab.path("p"));
        let _ = Wire::dismiss(&self.place);
    }
}

fn mac(lab: &Lab, role: &str, device: &str) -> [u8; 6] {
    let shown = lab.ip(role, &format!("-o link show {device}"));
    let text = shown.split_once("link/ether ").unwrap().1.split(' ').next().unwrap();
    let bytes: Vec<u8> = text.split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

/// Sends everything that leaves the interface where nobody takes it.
const EVERYTHING: &str =
    "dev eth0 egress prio 5 u32 match u8 0 0 action mirred egress redirect dev lo";

#[test]
fn frames_go_past_the_interface_until_it_shapes_them() {
    let Some(lab) = Lab::with_interface() else { return };
    let pod = Joined::new(lab);
    let lab = &pod.lab;
    let guest = start_guest(lab, &pod.wire);
    let host = mac(lab, "n", "host0");
    assert_eq!(pod.direct(), Some(host));
    echo(lab, "n", "g", v4(1));
    echo(lab, "g", "n", v4(2));
    let connect = || {
        let listener = lab.inside("n", || TcpListener::bind(v4(1)).unwrap());
        let limit = Duration::from_millis(500);
        let result = lab.inside("g", || TcpStream::connect_timeout(&v4(1), limit));
        drop(listener);
        result.map(drop).map_err(|error| error.kind())
    };
    // What leaves the interface is thrown away: nothing does.
    pod.tc(&format!("filter add {EVERYTHING}"));
    assert_eq!(connect(), Ok(()));
    pod.limit(10_000_000);
    assert_eq!((pod.direct(), connect()), (None, Err(io::ErrorKind::TimedOut)));
    // The filter would miss them.
    pod.limit(0);
    assert_eq!((pod.direct(), connect()), (None, Err(io::ErrorKind::TimedOut)));
    pod.tc("filter del dev eth0 egress prio 5");
    pod.limit(0);
    assert_eq!((pod.direct(), connect()), (Some(host), Ok(())));
    drop(guest);
}

#[test]
fn frames_pass_an_interface_that_somebody_else_uses() {
    for command in ["qdisc add dev eth0 clsact", "qdisc add dev eth0 root handle 1: pfifo"] {
        let Some(lab) = Lab::with_interface() else { return };
        run(&format!("tc -n {} {command}", lab.name("p")));
        let watched = command.ends_with("clsact");
        if watched {
            run(&format!("tc -n {} filter add {EVERYTHING}", lab.name("p")));
        }
        assert_eq!(Joined::new(lab).direct(), None, "{command}");
    }
}

#[test]
fn frames_pass_the_interface_unless_the_operator_says_so() {
    let Some(mut lab) = Lab::with_interface() else { return };
    lab.config.direct = false;
    let pod = Joined::new(lab);
    assert_eq!(pod.direct(), None);
    pod.limit(0);
    assert_eq!(pod.direct(), None);
}

#[test]
fn frames_pass_an_interface_whose_other_end_is_here() {
    let Some(lab) = Lab::new() else { return };
    lab.ip("p", "link add eth0 type veth peer name host0");
    lab.ip("p", "addr add 10.9.0.2/24 dev eth0");
    assert_eq!(Joined::new(lab).direct(), None);
}

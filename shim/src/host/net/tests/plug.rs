//! How a pod is plugged, and what that leaves to others.

use super::*;

/// What the wire has sent to the VM within a second.
fn frames(wire: &Wire) -> Vec<Vec<u8>> {
    let mut tap = File::from(wire.tap_fd().unwrap());
    let end = Instant::now() + Duration::from_secs(1);
    let mut frames = Vec::new();
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        let mut ready = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::try_from(left).unwrap()).unwrap() > 0 {
            let mut frame = vec![0; 70_000];
            let length = tap.read(&mut frame).unwrap();
            frame.truncate(length);
            frames.push(frame);
        }
    }
    frames
}

#[test]
fn the_hosts_stack_says_nothing_on_the_tap() {
    let Some(lab) = Lab::with_interface() else { return };
    let wire = lab.plug().unwrap();
    let link = lab.ip("p", &format!("-o link show {TAP}"));
    let (_, mac) = link.split_once("link/ether ").unwrap();
    let mac: Vec<u8> =
        mac[..17].split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    for frame in frames(&wire) {
        assert!(!frame.windows(6).any(|bytes| bytes == mac), "{frame:02x?}");
    }
    assert_eq!(lab.ip("p", &format!("-o addr show {TAP}")), "");
}

/// The calling thread's scheduling policy (proc(5), `/proc/[pid]/stat`, field 41).
fn scheduling() -> i32 {
    let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').nth(41 - 3).unwrap().parse().unwrap()
}

#[test]
fn only_the_thread_that_plugs_is_in_a_hurry() {
    let Some(mut lab) = Lab::with_interface() else { return };
    lab.config.isolation = true;
    let possible = thread::spawn(|| sys::hurry().is_ok()).join().unwrap();
    let expected = if possible { libc::SCHED_RR } else { libc::SCHED_OTHER };
    let (mut plugging, mut place) = (None, None);
    let record = |taken: &PodNetwork| {
        plugging = Some(scheduling());
        place = Some(taken.clone());
        Ok(())
    };
    let wire =
        Wire::plug(&lab.path("p"), &lab.config, None, &Applicant::default(), record).unwrap();
    assert_eq!((plugging, scheduling()), (Some(expected), libc::SCHED_OTHER));
    drop(wire);
    Wire::dismiss(&place.unwrap()).unwrap();
}

#[test]
fn the_nodes_addresses_are_listed_unless_somebody_keeps_them() {
    let Some(mut lab) = Lab::with_interface() else { return };
    lab.config.isolation = true;
    let dir = lab.config.bpf_dir.clone();
    joey_ebpf::loader::load(&dir, || Ok(())).unwrap();
    let (netns, config) = (lab.path("p"), lab.config.clone());
    let node = || {
        lab.inside("n", || plug(&netns, &config).unwrap());
        Maps::open(&dir).unwrap().locals().unwrap().contains_key(&v4(1).ip())
    };
    let keeper = Keeper::take(&dir).unwrap().unwrap();
    assert!(Keeper::take(&dir).unwrap().is_none(), "there is one");
    assert!(!node(), "the keeper's own business");
    drop(keeper);
    assert!(node());
}

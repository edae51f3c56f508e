//! Neighbour discovery and what else keeps an IPv6 link working.

use super::cases::*;
use super::frames::*;
use super::table::{Table, Yes};
use super::{Decision, ip};
use crate::policy::Reason::*;

const OWN: &str = "fd00::1";
const FRIEND: &str = "fd00::2";
const ROUTER: u8 = 133;
const ASK: u8 = 135;
const TELL: u8 = 136;

fn from(source: &str, destination: &str) -> Ip {
    Ip::new(ip(source), ip(destination), ICMP6).hops(255)
}

#[test]
fn neighbours_tell_the_truth() {
    let Some(mut t) = Table::new("the policy's table of neighbour discovery") else { return };
    let (group, link) = ("ff02::1:ff00:2", "fe80::1");
    let (mine, others) = (link_option(1, POD), link_option(1, OTHER));
    let (my_target, others_target) = (link_option(2, POD), link_option(2, OTHER));
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    let spoofed: Decision = Err(SpoofedNeighbour);
    let cases: [(&str, Ip, Vec<u8>, Decision); 28] = [
        ("asks", from(OWN, group), discovery(ASK, Some(FRIEND), &mine), Ok(())),
        ("asks from the link's", from(link, group), discovery(ASK, Some(FRIEND), &mine), Ok(())),
        ("asks one", from(OWN, FRIEND), discovery(ASK, Some(FRIEND), &[]), Ok(())),
        (
            "asks as another",
            from(FRIEND, group),
            discovery(ASK, Some(OWN), &mine),
            Err(SpoofedAddress),
        ),
        ("asks for another", from(OWN, group), discovery(ASK, Some(FRIEND), &others), spoofed),
        (
            "another's target option",
            from(OWN, group),
            discovery(ASK, Some(FRIEND), &others_target),
            spoofed,
        ),
        (
            "two options, one another's",
            from(OWN, group),
            discovery(ASK, Some(FRIEND), &[&mine[..], &others].concat()),
            spoofed,
        ),
        ("wants its address", from("::", group), discovery(ASK, Some(OWN), &[]), Ok(())),
        ("wants it with a nonce", from("::", group), discovery(ASK, Some(OWN), &nonce), Ok(())),
        ("wants another's", from("::", group), discovery(ASK, Some(FRIEND), &[]), spoofed),
        ("wants it with a MAC", from("::", group), discovery(ASK, Some(OWN), &mine), spoofed),
        ("tells", from(OWN, FRIEND), discovery(TELL, Some(OWN), &my_target), Ok(())),
        ("tells all", from(OWN, "ff02::1"), discovery(TELL, Some(OWN), &my_target), Ok(())),
        (
            "tells of the link's",
            from(OWN, "ff02::1"),
            discovery(TELL, Some(link), &my_target),
            Ok(()),
        ),
        (
            "tells another's MAC",
            from(OWN, FRIEND),
            discovery(TELL, Some(OWN), &others_target),
            spoofed,
        ),
        (
            "tells another's address",
            from(OWN, FRIEND),
            discovery(TELL, Some(FRIEND), &my_target),
            spoofed,
        ),
        (
            "tells of the router",
            from(OWN, "ff02::1"),
            discovery(TELL, Some("fe80::fe"), &my_target),
            spoofed,
        ),
        (
            "tells from none",
            from("::", "ff02::1"),
            discovery(TELL, Some(OWN), &my_target),
            Err(SpoofedAddress),
        ),
        (
            "tells as another",
            from(FRIEND, OWN),
            discovery(TELL, Some(OWN), &my_target),
            Err(SpoofedAddress),
        ),
        ("looks for routers", from(link, "ff02::2"), discovery(ROUTER, None, &mine), Ok(())),
        ("looks from none", from("::", "ff02::2"), discovery(ROUTER, None, &[]), Ok(())),
        ("looks for another", from(link, "ff02::2"), discovery(ROUTER, None, &others), spoofed),
        (
            "looks from none with a MAC",
            from("::", "ff02::2"),
            discovery(ROUTER, None, &mine),
            spoofed,
        ),
        ("is a router", from(link, "ff02::1"), discovery(134, None, &[0; 8]), Err(Router)),
        ("is a router, one's", from(OWN, FRIEND), discovery(134, None, &[0; 8]), Err(Router)),
        ("redirects", from(link, FRIEND), discovery(137, Some(OWN), &[0; 16]), Err(Router)),
        ("echo from none", from("::", FRIEND), icmp(128, 1, &[]), Err(SpoofedAddress)),
        ("an error from none", from("::", FRIEND), icmp(1, 0, &[0; 48]), Err(SpoofedAddress)),
    ];
    for (name, ip, body, expected) in cases {
        t.sends(name, out(ip, &body), expected);
    }
    for (kind, target) in [(ASK, Some(FRIEND)), (TELL, Some(OWN)), (ROUTER, None)] {
        let (good, ip) = (discovery(kind, target, &[]), from(OWN, group));
        let with_options = |options: &[u8]| out(ip, &[&good[..], options].concat());
        for hops in [0, 1, 64, 254] {
            t.sends("from beyond the link", out(ip.hops(hops), &good), Neighbour);
        }
        t.sends("another code", out(ip, &with(good.clone(), 1, &[1])), Neighbour);
        for length in [0, 7] {
            t.sends("cut", out(ip, &good[..length]), Truncated);
        }
        if target.is_some() {
            for length in [8, 23] {
                t.sends("cut in its target", out(ip, &good[..length]), Truncated);
            }
        }
        for length in [1, 2, 7, 9, 15] {
            let options = [&nonce[..], &nonce].concat();
            t.sends("cut options", with_options(&options[..length]), Neighbour);
        }
        t.sends("an option without length", with_options(&[14, 0, 0, 0, 0, 0, 0, 0]), Neighbour);
        t.sends("a MAC without length", with_options(&[1, 0, 0, 0, 0, 0, 0, 0]), Neighbour);
        t.sends(
            "a long MAC",
            with_options(&[&with(mine.clone(), 1, &[2])[..], &nonce].concat()),
            Neighbour,
        );
        t.sends("an option beyond the end", with_options(&[14, 2, 0, 0, 0, 0, 0, 0]), Neighbour);
        t.sends("2 options", with_options(&[nonce; 2].concat()), Yes);
        t.sends("3 options", with_options(&[nonce; 3].concat()), Neighbour);
        t.sends("an option of others", with_options(&with(nonce.to_vec(), 0, &[99])), Neighbour);
        let long = [&with(nonce.to_vec(), 1, &[2])[..], &nonce].concat();
        t.sends("a long nonce", with_options(&long), Neighbour);
        let hidden = [&nonce[..], &others].concat();
        t.sends("the last is another's", with_options(&hidden), SpoofedNeighbour);
        for piece in [(1, 0, true), (1, 0, false)] {
            let ip = ip.fragment(piece.0, piece.1, piece.2);
            t.sends("in pieces", out(ip, &good), Fragment);
        }
    }
    t.end(80);
}

#[test]
fn what_comes_from_the_link_is_well_formed() {
    let Some(mut t) = Table::new("the policy's table of the link") else { return };
    let (neighbour, all) = ("fe80::9", "ff02::1");
    let (mac, ip) = (link_option(1, OTHER), from(neighbour, OWN));
    t.gets("is asked", into(ip, &discovery(ASK, Some(OWN), &mac)), Yes);
    t.gets("is asked by all", into(from(neighbour, all), &discovery(ASK, Some(OWN), &mac)), Yes);
    t.gets("is told", into(ip, &discovery(TELL, Some(neighbour), &mac)), Yes);
    t.gets("somebody wants", into(from("::", all), &discovery(ASK, Some(FRIEND), &[])), Yes);
    t.gets(
        "for another",
        into(from(neighbour, FRIEND), &discovery(ASK, Some(OWN), &mac)),
        NotForPod,
    );
    t.gets("a router", into(from("fe80::fe", all), &discovery(134, None, &[0; 8])), Router);
    t.gets("a redirect", into(from("fe80::fe", OWN), &discovery(137, Some(OWN), &[0; 16])), Router);
    for kind in [131, 132, 133, 143] {
        t.gets("not for pods", into(ip, &discovery(kind, Some(OWN), &[])), IcmpType);
    }
    for kind in [ASK, TELL] {
        let good = discovery(kind, Some(OWN), &[]);
        t.gets("from beyond the link", into(ip.hops(254), &good), Neighbour);
        t.gets("another code", into(ip, &with(good.clone(), 1, &[1])), Neighbour);
        t.gets("cut", into(ip, &good[..23]), Truncated);
        t.gets("in pieces", into(ip.fragment(1, 0, false), &good), Fragment);
    }
    // Multicast listeners: hop-by-hop options before, as routers want.
    let report = |kind, source: &str, hops, destination: &str| {
        let head = [&[ICMP6, 0, 5, 2, 0, 0, 1, 0][..], &discovery(kind, Some(all), &[])].concat();
        (Ip { proto: 0, ..from(source, destination).hops(hops) }, head)
    };
    for kind in [131, 132, 143] {
        for source in ["::", "fe80::1"] {
            let (ip, body) = report(kind, source, 1, "ff02::16");
            t.sends("listens", out(ip, &body), Yes);
        }
        for (source, hops, to, expected) in [
            ("fe80::2", 1, "ff02::16", SpoofedAddress),
            ("fe80::1", 2, "ff02::16", Neighbour),
            ("fe80::1", 1, FRIEND, Neighbour),
        ] {
            let (ip, body) = report(kind, source, hops, to);
            t.sends("listens wrongly", out(ip, &body), expected);
        }
    }
    let (ip, body) = report(130, "fe80::1", 1, all);
    t.sends("asks who listens", out(ip, &body), IcmpType);
    let (ip, body) = report(130, neighbour, 1, all);
    t.gets("is asked who listens", into(ip, &body), Yes);
    t.gets("is asked from beyond", into(ip.hops(64), &body), Neighbour);
    t.gets("is asked with little", into(ip, &body[..31]), Truncated);
    t.end(35);
}

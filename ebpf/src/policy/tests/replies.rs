//! What belongs to a flow and what does not: replies, fragments, and ICMP errors.

use std::net::IpAddr;

use super::cases::*;
use super::frames::*;
use super::table::{Table, Yes};
use super::{Decision, ip};
use crate::policy::Reason::*;
use crate::policy::abi::{Side, State};

/// A conversation between the pod's port 50000 and a peer's port.
#[derive(Clone, Copy)]
struct Talk {
    own: IpAddr,
    peer: IpAddr,
    port: u16,
}

impl Talk {
    fn all(peer: impl Fn(&Net) -> IpAddr, port: u16) -> [Self; 2] {
        nets().map(|net| Self { own: net.own, peer: peer(&net), port })
    }

    fn tcp(self, sender: Side, flags: u8) -> Vec<u8> {
        match sender {
            Side::Vm => out(Ip::new(self.own, self.peer, TCP), &tcp(50000, self.port, flags)),
            Side::Peer => into(Ip::new(self.peer, self.own, TCP), &tcp(self.port, 50000, flags)),
        }
    }

    fn udp(self, sender: Side) -> Vec<u8> {
        match sender {
            Side::Vm => out(Ip::new(self.own, self.peer, UDP), &udp(50000, self.port, b"ask")),
            Side::Peer => into(Ip::new(self.peer, self.own, UDP), &udp(self.port, 50000, b"yes")),
        }
    }
}

fn steps(t: &mut Table, talk: Talk, steps: &[(Side, u8, Decision)]) {
    for (index, &(sender, flags, expected)) in steps.iter().enumerate() {
        let name = format!("step {index} with {}", talk.peer);
        t.sent(sender, 1, &name, &talk.tcp(sender, flags), expected);
    }
}

const VM: Side = Side::Vm;
const PEER: Side = Side::Peer;
const OK: Decision = Ok(());
const NO: Decision = Err(NoFlow);

#[test]
fn tcp_opens_by_syn_only() {
    let Some(mut t) = Table::new("the policy's table of TCP") else { return };
    // With a friend everything is allowed, but not without a beginning.
    for talk in Talk::all(|net| net.friend, 80) {
        for sender in [VM, PEER] {
            for flags in [ACK, ACK | PSH, SYN | ACK, FIN | ACK, RST, RST | ACK] {
                steps(&mut t, talk, &[(sender, flags, NO)]);
            }
        }
        for (opener, other) in [(VM, PEER), (PEER, VM)] {
            let open = [(opener, SYN, OK), (other, SYN | ACK, OK), (opener, ACK, OK)];
            // A life: opened with a repetition, used, finished by both, and opened anew.
            steps(&mut t, talk, &[(opener, SYN, OK), (opener, ACK, NO), (other, ACK, NO)]);
            steps(
                &mut t,
                talk,
                &[(other, FIN | ACK, NO), (other, SYN, NO), (opener, SYN | ACK, NO)],
            );
            steps(&mut t, talk, &open);
            steps(&mut t, talk, &[(other, ACK | PSH, OK), (opener, ACK, OK), (other, SYN, NO)]);
            steps(&mut t, talk, &[(other, SYN | ACK, OK), (opener, SYN | ACK, NO)]);
            // One side's end leaves the other's.
            steps(&mut t, talk, &[(opener, FIN | ACK, OK), (other, ACK | PSH, OK)]);
            t.world.age(7000);
            steps(&mut t, talk, &[(other, ACK | PSH, OK), (other, SYN, NO)]);
            steps(&mut t, talk, &[(other, FIN | ACK, OK), (opener, ACK, OK)]);
            t.world.age(40);
            steps(&mut t, talk, &[(opener, ACK, NO), (other, ACK, NO)]);
            // Closed, it may be opened by either.
            steps(&mut t, talk, &open);
            steps(&mut t, talk, &[(opener, RST, OK), (other, ACK, OK), (other, SYN, OK)]);
            steps(&mut t, talk, &[(opener, RST | ACK, OK), (opener, SYN, OK)]);
            t.world.forget();
            // Refused, and given up.
            steps(&mut t, talk, &[(opener, SYN, OK), (other, RST | ACK, OK), (opener, SYN, OK)]);
            steps(&mut t, talk, &[(opener, RST, OK), (other, SYN | ACK, OK)]);
            t.world.forget();
            // Never answered.
            steps(&mut t, talk, &[(opener, SYN, OK)]);
            t.world.age(70);
            steps(
                &mut t,
                talk,
                &[(other, SYN | ACK, NO), (opener, SYN, OK), (other, SYN | ACK, OK)],
            );
            t.world.age(7600);
            steps(&mut t, talk, &[(opener, ACK, NO), (other, ACK, NO)]);
            t.world.forget();
        }
    }
    t.end(150);
}

#[test]
fn replies_need_more_than_a_port() {
    let Some(mut t) = Table::new("the policy's table of replies") else { return };
    let no = Err(Tenant);
    for talk in Talk::all(|net| net.blue, 80) {
        // From the allowed port, without anybody having asked.
        for flags in [ACK, SYN | ACK, ACK | PSH, RST, FIN | ACK] {
            steps(&mut t, talk, &[(PEER, flags, NO)]);
        }
        steps(&mut t, talk, &[(PEER, SYN, no), (VM, SYN, OK), (PEER, SYN, NO)]);
        steps(&mut t, talk, &[(PEER, SYN | ACK, OK), (VM, ACK, OK), (PEER, ACK, OK)]);
        // Neither from another port nor to one, nor from another address.
        let other = Talk { port: 81, ..talk };
        steps(&mut t, other, &[(PEER, SYN | ACK, NO), (PEER, ACK, NO)]);
        let ip = Ip::new(talk.peer, talk.own, TCP);
        t.gets("to another port", into(ip, &tcp(80, 50001, ACK)), NoFlow);
        t.gets("with ports swapped", into(ip, &tcp(50000, 80, ACK)), NoFlow);
        let green = if talk.own.is_ipv4() { nets()[0].green } else { nets()[1].green };
        t.gets("from another", into(Ip::new(green, talk.own, TCP), &tcp(80, 50000, ACK)), NoFlow);
        // UDP on the same ports is another flow.
        t.sent(PEER, 1, "by UDP", &talk.udp(PEER), no);
        // After a reset the peer may not open.
        steps(&mut t, talk, &[(PEER, RST | ACK, OK), (PEER, SYN, no), (VM, SYN, OK)]);
        steps(&mut t, talk, &[(PEER, SYN | ACK, OK)]);
        // A changed policy ends the flow, in both directions; and it may come back.
        t.world.disallow(web().0, web().1);
        steps(&mut t, talk, &[(VM, ACK, no), (PEER, ACK, no), (VM, SYN, no)]);
        t.world.allow(web().0, web().1);
        steps(&mut t, talk, &[(VM, ACK, OK), (PEER, ACK, OK)]);
        // The flow is pod 1's; pod 2 has the other end of it, and its own.
        let kind = if talk.own.is_ipv4() { IPV4 } else { IPV6 };
        let answer = Ip::new(talk.peer, talk.own, TCP).packet(&tcp(80, 50000, ACK));
        t.sent(VM, 2, "of another pod", &ethernet(POD, OTHER, kind, &answer), NO);
        let ask = Ip::new(talk.own, talk.peer, TCP).packet(&tcp(50000, 80, SYN));
        t.sent(PEER, 2, "to the other pod", &ethernet(OTHER, POD, kind, &ask), OK);
        let answer = Ip::new(talk.peer, talk.own, TCP).packet(&tcp(80, 50000, SYN | ACK));
        t.sent(VM, 2, "of the other pod", &ethernet(POD, OTHER, kind, &answer), OK);
        t.world.forget();
    }
    for talk in Talk::all(|net| net.cluster, 53) {
        t.sent(PEER, 1, "unasked", &talk.udp(PEER), Err(Service));
        t.sent(VM, 1, "asked", &talk.udp(VM), OK);
        t.sent(PEER, 1, "answered", &talk.udp(PEER), OK);
        t.world.age(100);
        t.sent(PEER, 1, "answered again", &talk.udp(PEER), OK);
        t.world.age(200);
        t.sent(PEER, 1, "answered too late", &talk.udp(PEER), Err(Service));
        t.sent(VM, 1, "asked again", &talk.udp(VM), OK);
        t.world.age(40);
        t.sent(PEER, 1, "not answered in time", &talk.udp(PEER), Err(Service));
        t.sent(VM, 1, "asked a third time", &talk.udp(VM), OK);
        let ip = Ip::new(talk.peer, talk.own, UDP);
        t.gets("to another port", into(ip, &udp(53, 50001, &[])), Service);
        t.gets("from another port", into(ip, &udp(54, 50000, &[])), Service);
        t.world.forget();
    }
    for talk in Talk::all(|net| net.green, 5353) {
        t.sent(VM, 1, "unasked", &talk.udp(VM), no);
        t.sent(PEER, 1, "asked by another tenant", &talk.udp(PEER), OK);
        t.sent(VM, 1, "answered", &talk.udp(VM), OK);
        t.world.age(200);
        t.sent(VM, 1, "too late", &talk.udp(VM), no);
    }
    assert!(t.world.model.flows.values().any(|flow| flow.state == State::Answered));
    t.end(80);
}

#[test]
fn echo_is_answered_once_asked() {
    let Some(mut t) = Table::new("the policy's table of echo") else { return };
    for net in nets() {
        let (ask, answer) = (|id| icmp(net.ask, id, b"echo"), |id| icmp(net.answer, id, b"echo"));
        let (there, back) =
            (Ip::new(net.own, net.friend, net.icmp), Ip::new(net.friend, net.own, net.icmp));
        t.sends("an unasked answer", out(there, &answer(7)), NoFlow);
        t.gets("an unasked answer", into(back, &answer(7)), NoFlow);
        t.sends("a question", out(there, &ask(7)), Yes);
        t.sends("its own answer", out(there, &answer(7)), NoFlow);
        t.gets("an answer", into(back, &answer(7)), Yes);
        t.gets("another's answer", into(back, &answer(8)), NoFlow);
        t.gets("a question back", into(back, &ask(7)), Yes);
        t.sends("an answer back", out(there, &answer(7)), Yes);
        t.world.age(40);
        t.gets("a late answer", into(back, &answer(7)), NoFlow);
        // The nodes may ask pods, who may only answer.
        let (there, back) =
            (Ip::new(net.own, net.node, net.icmp), Ip::new(net.node, net.own, net.icmp));
        t.sends("a question to a node", out(there, &ask(7)), Service);
        t.sends("an answer to a node", out(there, &answer(7)), NoFlow);
        t.gets("a node's question", into(back, &ask(7)), Yes);
        t.sends("an answer to it", out(there, &answer(7)), Yes);
        t.sends("still no question", out(there, &ask(7)), Service);
        t.gets("a node's answer", into(back, &answer(7)), NoFlow);
        let other: &[u8] = if net.own.is_ipv4() {
            &[1, 2, 4, 6, 9, 10, 13, 14, 15, 17, 18, 30, 42, 43, 255]
        } else {
            &[0, 5, 100, 127, 138, 139, 140, 141, 142, 144, 151, 160, 255]
        };
        for &kind in other {
            let ip = Ip::new(net.own, net.friend, net.icmp);
            t.both("another kind of message", ip, &icmp(kind, 1, &[0; 40]), IcmpType);
        }
        let redirect = icmp(if net.own.is_ipv4() { 5 } else { 137 }, 0, &[0; 40]);
        t.both("a redirect", Ip::new(net.own, net.friend, net.icmp).hops(255), &redirect, Router);
    }
    t.end(80);
}

#[test]
fn errors_belong_to_what_they_quote() {
    let Some(mut t) = Table::new("the policy's table of ICMP errors") else { return };
    for net in nets() {
        let error = |quote: &[u8]| icmp(net.unreachable, 0, quote);
        let ask = Ip::new(net.own, net.blue, TCP);
        let quote = ask.packet(&tcp(50000, 80, SYN));
        let from = |who| Ip::new(who, net.own, net.icmp);
        let (blue, router) = (from(net.blue), from(net.unknown));
        t.gets("about nothing", into(router, &error(&quote)), NoFlow);
        t.sends("a connection", out(ask, &tcp(50000, 80, SYN)), Yes);
        t.gets("from its end", into(blue, &error(&quote)), Yes);
        t.gets("from a router", into(router, &error(&quote)), Yes);
        for kind in if net.own.is_ipv4() { vec![3, 11, 12] } else { vec![1, 2, 3, 4] } {
            t.gets("of each kind", into(router, &icmp(kind, 0, &quote)), Yes);
        }
        let head = quote.len() - 20;
        t.gets("with 8 bytes", into(router, &error(&quote[..head + 8])), Yes);
        for length in [0, 1, 8, head - 1, head, head + 4, head + 7] {
            t.gets("with too little", into(router, &error(&quote[..length])), Quote);
        }
        let padded = [&into(router, &error(&quote[..head + 4]))[..], &[0; 40]].concat();
        t.gets("with too little, padded", padded, Quote);
        for port in [(50001, 80), (50000, 81), (80, 50000)] {
            let quote = ask.packet(&tcp(port.0, port.1, SYN));
            t.gets("about other ports", into(router, &error(&quote)), NoFlow);
        }
        let quote_udp = Ip::new(net.own, net.blue, UDP).packet(&udp(50000, 80, &[]));
        t.gets("about another protocol", into(router, &error(&quote_udp)), NoFlow);
        let to_green = Ip::new(net.own, net.green, TCP).packet(&tcp(50000, 80, SYN));
        t.gets("about another peer", into(router, &error(&to_green)), NoFlow);
        let answer = Ip::new(net.blue, net.own, TCP).packet(&tcp(80, 50000, SYN | ACK));
        t.gets("about what the peer sent", into(router, &error(&answer)), Quote);
        let other = Ip::new(net.friend, net.blue, TCP).packet(&tcp(50000, 80, SYN));
        t.gets("about another's", into(router, &error(&other)), Quote);
        for proto in [2, 47, 132, if net.own.is_ipv4() { ICMP6 } else { ICMP }] {
            let strange = Ip::new(net.own, net.blue, proto).packet(&[0; 20]);
            t.gets("about a strange protocol", into(router, &error(&strange)), Quote);
        }
        let pieces = ask.fragment(5, 24, true).packet(&tcp(50000, 80, SYN));
        t.gets("about a later fragment", into(router, &error(&pieces)), Quote);
        let version = with(quote.clone(), 0, &[0x55]);
        t.gets("about no IP", into(router, &error(&version)), Quote);
        if net.own.is_ipv4() {
            let options = with(quote.clone(), 0, &[0x46]);
            t.gets("about options", into(router, &error(&options)), Quote);
            let first = ask.fragment(5, 0, true).packet(&tcp(50000, 80, SYN));
            t.gets("about a first fragment", into(router, &error(&first)), Yes);
        }
        t.gets("in pieces", into(router.fragment(9, 0, true), &error(&quote)), Fragment);
        t.sends(
            "about its own packet",
            out(Ip::new(net.own, net.blue, net.icmp), &error(&quote)),
            Quote,
        );
        let about = out(Ip::new(net.own, net.blue, net.icmp), &error(&answer));
        t.sends("about the peer's packet", about, Yes);
        let about = out(Ip::new(net.own, net.green, net.icmp), &error(&answer));
        t.sends("to somebody else", about, Quote);
        let about = out(Ip::new(net.friend, net.blue, net.icmp), &error(&answer));
        t.sends("with another's address", about, SpoofedAddress);
        t.world.disallow(web().0, web().1);
        t.gets("when it is no longer allowed", into(router, &error(&quote)), Tenant);
        t.world.allow(web().0, web().1);
        t.world.age(100);
        t.gets("too late", into(router, &error(&quote)), NoFlow);
        // About echo.
        let ask = Ip::new(net.own, net.friend, net.icmp);
        let question = ask.packet(&icmp(net.ask, 3, &[]));
        t.gets("about no echo", into(router, &error(&question)), NoFlow);
        t.sends("a question", out(ask, &icmp(net.ask, 3, &[])), Yes);
        t.gets("about a question", into(router, &error(&question)), Yes);
        let answer = ask.packet(&icmp(net.answer, 3, &[]));
        t.gets("about an answer that was not sent", into(router, &error(&answer)), NoFlow);
        let nested = ask.packet(&error(&question));
        t.gets("about an error", into(router, &error(&nested)), Quote);
        t.world.forget();
    }
    t.end(80);
}

#[test]
fn fragments_follow_their_first() {
    let Some(mut t) = Table::new("the policy's table of fragments") else { return };
    for net in nets() {
        let (there, back) = (Ip::new(net.own, net.friend, UDP), Ip::new(net.friend, net.own, UDP));
        let data = &udp(1, 2, &[0; 40]);
        for (sender, ip) in [(VM, there), (PEER, back)] {
            let frame = if sender == VM { out } else { into };
            let mut step = |name, ip, body: &[u8], expected| {
                t.sent(sender, 1, name, &frame(ip, body), expected);
            };
            step("later, before the first", ip.fragment(1, 48, false), data, Err(Fragment));
            step("the first", ip.fragment(1, 0, true), data, OK);
            step("a middle one", ip.fragment(1, 48, true), data, OK);
            step("the last", ip.fragment(1, 96, false), &[1], OK);
            step("the last with nothing", ip.fragment(1, 96, false), &[], OK);
            step("of another packet", ip.fragment(2, 48, false), data, Err(Fragment));
            let tcp_one = Ip { proto: TCP, ..ip };
            step("of another protocol", tcp_one.fragment(1, 48, false), data, Err(Fragment));
            step("over the ports", ip.fragment(1, 8, true), data, Err(Fragment));
            step("over the flags", ip.fragment(1, 16, false), data, Err(Fragment));
            step("right behind", ip.fragment(1, 24, false), data, OK);
            step("beyond the end", ip.fragment(1, 65528, false), data, Err(Fragment));
            step("at the end", ip.fragment(1, 65528, false), &[0; 7], OK);
            step(
                "a first one cut in its header",
                ip.fragment(3, 0, true),
                &data[..7],
                Err(Truncated),
            );
            step("behind that", ip.fragment(3, 24, false), data, Err(Fragment));
            let syn = tcp(1, 2, SYN);
            step(
                "a first one cut in TCP",
                tcp_one.fragment(4, 0, true),
                &syn[..16],
                Err(Truncated),
            );
            step("whole TCP", tcp_one.fragment(4, 0, true), &syn, OK);
            let strange = Ip { proto: 47, ..ip };
            step("a strange protocol", strange.fragment(1, 0, true), data, Err(Protocol));
            step("behind that", strange.fragment(1, 48, true), data, Err(Fragment));
        }
        // The other direction's are others, as are another peer's.
        t.sends("a first one", out(there.fragment(9, 0, true), data), Yes);
        t.gets("the other way", into(back.fragment(9, 48, false), data), Fragment);
        let blue = Ip { destination: net.blue, ..there };
        t.sends("to another", out(blue.fragment(9, 48, false), data), Fragment);
        t.sends("a first one to another", out(blue.fragment(9, 0, true), data), Tenant);
        t.sends("behind that", out(blue.fragment(9, 48, false), data), Fragment);
        t.world.age(20);
        t.sends("in time", out(there.fragment(9, 48, false), data), Yes);
        t.world.age(20);
        t.sends("too late", out(there.fragment(9, 48, false), data), Fragment);
        let echo = Ip::new(net.own, net.friend, net.icmp);
        t.sends("echo", out(echo.fragment(5, 0, true), &icmp(net.ask, 1, &[0; 40])), Yes);
        t.sends("more echo", out(echo.fragment(5, 48, false), &[0; 40]), Yes);
        t.world.forget();
    }
    let [_, net] = nets();
    let atomic = Ip::new(net.own, net.friend, UDP).fragment(1, 0, false);
    t.sends("a fragment that is whole", out(atomic, &udp(1, 2, &[])), Yes);
    let short = with(udp(1, 2, &[]), 4, &[0, 9]);
    t.sends("one that is too short", out(atomic, &short), Malformed);
    let nothing = Ip { fragment: None, proto: 44, ..atomic };
    t.sends("a cut header", out(nothing, &[17, 0, 0, 1, 0, 0, 0]), Truncated);
    t.end(80);
}

#[test]
fn extension_headers_are_bounded() {
    let Some(mut t) = Table::new("the policy's table of extension headers") else { return };
    let [_, net] = nets();
    let ip = Ip::new(net.own, net.friend, UDP);
    let data = udp(1, 2, &[]);
    let (hop, options, routing, fragment) = (0, 60, 43, 44);
    // Headers in their order, each of 8 bytes.
    let chain = |kinds: &[u8]| {
        let mut body = Vec::new();
        for next in kinds[1..].iter().copied().chain([UDP]) {
            body.extend([next, 0, 0, 0, 0, 0, 0, 0]);
        }
        (Ip { proto: kinds[0], ..ip }, [body, data.clone()].concat())
    };
    let cases: [(&[u8], Decision); 15] = [
        (&[hop], OK),
        (&[options], OK),
        (&[hop, options], OK),
        (&[hop, options, fragment], OK),
        (&[hop, options, options, options], OK),
        (&[options, options, options, options], OK),
        (&[options; 5], Err(Extension)),
        (&[hop, options, options, options, options], Err(Extension)),
        (&[options, hop], Err(Extension)),
        (&[hop, hop], Err(Extension)),
        (&[routing], Err(Extension)),
        (&[hop, routing], Err(Extension)),
        (&[fragment, fragment], Err(Extension)),
        (&[fragment, options], Err(Extension)),
        (&[options, fragment, routing], Err(Extension)),
    ];
    for (kinds, expected) in cases {
        let (ip, body) = chain(kinds);
        t.both(&format!("headers {kinds:?}"), ip, &body, expected);
    }
    let (ip, body) = chain(&[hop, options]);
    t.sends("a long header", out(ip, &with(body.clone(), 1, &[1])), Truncated);
    t.sends("a header beyond the end", out(ip, &with(body.clone(), 1, &[255])), Truncated);
    t.sends("none behind it", out(ip, &body[..8]), Truncated);
    t.sends("half of one", out(ip, &body[..9]), Truncated);
    t.sends("nothing behind them", out(ip, &body[..16]), Truncated);
    let mapped = Ip::new(self::ip("::ffff:10.0.0.2"), net.own, UDP);
    t.gets("an IPv4 address in IPv6", into(mapped, &data), Unknown);
    t.end(35);
}

// SPDX-License-Identifier: Apache-2.0
//
// Who may open what to whom, and what belongs to what was opened.
//
// A flow says who opened it and how far it is. Each packet of it, in either direction, needs a policy that
// lets its opener open it today, so a changed policy ends flows: what was decided is kept for as long as
// the policy's generation is the same.
#ifndef JOEY_FLOW_H
#define JOEY_FLOW_H

#include "packet.h"

#define SECONDS 1000000000ll

// Whether `opener` may open to the other side, at the other side's port.
INLINE int verdict(const struct pod *config, const struct flow_key *flow, __u8 opener)
{
	struct identity_key address = { .bits = 160, .family = flow->family };
	struct service_key service = { .proto = flow->proto, .opener = opener };
	struct allow_key allow = { .proto = flow->proto };
	const struct identity *peer;
	__u16 port = opener == VM ? flow->remote_port : flow->local_port;

	if (flow->proto == ICMP || flow->proto == ICMP6)
		port = 0;
	copy_address(address.address, flow->remote);
	peer = map_lookup(&identities, &address);
	if (!peer)
		return DROP_Unknown;
	if (peer->tenant && peer->tenant == config->tenant)
		return ALLOWED;
	if (peer->service) {
		service.service = peer->service;
		service.port = port;
		if (map_lookup(&services, &service))
			return ALLOWED;
		service.port = 0;
		if (map_lookup(&services, &service))
			return ALLOWED;
	}
	if (!peer->tenant)
		return peer->service ? DROP_Service : DROP_Unknown;
	if (config->tenant) {
		allow.from = opener == VM ? config->tenant : peer->tenant;
		allow.to = opener == VM ? peer->tenant : config->tenant;
		allow.port = port;
		if (map_lookup(&allows, &allow))
			return ALLOWED;
		allow.port = 0;
		if (map_lookup(&allows, &allow))
			return ALLOWED;
	}
	return DROP_Tenant;
}

INLINE int is_live(const struct flow *flow, __u8 proto, __u64 now)
{
	__s64 most = 30 * SECONDS;

	if (proto == TCP && flow->state == NEW)
		most = 60 * SECONDS;
	else if (proto == TCP && flow->state == ANSWERED)
		most = 7500 * SECONDS; // RFC 5382: 2 h 4 min at least
	else if (proto == UDP && flow->state == ANSWERED)
		most = 180 * SECONDS;
	// Signed: another CPU may have seen the flow after `now` was read.
	return (__s64)(now - flow->seen) < most;
}

// The state of a TCP flow after a packet with these flags; the packet is refused where it has no place.
INLINE int next_state(struct flow *next, __u8 flags, __u8 sender)
{
	int opens = (flags & (SYN | ACK)) == SYN;
	int accepts = (flags & (SYN | ACK)) == (SYN | ACK);

	if (sender == next->opener) {
		if (accepts || (next->state == NEW && !opens && !(flags & RST)))
			return DROP_NoFlow;
	} else {
		if (opens || (next->state == NEW && !accepts && !(flags & RST)))
			return DROP_NoFlow;
		if (next->state == NEW && accepts)
			next->state = ANSWERED;
	}
	if (flags & FIN)
		next->finished |= sender == VM ? 1 : 2;
	if (flags & RST || next->finished == 3)
		next->state = CLOSED;
	return ALLOWED;
}

INLINE void flow_of(struct flow_key *key, __u32 pod, const struct packet *packet, int sender)
{
	key->pod = pod;
	key->proto = packet->proto;
	key->family = packet->family;
	copy_address(key->local, sender == VM ? packet->source : packet->destination);
	copy_address(key->remote, sender == VM ? packet->destination : packet->source);
}

// Judges a packet of the flow `key` that `opens` one if there is none, and writes down what it changed.
INLINE int judge(const struct pod *config, const struct flow_key *key, const struct packet *packet,
		 __u8 sender, int opens)
{
	__u64 now = ktime();
	__u32 zero = 0;
	// Read before the policy, which is written before it: what is decided by an old policy is not kept
	// as if a new one had decided it. volatile, or the compiler might read it later.
	const volatile __u32 *counted = map_lookup(&generation, &zero);
	__u32 current = counted ? *counted : 0;
	struct flow *known = map_lookup(&flows, key);
	struct flow next = { .opener = sender };
	int reason, fresh = 1;

	if (known && is_live(known, key->proto, now) &&
	    !(key->proto == TCP && opens && known->state == CLOSED)) {
		fresh = 0;
		next.opener = known->opener;
		next.state = known->state;
		next.finished = known->finished;
	}
	if (fresh) {
		if (!opens)
			return DROP_NoFlow;
	} else if (key->proto == TCP) {
		reason = next_state(&next, packet->tcp, sender);
		if (reason)
			return reason;
	} else if (sender != next.opener) {
		next.state = ANSWERED;
	}
	if (fresh || known->generation != current) {
		reason = verdict(config, key, next.opener);
		if (reason)
			return reason;
	}
	next.seen = now;
	next.generation = current;
	if (known) {
		known->opener = next.opener;
		known->state = next.state;
		known->finished = next.finished;
		known->generation = current;
		known->seen = now;
	} else if (map_update(&flows, key, &next, BPF_ANY)) {
		return DROP_NoFlow;
	}
	return ALLOWED;
}

// An ICMP error belongs to the flow of the packet that it quotes, which its receiver has sent.
INLINE int quoted(const struct __sk_buff *skb, const struct pod *config, __u32 pod,
		  const struct packet *packet, int sender)
{
	struct packet inner = { .family = packet->family };
	struct flow_key key = {};
	const struct flow *known;
	__u32 at = packet->at + 8;
	__u8 head[8];
	int author = sender == VM ? PEER : VM;

	if (packet->fragment != WHOLE)
		return DROP_Fragment;
	if (packet->family == 4) {
		struct ip4 ip;

		if (read(skb, packet, at, &ip) || ip.version != 0x45 ||
		    ip.fragment & BE16(0x1fff))
			return DROP_Quote;
		inner.source[0] = ip.source;
		inner.destination[0] = ip.destination;
		inner.proto = ip.proto;
		at += sizeof(ip);
	} else {
		struct ip6 ip;

		if (read(skb, packet, at, &ip) || ip.version >> 4 != 6)
			return DROP_Quote;
		copy_address(inner.source, ip.source);
		copy_address(inner.destination, ip.destination);
		inner.proto = ip.next;
		at += sizeof(ip);
	}
	if (!same_address(inner.source, packet->destination) ||
	    read(skb, packet, at, &head))
		return DROP_Quote;
	flow_of(&key, pod, &inner, author);
	if (inner.proto == TCP || inner.proto == UDP) {
		__u16 ports[2];

		__builtin_memcpy(ports, head, sizeof(ports));
		key.local_port = author == VM ? ports[0] : ports[1];
		key.remote_port = author == VM ? ports[1] : ports[0];
	} else if (inner.proto == (packet->family == 4 ? ICMP : ICMP6)) {
		__u8 asks = packet->family == 4 ? 8 : 128;
		__u8 answers = packet->family == 4 ? 0 : 129;

		if (head[0] != asks && head[0] != answers)
			return DROP_Quote;
		key.echo = head[0] == asks ? author : sender;
		__builtin_memcpy(&key.local_port, head + 4, 2);
	} else {
		return DROP_Quote;
	}
	known = map_lookup(&flows, &key);
	if (!known || !is_live(known, key.proto, ktime()))
		return DROP_NoFlow;
	return verdict(config, &key, known->opener);
}

#endif

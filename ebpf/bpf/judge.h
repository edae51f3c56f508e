// SPDX-License-Identifier: Apache-2.0
//
// A packet from its frame to the policy's word about it: what it is (`look`), whether it may pass, and what is written
// down of it (`settle`).
#ifndef JOEY_JUDGE_H
#define JOEY_JUDGE_H

#include "limit.h"
#include "neighbour.h"
#include "quote.h"

INLINE int icmp(const struct __sk_buff *skb, const struct pod *config, struct packet *packet,
		int sender, struct course *course)
{
	int old = packet->family == 4;
	struct flow_key *key = &course->draft->key;
	__u8 head[8], kind;
	int reason = read_transport(skb, packet, &head);

	if (reason)
		return reason;
	packet->kind = kind = head[0];
	if (!old && about_link(packet))
		return neighbour(skb, config, key->pod, packet, sender, head[1]);
	if (packet->unspecified)
		return DROP_SpoofedAddress;
	if (old && kind == 5)
		return DROP_Router;
	if (old ? kind == 3 || kind == 11 || kind == 12 : kind >= 1 && kind <= 4) {
		course->role = QUOTES;
		return quoted(skb, packet, sender, key);
	}
	if (kind != (old ? 8 : 128) && kind != (old ? 0 : 129))
		return DROP_IcmpType;
	course->role = kind == (old ? 8 : 128) ? OPENS : FOLLOWS;
	flow_of(key, packet, sender);
	__builtin_memcpy(&key->local_port, head + 4, 2);
	key->echo = course->role == OPENS ? sender : sender == VM ? PEER : VM;
	return ALLOWED;
}

INLINE int transport(const struct __sk_buff *skb, const struct pod *config, struct packet *packet,
		     int sender, struct course *course)
{
	int reason;

	if (packet->proto == (packet->family == 4 ? ICMP : ICMP6))
		return icmp(skb, config, packet, sender, course);
	if (packet->proto == TCP)
		reason = parse_tcp(skb, packet);
	else if (packet->proto == UDP)
		reason = parse_udp(skb, packet);
	else
		return DROP_Protocol;
	if (reason)
		return reason;
	if (sender == VM && packet->proto == UDP) {
		__u16 server = packet->family == 4 ? BE16(67) : BE16(547);
		__u16 client = packet->family == 4 ? BE16(68) : BE16(546);

		if (packet->source_port == server || packet->destination_port == client)
			return DROP_Dhcp;
	}
	course->role = packet->proto == UDP || (packet->tcp & (SYN | ACK)) == SYN ? OPENS : FOLLOWS;
	flow_of(&course->draft->key, packet, sender);
	course->draft->key.local_port = sender == VM ? packet->source_port : packet->destination_port;
	course->draft->key.remote_port = sender == VM ? packet->destination_port : packet->source_port;
	return ALLOWED;
}

INLINE int for_all(const struct packet *packet)
{
	__u32 first = BE32(packet->destination[0]);

	if (packet->family == 4)
		return first >> 28 == 14 || first == 0xffffffff;
	return first >> 24 == 0xff;
}

INLINE int addressed(const struct pod *config, __u32 pod, struct packet *packet, int sender)
{
	if (sender == PEER)
		return for_all(packet) || is_own(config, pod, packet->family, packet->destination) ?
			       ALLOWED :
			       DROP_NotForPod;
	if (is_own(config, pod, packet->family, packet->source))
		return ALLOWED;
	packet->unspecified = !(packet->source[0] | packet->source[1] | packet->source[2] |
				packet->source[3]);
	// Who asks whether its address is taken has none yet; see neighbour().
	if (packet->family == 6 && packet->unspecified && packet->proto == ICMP6 &&
	    packet->fragment == WHOLE)
		return ALLOWED;
	return DROP_SpoofedAddress;
}

// Everything about the frame that needs no flow; course->role says what is to be asked about it.
INLINE int examine(const struct __sk_buff *skb, const struct pod *config, struct packet *packet,
		   int sender, struct course *course)
{
	__u32 pod = course->draft->key.pod;
	struct ethernet frame;
	int reason;

	if (skb->vlan_present)
		return DROP_Vlan;
	if (load(skb, packet, 0, &frame))
		return DROP_Truncated;
	if (sender == VM && !same_mac(frame.from, config->mac))
		return DROP_SpoofedMac;
	if (sender == PEER && !(frame.to[0] & 1) && !same_mac(frame.to, config->mac))
		return DROP_NotForPod;
	if (frame.type == BE16(ETH_P_8021Q) || frame.type == BE16(ETH_P_8021AD))
		return DROP_Vlan;
	if (frame.type == BE16(ETH_P_ARP))
		return arp(skb, config, pod, packet, sender);
	if (frame.type == BE16(ETH_P_IP))
		reason = parse_ip4(skb, packet);
	else if (frame.type == BE16(ETH_P_IPV6))
		reason = parse_ip6(skb, packet);
	else
		return DROP_EtherType;
	if (reason)
		return reason;
	reason = addressed(config, pod, packet, sender);
	if (reason)
		return reason;
	if (packet->fragment == LATER) {
		course->role = CONTINUES;
		fragments_of(&course->draft->key, packet, sender);
		return ALLOWED;
	}
	return transport(skb, config, packet, sender, course);
}

// Looks at a packet as such: course->role says what is to be asked about it.
INLINE int look(const struct __sk_buff *skb, const struct pod *config, __u32 pod,
		struct packet *packet, int sender, struct course *course)
{
	__u32 only = 0;

	// Read once: the compiler must not compute with the context's address.
	packet->start = (void *)(long)skb->data;
	packet->stop = (void *)(long)skb->data_end;
	course->draft = map_lookup(&drafts, &only);
	if (!course->draft)
		return DROP_NoPod;
	__builtin_memset(course->draft, 0, sizeof(*course->draft));
	course->draft->key.pod = pod;
	return examine(skb, config, packet, sender, course);
}

// What the policy says of the packet, and what is written down of it.
INLINE int settle(const struct __sk_buff *skb, const struct pod *config, struct counters *count,
		  struct packet *packet, int sender, struct course *course)
{
	__u64 now = ktime();
	int reason;

	// The clock's tick may be from before the pod's beginning.
	course->draft->next.seen = (__s64)(now - config->since) < 0 ? config->since : now;
	if (course->role != LINK) {
		reason = consider(config, packet, sender, course);
		if (reason && course->judged && course->role != QUOTES)
			deny(count, config, &course->draft->peer, &course->draft->key, &course->draft->next, reason);
		if (reason)
			return reason;
	}
	// What keeps the link working comes from anybody on it, and must not use up what is the pod's.
	if (config->limited && (sender == VM || course->role != LINK)) {
		reason = pay(skb, course->draft->key.pod, sender, now);
		if (reason)
			return reason;
	}
	if (course->role != OPENS && course->role != FOLLOWS)
		return ALLOWED;
	// It is there, which the verifier does not see.
	if (!course->table)
		return DROP_NoFlow;
	reason = record(count, config, course, sender, skb->len);
	return reason || !packet->more ? reason : expect_fragments(packet, course, sender);
}

INLINE int judge(const struct __sk_buff *skb, const struct pod *config, __u32 pod,
		 struct counters *count, int sender)
{
	struct packet packet = {};
	struct course course = {};
	int reason = look(skb, config, pod, &packet, sender, &course);

	return reason ? reason : settle(skb, config, count, &packet, sender, &course);
}

#endif

// SPDX-License-Identifier: Apache-2.0
//
// The packet that an ICMP error is about.
#ifndef JOEY_QUOTE_H
#define JOEY_QUOTE_H

#include "flow.h"

// An ICMP error belongs to the flow of the packet that it quotes, which its receiver has sent.
INLINE int quoted(const struct __sk_buff *skb, const struct packet *packet, int sender,
		  struct flow_key *key)
{
	int author = sender == VM ? PEER : VM;
	__u32 *source = author == VM ? key->local : key->remote;
	__u32 *destination = author == VM ? key->remote : key->local;
	__u32 at = packet->at + 8;
	__u8 head[8];

	if (packet->fragment != WHOLE)
		return DROP_Fragment;
	if (packet->family == 4) {
		struct ip4 ip;

		if (read(skb, packet, at, &ip) || ip.version != 0x45 ||
		    ip.fragment & BE16(0x1fff))
			return DROP_Quote;
		source[0] = ip.source;
		destination[0] = ip.destination;
		key->proto = ip.proto;
		at += sizeof(ip);
	} else {
		struct ip6 ip;

		if (read(skb, packet, at, &ip) || ip.version >> 4 != 6)
			return DROP_Quote;
		copy_address(source, ip.source);
		copy_address(destination, ip.destination);
		key->proto = ip.next;
		at += sizeof(ip);
	}
	key->family = packet->family;
	if (!same_address(source, packet->destination) || read(skb, packet, at, &head))
		return DROP_Quote;
	if (key->proto == TCP || key->proto == UDP) {
		__u16 ports[2];

		__builtin_memcpy(ports, head, sizeof(ports));
		key->local_port = author == VM ? ports[0] : ports[1];
		key->remote_port = author == VM ? ports[1] : ports[0];
	} else if (key->proto == (packet->family == 4 ? ICMP : ICMP6)) {
		__u8 asks = packet->family == 4 ? 8 : 128;
		__u8 answers = packet->family == 4 ? 0 : 129;

		if (head[0] != asks && head[0] != answers)
			return DROP_Quote;
		key->echo = head[0] == asks ? author : sender;
		__builtin_memcpy(&key->local_port, head + 4, 2);
	} else {
		return DROP_Quote;
	}
	return ALLOWED;
}

#endif

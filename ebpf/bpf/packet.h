// SPDX-License-Identifier: Apache-2.0
//
// From a frame to what the policy asks about: addresses, ports, and what kind of message it is. Each
// function returns ALLOWED to go on, or the reason of a drop.
//
// Bytes are read where they are, or by bpf_skb_load_bytes where the device left them in pages.
#ifndef JOEY_PACKET_H
#define JOEY_PACKET_H

#include <linux/if_ether.h>

#include "policy.h"

#define BE16(value) __builtin_bswap16(value)
#define BE32(value) __builtin_bswap32(value)

enum {
	HOP_BY_HOP = 0,
	ICMP = 1,
	TCP = 6,
	UDP = 17,
	ROUTING = 43,
	FRAGMENT = 44,
	ICMP6 = 58,
	DESTINATION = 60,
};

enum fragment { WHOLE, FIRST, LATER };

enum { FIN = 1, SYN = 2, RST = 4, ACK = 16 };

// Extension headers before the transport's, at most.
#define EXTENSIONS 4
// Below this offset (in units of 8 bytes) a later fragment could overwrite a first one's TCP header.
#define LOWEST_OFFSET 3

struct ethernet {
	__u8 to[6];
	__u8 from[6];
	__u16 type;
};

struct ip4 {
	__u8 version;
	__u8 service;
	__u16 length;
	__u16 id;
	__u16 fragment;
	__u8 hops;
	__u8 proto;
	__u16 checksum;
	__u32 source;
	__u32 destination;
};

struct ip6 {
	__u8 version;
	__u8 flow[3];
	__u16 length;
	__u8 next;
	__u8 hops;
	__u32 source[4];
	__u32 destination[4];
};

struct packet {
	void *start; // of what can be read directly, and
	void *stop;
	__u32 source[4];
	__u32 destination[4];
	__u32 at; // what follows the IP headers
	__u32 end; // of the IP packet; the frame may be padded
	__u32 id; // of the fragments
	__u16 source_port;
	__u16 destination_port;
	__u8 family;
	__u8 proto;
	__u8 hops;
	__u8 fragment; // enum fragment
	__u8 more; // fragments follow
	__u8 unspecified; // IPv6 source ::
	__u8 tcp; // flags
	__u8 kind; // type of ICMP, operation of ARP
};

INLINE int same_mac(const __u8 *one, const __u8 *other)
{
	return !((one[0] ^ other[0]) | (one[1] ^ other[1]) | (one[2] ^ other[2]) |
		 (one[3] ^ other[3]) | (one[4] ^ other[4]) | (one[5] ^ other[5]));
}

INLINE void copy_address(__u32 *to, const __u32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

INLINE int same_address(const __u32 *one, const __u32 *other)
{
	return !((one[0] ^ other[0]) | (one[1] ^ other[1]) | (one[2] ^ other[2]) |
		 (one[3] ^ other[3]));
}

// Headers that begin at a constant offset, read in as large words as their struct is aligned to, which
// x86 does not mind.
#define load(skb, packet, offset, to)                                                          \
	({                                                                                     \
		typeof(to) from_ = (packet)->start + (offset);                                 \
		int failed_ = 0;                                                               \
		if ((void *)(from_ + 1) <= (packet)->stop)                                     \
			__builtin_memcpy(to, from_, sizeof(*(to)));                            \
		else                                                                           \
			failed_ = load_bytes(skb, offset, to, sizeof(*(to))) != 0;             \
		failed_;                                                                       \
	})

// What is anywhere in the IP packet.
#define read(skb, packet, offset, to)                                                          \
	((offset) + sizeof(*(to)) > (packet)->end ||                                           \
			 load_bytes(skb, offset, to, sizeof(*(to))) ?                          \
		 DROP_Truncated :                                                              \
		 ALLOWED)

// The transport's header, which mostly follows the IP header.
#define read_transport(skb, packet, to)                                                        \
	((packet)->at + sizeof(*(to)) > (packet)->end ? DROP_Truncated :                       \
	 (packet)->at == ETH_HLEN + sizeof(struct ip4) ?                                       \
		 (load(skb, packet, ETH_HLEN + sizeof(struct ip4), to) ? DROP_Truncated :      \
									 ALLOWED) :            \
	 (packet)->at == ETH_HLEN + sizeof(struct ip6) ?                                       \
		 (load(skb, packet, ETH_HLEN + sizeof(struct ip6), to) ? DROP_Truncated :      \
									 ALLOWED) :            \
		 read(skb, packet, (packet)->at, to))

// offset: in units of 8 bytes.
INLINE int fragmented(struct packet *packet, __u32 offset, int more)
{
	packet->more = more;
	if (!offset) {
		packet->fragment = FIRST;
		return ALLOWED;
	}
	packet->fragment = LATER;
	if (offset < LOWEST_OFFSET || offset * 8 + packet->end - packet->at > 65535)
		return DROP_Fragment;
	return ALLOWED;
}

INLINE int parse_ip4(const struct __sk_buff *skb, struct packet *packet)
{
	struct ip4 ip;
	__u32 length, fragment;

	if (load(skb, packet, ETH_HLEN, &ip))
		return DROP_Truncated;
	if (ip.version >> 4 != 4 || (ip.version & 15) < 5)
		return DROP_Malformed;
	if ((ip.version & 15) != 5)
		return DROP_Options;
	length = BE16(ip.length);
	if (length < sizeof(ip) || length > skb->len - ETH_HLEN)
		return DROP_Malformed;
	packet->family = 4;
	packet->source[0] = ip.source;
	packet->destination[0] = ip.destination;
	packet->proto = ip.proto;
	packet->hops = ip.hops;
	packet->id = ip.id;
	packet->at = ETH_HLEN + sizeof(ip);
	packet->end = ETH_HLEN + length;
	fragment = BE16(ip.fragment);
	if (fragment & 0x3fff)
		return fragmented(packet, fragment & 0x1fff, fragment >> 13 & 1);
	return ALLOWED;
}

INLINE int parse_ip6(const struct __sk_buff *skb, struct packet *packet)
{
	struct ip6 ip;
	__u32 length, next, i;
	int reason;

	if (load(skb, packet, ETH_HLEN, &ip))
		return DROP_Truncated;
	length = BE16(ip.length);
	if (ip.version >> 4 != 6 || length > skb->len - ETH_HLEN - sizeof(ip))
		return DROP_Malformed;
	packet->family = 6;
	copy_address(packet->source, ip.source);
	copy_address(packet->destination, ip.destination);
	packet->hops = ip.hops;
	packet->at = ETH_HLEN + sizeof(ip);
	packet->end = ETH_HLEN + sizeof(ip) + length;
	next = ip.next;
#pragma unroll
	for (i = 0; i < EXTENSIONS; i++) {
		__u8 head[2];

		if ((next != HOP_BY_HOP || i) && next != DESTINATION)
			break;
		reason = read(skb, packet, packet->at, &head);
		if (reason)
			return reason;
		next = head[0];
		packet->at += head[1] * 8 + 8;
		if (packet->at > packet->end)
			return DROP_Truncated;
	}
	if (next == FRAGMENT) {
		struct {
			__u8 next;
			__u8 unused;
			__u16 offset;
			__u32 id;
		} head;

		reason = read(skb, packet, packet->at, &head);
		if (reason)
			return reason;
		next = head.next;
		packet->at += sizeof(head);
		packet->id = head.id;
		reason = fragmented(packet, BE16(head.offset) >> 3, BE16(head.offset) & 1);
		if (reason)
			return reason;
	}
	if (next == HOP_BY_HOP || next == DESTINATION || next == FRAGMENT || next == ROUTING)
		return DROP_Extension;
	packet->proto = next;
	return ALLOWED;
}

INLINE int parse_tcp(const struct __sk_buff *skb, struct packet *packet)
{
	struct {
		__u16 source;
		__u16 destination;
		__u32 numbers[2];
		__u8 length;
		__u8 flags;
		__u16 rest[3];
	} head;
	int reason = read_transport(skb, packet, &head);

	if (reason)
		return reason;
	if (head.length >> 4 < 5 || packet->at + (head.length >> 4) * 4 > packet->end)
		return DROP_Malformed;
	packet->source_port = head.source;
	packet->destination_port = head.destination;
	packet->tcp = head.flags & (FIN | SYN | RST | ACK);
	if (packet->tcp & SYN ? packet->tcp & (FIN | RST) : !(packet->tcp & (RST | ACK)))
		return DROP_TcpFlags;
	return ALLOWED;
}

INLINE int parse_udp(const struct __sk_buff *skb, struct packet *packet)
{
	__u16 head[4];
	int reason = read_transport(skb, packet, &head);

	if (reason)
		return reason;
	// The length is of all fragments together.
	if (BE16(head[2]) < sizeof(head) ||
	    (!packet->more && BE16(head[2]) > packet->end - packet->at))
		return DROP_Malformed;
	packet->source_port = head[0];
	packet->destination_port = head[1];
	return ALLOWED;
}

#endif

// SPDX-License-Identifier: Apache-2.0
//
// What keeps a link working and no policy is asked about: ARP, neighbour discovery, and the reports of
// multicast listeners that switches want. A pod says of itself only what is true; what comes to it is
// let through if it is well-formed.
#ifndef JOEY_NEIGHBOUR_H
#define JOEY_NEIGHBOUR_H

#include "packet.h"

enum {
	LISTENER_QUERY = 130,
	LISTENER_REPORT = 131,
	LISTENER_DONE = 132,
	ROUTER_SOLICITATION = 133,
	ROUTER_ADVERTISEMENT = 134,
	NEIGHBOUR_SOLICITATION = 135,
	NEIGHBOUR_ADVERTISEMENT = 136,
	REDIRECT = 137,
	LISTENER_REPORT2 = 143,
};

// Options of a message of neighbour discovery, at most.
#define ND_OPTIONS 2
// RFC 3971, used by RFC 7527.
#define NONCE 14

// A function of its own, which the verifier goes through once for each place that calls it and not for each path.
OUTLINE int is_own(const struct pod *config, __u32 pod, __u32 family, const __u32 *address)
{
	struct address_key key = { .pod = pod, .family = family };

	if (family == 4 ? address[0] && address[0] == config->ip4 :
			  (address[0] | address[1] | address[2] | address[3]) &&
				  same_address(address, config->ip6))
		return 1;
	copy_address(key.address, address);
	return map_lookup(&addresses, &key) != 0;
}

INLINE int arp(const struct __sk_buff *skb, const struct pod *config, __u32 pod,
	       struct packet *packet, int sender)
{
	struct {
		__u16 hardware;
		__u16 protocol;
		__u8 lengths[2];
		__u16 operation;
		__u8 sender_mac[6];
		__u8 sender_address[4];
		__u8 target_mac[6];
		__u8 target_address[4];
	} head;
	__u32 source[4] = {}, target[4] = {};

	if (load(skb, packet, ETH_HLEN, &head))
		return DROP_Truncated;
	if (head.hardware != BE16(1) || head.protocol != BE16(ETH_P_IP) || head.lengths[0] != 6 ||
	    head.lengths[1] != 4 || (head.operation != BE16(1) && head.operation != BE16(2)))
		return DROP_Arp;
	packet->kind = BE16(head.operation);
	if (sender != VM)
		return ALLOWED;
	if (!same_mac(head.sender_mac, config->mac))
		return DROP_SpoofedArp;
	__builtin_memcpy(source, head.sender_address, 4);
	__builtin_memcpy(target, head.target_address, 4);
	// Who asks whether an address is taken does not claim it yet, but it has to be the pod's.
	if (!source[0] && head.operation == BE16(1))
		source[0] = target[0];
	return is_own(config, pod, 4, source) ? ALLOWED : DROP_SpoofedArp;
}

// Options that tell the sender's hardware address have to tell the pod's.
INLINE int options(const struct __sk_buff *skb, const struct pod *config,
		   const struct packet *packet, __u32 at)
{
	__u32 i;

#pragma unroll
	for (i = 0; i < ND_OPTIONS; i++) {
		__u8 option[8];

		if (at == packet->end)
			return ALLOWED;
		if (read(skb, packet, at, &option))
			return DROP_Neighbour;
		if (!option[1])
			return DROP_Neighbour;
		if (option[0] == 1 || option[0] == 2) {
			if (option[1] != 1)
				return DROP_Neighbour;
			// Who has no address yet must not give a hardware address for it.
			if (packet->unspecified || !same_mac(option + 2, config->mac))
				return DROP_SpoofedNeighbour;
		} else if (option[0] != NONCE || option[1] != 1) {
			// What nobody needs could carry anything to anybody.
			return DROP_Neighbour;
		}
		at += option[1] * 8;
	}
	return at == packet->end ? ALLOWED : DROP_Neighbour;
}

// Whether packet->kind is one of these messages.
INLINE int about_link(const struct packet *packet)
{
	return (packet->kind >= LISTENER_QUERY && packet->kind <= REDIRECT) ||
	       packet->kind == LISTENER_REPORT2;
}

INLINE int neighbour(const struct __sk_buff *skb, const struct pod *config, __u32 pod,
		     const struct packet *packet, int sender, __u8 code)
{
	__u8 kind = packet->kind;
	__u32 target[4];

	if (kind == ROUTER_ADVERTISEMENT || kind == REDIRECT)
		return DROP_Router;
	if (packet->fragment != WHOLE)
		return DROP_Fragment;
	if (sender == VM ? kind == LISTENER_QUERY :
			   kind != LISTENER_QUERY && kind != NEIGHBOUR_SOLICITATION &&
				   kind != NEIGHBOUR_ADVERTISEMENT)
		return DROP_IcmpType;
	if (kind != ROUTER_SOLICITATION && kind != LISTENER_REPORT2 &&
	    packet->at + 24 > packet->end)
		return DROP_Truncated;
	if (kind < ROUTER_SOLICITATION || kind == LISTENER_REPORT2) {
		if (packet->hops != 1 || BE32(packet->destination[0]) >> 24 != 0xff)
			return DROP_Neighbour;
		return ALLOWED;
	}
	if (packet->hops != 255 || code)
		return DROP_Neighbour;
	if (sender != VM)
		return ALLOWED;
	if (kind == ROUTER_SOLICITATION)
		return options(skb, config, packet, packet->at + 8);
	if (read(skb, packet, packet->at + 8, &target))
		return DROP_Truncated;
	if (kind == NEIGHBOUR_ADVERTISEMENT || packet->unspecified) {
		if (packet->unspecified && kind == NEIGHBOUR_ADVERTISEMENT)
			return DROP_SpoofedAddress;
		if (!is_own(config, pod, 6, target))
			return DROP_SpoofedNeighbour;
	}
	return options(skb, config, packet, packet->at + 24);
}

#endif

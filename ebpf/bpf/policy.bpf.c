// SPDX-License-Identifier: Apache-2.0
//
// The policy at a VM's own wire: `from_vm` on what enters the tap, `to_vm` on what enters the pod's
// interface. What is allowed leaves the partner, unchanged, as with wire.bpf.c; everything else is
// dropped and counted by its reason. src/policy/model has the same rules to be read.
//
// Which pod a device belongs to is the filter's classid, of which the kernel hands on 16 bits: enough
// for the pods of a node. The interface index would not do, since each pod has a network namespace of
// its own and most of them the same index in it. A filter without classid is pod 0, which nobody is.
//
// Fails closed: a map's missing entry is a drop.
#include <linux/bpf.h>
#include <linux/if_packet.h>
#include <linux/pkt_cls.h>

#include "flow.h"
#include "limit.h"
#include "neighbour.h"
#include "quote.h"

#define PARTNER 0x40000000

// BPF_PROG_TEST_RUN has no classid to give: the crate's tests set this and tell the pod by the mark.
const volatile __u32 pod_by_mark = 0;

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

// What the policy says of the packet, and what is written down of it.
INLINE int judge(const struct __sk_buff *skb, const struct pod *config, __u32 pod,
		 struct counters *count, int sender)
{
	// Read once: the compiler must not compute with the context's address.
	struct packet packet = {
		.start = (void *)(long)skb->data,
		.stop = (void *)(long)skb->data_end,
	};
	__u32 only = 0;
	struct course course = { .draft = map_lookup(&drafts, &only) };
	__u64 now = ktime();
	int reason;

	if (!course.draft)
		return DROP_NoPod;
	__builtin_memset(course.draft, 0, sizeof(*course.draft));
	course.draft->key.pod = pod;
	reason = examine(skb, config, &packet, sender, &course);
	if (reason)
		return reason;
	// The clock's tick may be from before the pod's beginning.
	course.draft->next.seen = (__s64)(now - config->since) < 0 ? config->since : now;
	if (course.role != LINK) {
		reason = consider(config, &packet, sender, &course);
		if (reason && course.judged && course.role != QUOTES)
			deny(count, config, &course.draft->peer, &course.draft->key, &course.draft->next, reason);
		if (reason)
			return reason;
	}
	// What keeps the link working comes from anybody on it, and must not use up what is the pod's.
	if (config->limited && (sender == VM || course.role != LINK)) {
		reason = pay(skb, pod, sender, now);
		if (reason)
			return reason;
	}
	if (course.role != OPENS && course.role != FOLLOWS)
		return ALLOWED;
	// It is there, which the verifier does not see.
	if (!course.table)
		return DROP_NoFlow;
	reason = record(count, config, &course, sender, skb->len);
	return reason || !packet.more ? reason : expect_fragments(&packet, &course, sender);
}

// Whether the VM's frame may go to the interface's other end without passing the interface, which saves a queue and
// a turn of the kernel's. Only what is for that very device: how others' frames, and those for many, are to be taken
// is decided by passing the interface.
INLINE int for_other_end(const struct __sk_buff *skb, const struct pod *config)
{
	const __u8 *to = (void *)(long)skb->data;

	return config->direct && (void *)(to + 6) <= (void *)(long)skb->data_end &&
	       same_mac(to, config->other_end);
}

// Out of the partner. The kernel drops what it cannot hand to another end (skb_do_redirect() in net/core/filter.c).
INLINE int pass_on(struct __sk_buff *skb, const struct pod *config, int sender)
{
	__u32 partner = skb->ifindex ^ PARTNER;

	if (sender == PEER || !for_other_end(skb, config))
		return redirect(partner, 0);
	// The tap took it for another host's, as which IP would throw it away; kernels do this themselves from 6.15 on.
	change_type(skb, PACKET_HOST);
	return redirect_peer(partner, 0);
}

INLINE int decide(struct __sk_buff *skb, int sender)
{
	__u32 pod = pod_by_mark ? skb->mark : skb->tc_classid & 0xffff, counted = pod;
	const struct pod *config = map_lookup(&pods, &pod);
	struct counters *count;
	__u32 reason = DROP_NoPod;

	if (!config)
		counted = 0;
	count = map_lookup(&counters, &counted);
	if (config)
		reason = judge(skb, config, pod, count, sender);
	// No reason where there is no pod: the verifier is told.
	if (reason || !config) {
		if (count && reason < REASONS)
			count->drops[sender][reason]++;
		// For who runs the program by hand; the packet ends here.
		skb->cb[0] = reason;
		return TC_ACT_SHOT;
	}
	if (count) {
		count->packets[sender]++;
		count->bytes[sender] += skb->len;
	}
	return pass_on(skb, config, sender);
}

SEC("classifier")
int from_vm(struct __sk_buff *skb)
{
	return decide(skb, VM);
}

SEC("classifier")
int to_vm(struct __sk_buff *skb)
{
	return decide(skb, PEER);
}

char _license[] SEC("license") = "Apache-2.0";

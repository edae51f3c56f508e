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

#include "mesh.h"

#define PARTNER 0x40000000

// BPF_PROG_TEST_RUN has no classid to give: the crate's tests set this and tell the pod by the mark.
const volatile __u32 pod_by_mark = 0;

// The pod that a device belongs to, as it is known, and where its packets are counted.
struct subject {
	__u32 pod;
	const struct pod *config;
	struct counters *count;
};

INLINE void subject_of(const struct __sk_buff *skb, struct subject *subject)
{
	__u32 counted;

	subject->pod = counted = pod_by_mark ? skb->mark : skb->tc_classid & 0xffff;
	subject->config = map_lookup(&pods, &subject->pod);
	if (!subject->config)
		counted = 0;
	subject->count = map_lookup(&counters, &counted);
}

INLINE int drop(struct __sk_buff *skb, const struct subject *subject, int sender, __u32 reason)
{
	if (subject->count && reason < REASONS)
		subject->count->drops[sender][reason]++;
	// For who runs the program by hand; the packet ends here.
	skb->cb[0] = reason;
	return TC_ACT_SHOT;
}

INLINE void count(const struct __sk_buff *skb, const struct subject *subject, int sender)
{
	if (subject->count) {
		subject->count->packets[sender]++;
		subject->count->bytes[sender] += skb->len;
	}
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
	struct subject subject;
	__u32 reason = DROP_NoPod;

	subject_of(skb, &subject);
	if (subject.config)
		reason = judge(skb, subject.config, subject.pod, subject.count, sender);
	// No reason where there is no pod: the verifier is told.
	if (reason || !subject.config)
		return drop(skb, &subject, sender, reason);
	count(skb, &subject, sender);
	return pass_on(skb, subject.config, sender);
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

// In a mesh: as `decide`, and which way the packet goes.
INLINE int direct(struct __sk_buff *skb, int sender, int resolves)
{
	struct subject subject;
	__u32 reason = DROP_NoPod;
	int way = PAST;

	subject_of(skb, &subject);
	if (subject.config)
		reason = judge_meshed(skb, subject.config, subject.pod, subject.count, sender,
				      resolves, &way);
	if (reason)
		return drop(skb, &subject, sender, reason);
	if (sender == PEER || way == PAST)
		count(skb, &subject, sender);
	if (way == STACK) {
		// The tap took it for another host's: it is for the gateway's hardware address.
		change_type(skb, PACKET_HOST);
		if (sender == VM)
			skb->mark = TAKEN;
		return TC_ACT_OK;
	}
	skb->mark = PASSED;
	if (way == PAST)
		return redirect(skb->ifindex ^ PARTNER, 0);
	clone_redirect(skb, skb->ifindex ^ PARTNER, 0);
	return TC_ACT_OK;
}

SEC("classifier")
int mesh_from_vm(struct __sk_buff *skb)
{
	return direct(skb, VM, 0);
}

// The same where the proxy answers the pod's DNS queries.
SEC("classifier")
int mesh_dns_from_vm(struct __sk_buff *skb)
{
	return direct(skb, VM, 1);
}

SEC("classifier")
int mesh_to_vm(struct __sk_buff *skb)
{
	return direct(skb, PEER, 0);
}

// What leaves the pod's interface: what the proxy sends is the pod's, and judged as such.
SEC("classifier")
int mesh_out(struct __sk_buff *skb)
{
	struct subject subject;
	__u32 reason = DROP_NoPod;

	if (has_passed(skb))
		return TC_ACT_OK;
	subject_of(skb, &subject);
	if (subject.config)
		reason = skb->ingress_ifindex ? DROP_NoFlow :
						judge_proxys(skb, subject.config, subject.pod, subject.count);
	if (reason)
		return drop(skb, &subject, VM, reason);
	count(skb, &subject, VM);
	return TC_ACT_OK;
}

// What leaves the tap: what the proxy sends the VM is between the two of them.
SEC("classifier")
int mesh_in(struct __sk_buff *skb)
{
	struct subject subject;
	__u32 reason = DROP_NoPod;

	if (has_passed(skb))
		return TC_ACT_OK;
	subject_of(skb, &subject);
	if (subject.config)
		reason = skb->ingress_ifindex ? DROP_NoFlow : answer(skb, subject.config, subject.pod);
	return reason ? drop(skb, &subject, PEER, reason) : TC_ACT_OK;
}

char _license[] SEC("license") = "Apache-2.0";

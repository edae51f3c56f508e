// SPDX-License-Identifier: Apache-2.0
//
// The wire: whatever enters one of two paired devices leaves the other, unchanged.
//
// The partner of device N has the interface index N ^ PARTNER (see attach.rs, which has the same
// number), so one program serves every pod of the node and there is no map and no parameter. It is
// not passed as the filter's classid because the kernel hands a program only 16 bits of that, and
// an interface that was made in the host's namespace may well have a higher index.
//
// Fails closed: without a partner the kernel drops the packet.
#include <linux/bpf.h>

#define SEC(name) __attribute__((section(name), used))
#define PARTNER 0x40000000

static long (*const redirect)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect;

SEC("classifier")
int wire(struct __sk_buff *skb)
{
	return redirect(skb->ifindex ^ PARTNER, 0);
}

char _license[] SEC("license") = "Apache-2.0";

// SPDX-License-Identifier: Apache-2.0
#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include "policy.h"

const volatile __u32 pod_by_mark = 0;

SEC("classifier")
int from_vm(struct __sk_buff *skb)
{
	return TC_ACT_SHOT;
}

SEC("classifier")
int to_vm(struct __sk_buff *skb)
{
	return TC_ACT_SHOT;
}

char _license[] SEC("license") = "Apache-2.0";

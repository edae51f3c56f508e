// SPDX-License-Identifier: Apache-2.0
//
// Packets in a second, by a clock that each packet pushes on: it may be ahead of now by a burst.
#ifndef JOEY_LIMIT_H
#define JOEY_LIMIT_H

#include "policy.h"

// How often the clock is tried to be pushed on while other CPUs do, too.
#define TRIES 4
// The least that a segment has (RFC 879).
#define LEAST_SEGMENT 536

// How many packets are sent as one that is to be cut later.
INLINE __u32 segments(const struct __sk_buff *skb)
{
	__u32 size = skb->gso_size;

	// The sender says how small; it may not have one packet cost the receiver all of its seconds.
	if (size && size < LEAST_SEGMENT)
		size = LEAST_SEGMENT;
	return size ? (skb->len + size - 1) / size : 1;
}

INLINE int pay(const struct __sk_buff *skb, __u32 pod, __u8 sender, __u64 now)
{
	struct limit *limit = map_lookup(&limits, &pod);
	__u64 interval, cost;
	int i;

	// The pod's entry says that there is one.
	if (!limit)
		return DROP_Rate;
	interval = limit->interval[sender];
	if (!interval)
		return ALLOWED;
	cost = interval * segments(skb);
#pragma unroll
	for (i = 0; i < TRIES; i++) {
		__u64 until = *(volatile __u64 *)&limit->until[sender];
		__u64 from = (__s64)(until - now) > 0 ? until : now;

		// Of a large one, a single packet has to find room, or it would never pass.
		if (from - now + interval > limit->burst[sender])
			return DROP_Rate;
		if (__sync_val_compare_and_swap(&limit->until[sender], until, from + cost) == until)
			return ALLOWED;
	}
	return DROP_Rate;
}

#endif

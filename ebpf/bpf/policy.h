// SPDX-License-Identifier: Apache-2.0
//
// What the policy's programs share with the node: maps and their layouts. src/policy/abi.rs has the
// same layouts; the loader compares the sizes whenever it opens a map.
//
// Addresses and ports are in network order. An IPv4 address is the first word of four, the rest 0;
// the family beside it (4 or 6) keeps it apart from IPv6.
#ifndef JOEY_POLICY_H
#define JOEY_POLICY_H

#include <linux/bpf.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define KIND(kind) int (*type)[kind]
#define ENTRIES(count) int (*max_entries)[count]
#define FLAGS(value) int (*map_flags)[value]
#define MAP SEC(".maps")

static void *(*const map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const map_update)(void *map, const void *key, const void *value,
				__u64 flags) = (void *)BPF_FUNC_map_update_elem;
// A tick's precision is enough for what counts seconds, and it costs a fraction.
static __u64 (*const ktime)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;
static long (*const redirect)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect;
static long (*const load_bytes)(const struct __sk_buff *skb, __u32 offset, void *to,
				__u32 length) = (void *)BPF_FUNC_skb_load_bytes;

enum reason {
	ALLOWED,
#define REASON(name, words) DROP_##name,
#include "reasons.h"
#undef REASON
	REASONS,
};

// Sides of a flow, and the direction of a packet that a side sends.
enum side { VM, PEER };

struct pod {
	__u32 tenant; // 0: of none, so the same as nobody's
	__u8 mac[6];
	__u8 unused[2];
	// The first address of each family, 0 for none; `addresses` has the others.
	__u32 ip4;
	__u32 ip6[4];
};

struct address_key {
	__u32 pod;
	__u32 family;
	__u32 address[4];
};

struct identity_key {
	__u32 bits; // of what follows: 32 for the family, then the prefix
	__u32 family;
	__u32 address[4];
};

struct identity {
	__u32 tenant; // 0: nobody's
	__u32 service; // 0: no shared service; else its class in `services`
};

struct service_key {
	__u32 service;
	__u16 port; // 0: all
	__u8 proto;
	__u8 opener; // enum side: VM for the service's own ports, PEER for what it may open on pods
};

struct allow_key {
	__u32 from; // tenant of who opens
	__u32 to;
	__u16 port; // 0: all
	__u8 proto;
	__u8 unused;
};

struct flow_key {
	__u32 pod;
	__u32 local[4];
	__u32 remote[4];
	__u16 local_port; // of ICMP echo: its id
	__u16 remote_port;
	__u8 proto;
	__u8 family;
	__u8 echo; // enum side of who asks, of ICMP echo; else 0
	__u8 unused;
};

enum state {
	NEW, // not answered yet
	ANSWERED,
	CLOSED, // TCP: reset, or finished by both
};

struct flow {
	__u64 seen; // monotonic nanoseconds
	__u8 opener; // enum side
	__u8 state;
	__u8 finished; // TCP: bit per side
	__u8 unused;
	__u32 generation; // of the policy that last let its opener open it
};

struct fragment_key {
	__u32 pod;
	__u32 source[4];
	__u32 destination[4];
	__u32 id;
	__u8 proto;
	__u8 family;
	__u8 sender; // enum side
	__u8 unused;
};

struct counters {
	__u64 packets[2]; // let through, by enum side of the sender
	__u64 bytes[2];
	__u64 drops[2][REASONS];
};

struct {
	KIND(BPF_MAP_TYPE_HASH);
	__u32 *key;
	struct pod *value;
	ENTRIES(4096);
} pods MAP;

struct {
	KIND(BPF_MAP_TYPE_HASH);
	struct address_key *key;
	__u32 *value;
	ENTRIES(32768);
	FLAGS(BPF_F_NO_PREALLOC);
} addresses MAP;

struct {
	KIND(BPF_MAP_TYPE_LPM_TRIE);
	struct identity_key *key;
	struct identity *value;
	ENTRIES(1048576);
	FLAGS(BPF_F_NO_PREALLOC);
} identities MAP;

struct {
	KIND(BPF_MAP_TYPE_HASH);
	struct service_key *key;
	__u32 *value;
	ENTRIES(65536);
	FLAGS(BPF_F_NO_PREALLOC);
} services MAP;

struct {
	KIND(BPF_MAP_TYPE_HASH);
	struct allow_key *key;
	__u32 *value;
	ENTRIES(262144);
	FLAGS(BPF_F_NO_PREALLOC);
} allows MAP;

// Counts changes of pods, identities, services and allows. Written after the change.
struct {
	KIND(BPF_MAP_TYPE_ARRAY);
	__u32 *key;
	__u32 *value;
	ENTRIES(1);
} generation MAP;

struct {
	KIND(BPF_MAP_TYPE_LRU_HASH);
	struct flow_key *key;
	struct flow *value;
	ENTRIES(262144);
} flows MAP;

struct {
	KIND(BPF_MAP_TYPE_LRU_HASH);
	struct fragment_key *key;
	__u64 *value; // when the first fragment was seen
	ENTRIES(16384);
} fragments MAP;

// Made by the node together with the pod's entry; that of pod 0 counts what belongs to no pod.
struct {
	KIND(BPF_MAP_TYPE_PERCPU_HASH);
	__u32 *key;
	struct counters *value;
	ENTRIES(4096);
	FLAGS(BPF_F_NO_PREALLOC);
} counters MAP;

#endif

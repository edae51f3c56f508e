// SPDX-License-Identifier: Apache-2.0
//
// What the policy's programs share with the node: maps and their layouts. src/policy/abi has the
// same layouts; src/policy/maps reads and writes them, pinned in a directory named by this file's digest.
//
// Addresses and ports are in network order. An IPv4 address is the first word of four, the rest 0;
// the family beside it (4 or 6) keeps it apart from IPv6.
#ifndef JOEY_POLICY_H
#define JOEY_POLICY_H

#include <linux/bpf.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define OUTLINE static __attribute__((noinline))
#define KIND(kind) int (*type)[kind]
#define ENTRIES(count) int (*max_entries)[count]
#define KEY_SIZE(size) int (*key_size)[size]
#define VALUE_SIZE(size) int (*value_size)[size]
#define FLAGS(value) int (*map_flags)[value]
#define MAP SEC(".maps")
#define __array(name, kind) typeof(kind) *name[]

static void *(*const map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const map_update)(void *map, const void *key, const void *value,
				__u64 flags) = (void *)BPF_FUNC_map_update_elem;
// A tick's precision is enough for what counts seconds, and it costs a fraction.
static __u64 (*const ktime)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;
static void *(*const reserve)(void *ring, __u64 size, __u64 flags) = (void *)BPF_FUNC_ringbuf_reserve;
static void (*const submit)(void *data, __u64 flags) = (void *)BPF_FUNC_ringbuf_submit;
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

// Who judges: the pod's own side of all rules.
struct pod {
	__u64 since; // monotonic nanoseconds; flows seen before were an earlier pod's of this number
	__u64 name; // digest of namespace and name, 0 if not known: see `identity`
	__u32 tenant; // 0: of none, so the same as nobody's
	__u32 space; // number of its Kubernetes namespace; 0 for none
	__u32 table; // index in `flows`
	__u32 limited; // has an entry in `limits`
	__u8 mac[6];
	__u8 unused[2];
	// The first address of each family, 0 for none; `addresses` has the others.
	__u32 ip4;
	__u32 ip6[4];
	__u32 padding;
};

struct address_key {
	__u32 pod;
	__u32 family;
	__u32 address[4];
};

// What is in force. The generation is another one after each change of anything that a verdict depends on, and is
// written last, so it is read first: what was decided under an old policy is not kept as if a new one had.
enum active {
	EPOCH, // leads the keys of `identities`, `spaces` and `rules`
	GENERATION,
};

// The node's own addresses, and those of its pods; they go before `identities`.
struct local_key {
	__u32 family;
	__u32 address[4];
};

struct local {
	__u64 name; // as in `pod`
	__u32 tenant;
	__u32 pod; // 0: the node itself
};

struct identity_key {
	__u32 bits; // of what follows: 64 for epoch and family, then the prefix
	__u32 epoch;
	__u32 family;
	__u32 address[4];
};

struct identity {
	__u64 name; // of the pod that group and policy were made for; 0: not of one pod
	__u32 tenant; // 0: nobody's
	__u32 service; // 0: no shared service; else its class
	__u32 near; // the class of services that name this very address; `service` has those of prefixes, too
	__u32 group; // as a peer in NetworkPolicies; 0: in none
	__u32 policy; // NetworkPolicies that select it, and ISOLATED_*; 0: none
	__u32 padding;
};

// The class of the node's own addresses.
#define NODE 1

// The policy's number has these, so that no map has to tell.
enum { ISOLATED_EGRESS = 1, ISOLATED_INGRESS = 2 };

// Policy of pods of a namespace whose labels are not known.
struct space_key {
	__u32 epoch;
	__u32 space;
};

enum rule_kind {
	SERVICE, // subject: class; object: enum side that may open
	TENANTS, // subject: tenant that opens; object: to whom
	EGRESS, // subject: policy; object: group of the peer, 0 for any
	INGRESS,
};

// From `proto` on, less than all may count: any protocol, any port, ports with one prefix.
struct rule_key {
	__u32 bits; // of what follows, so 104 and more
	__u32 epoch;
	__u32 subject;
	__u32 object;
	__u8 kind;
	__u8 proto;
	__u16 port; // of who does not open
};

struct flow_key {
	__u32 pod;
	__u32 local[4];
	__u32 remote[4];
	__u16 local_port; // of ICMP echo: its id; of fragments, with the next: their id
	__u16 remote_port;
	__u8 proto;
	__u8 family;
	__u8 echo; // enum side of who asks, of ICMP echo; of who sends, of fragments; else 0
	__u8 fragments; // 1: not a flow but fragments whose first one was let through; 2: QUERY
};

// Of key.fragments: not a flow but the last DNS query from a port of the VM's that a mesh's proxy was given.
#define QUERY 2

enum state {
	NEW, // not answered yet
	ANSWERED,
	CLOSED, // TCP: reset, or finished by both
};

struct flow {
	__u64 seen; // monotonic nanoseconds, as all times
	__u64 begun;
	union {
		__u64 packets[2]; // by enum side of the sender
		__u32 asked[4]; // of QUERY: whom
	};
	__u64 bytes[2];
	__u32 generation; // of the policy that last let its opener open it
	__u8 opener; // enum side
	__u8 state;
	__u8 finished; // TCP: bit per side
	__u8 proxy; // 1: of a mesh's proxy in the pod's name, and not the VM's
};

// A refused attempt: the flow that it would have been, with the port of who opens 0.
struct denied {
	__u64 begun;
	__u64 seen;
	__u64 packets;
	__u32 reason;
	__u32 opener; // enum side
};

enum event_kind { OPENED, ENDED, DENIED };

struct event {
	__u64 peer_name; // of who the peer is, as known; 0: nobody's
	__u32 tenant;
	__u32 peer_tenant;
	__u32 peer_service;
	__u32 peer_pod; // on this node; 0: none
	struct flow_key key;
	__u8 kind; // enum event_kind
	__u8 reason; // of DENIED
	__u8 unused[2];
	struct flow flow; // of DENIED: seen, begun, and who was to open
};

// Packets in a second, as the time that each takes; by enum side of the sender, 0 for no limit.
struct limit {
	__u64 interval[2];
	__u64 burst[2]; // how far `until` may be ahead of now
	__u64 until[2]; // monotonic nanoseconds until which packets are paid for
};

struct counters {
	__u64 packets[2]; // let through, by enum side of the sender
	__u64 bytes[2];
	__u64 drops[2][REASONS];
	__u64 unsaid; // events that were not said, as there were too many
	__u64 told; // monotonic nanoseconds until which this CPU's events of the pod are paid for
};

struct {
	KIND(BPF_MAP_TYPE_HASH);
	__u32 *key;
	struct pod *value;
	ENTRIES(4096);
	FLAGS(BPF_F_NO_PREALLOC);
} pods MAP;

struct {
	KIND(BPF_MAP_TYPE_HASH);
	struct address_key *key;
	__u32 *value;
	ENTRIES(32768);
	FLAGS(BPF_F_NO_PREALLOC);
} addresses MAP;

struct {
	KIND(BPF_MAP_TYPE_ARRAY);
	__u32 *key;
	__u32 *value; // enum active
	ENTRIES(2);
} active MAP;

struct {
	KIND(BPF_MAP_TYPE_HASH);
	struct local_key *key;
	struct local *value;
	ENTRIES(65536);
	FLAGS(BPF_F_NO_PREALLOC);
} locals MAP;

// Twice what a policy may have: the next is made while the last one counts.
struct {
	KIND(BPF_MAP_TYPE_LPM_TRIE);
	struct identity_key *key;
	struct identity *value;
	ENTRIES(1048576);
	FLAGS(BPF_F_NO_PREALLOC);
} identities MAP;

struct {
	KIND(BPF_MAP_TYPE_HASH);
	struct space_key *key;
	__u32 *value;
	ENTRIES(131072);
	FLAGS(BPF_F_NO_PREALLOC);
} spaces MAP;

struct {
	KIND(BPF_MAP_TYPE_LPM_TRIE);
	struct rule_key *key;
	__u32 *value;
	ENTRIES(1048576);
	FLAGS(BPF_F_NO_PREALLOC);
} rules MAP;

// Many tables instead of one: what a pod has in its own table no other tenant can push out.
#define TABLES 64

struct table {
	KIND(BPF_MAP_TYPE_LRU_HASH);
	KEY_SIZE(sizeof(struct flow_key));
	VALUE_SIZE(sizeof(struct flow));
	ENTRIES(8192);
};

struct {
	KIND(BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__u32 *key;
	ENTRIES(TABLES);
	__array(values, struct table);
} flows MAP;

struct {
	KIND(BPF_MAP_TYPE_LRU_HASH);
	struct flow_key *key;
	struct denied *value;
	ENTRIES(16384);
} denials MAP;

struct {
	KIND(BPF_MAP_TYPE_RINGBUF);
	ENTRIES(1048576);
} events MAP;

// Made by the node with the pod's entry, which says whether there is one.
struct {
	KIND(BPF_MAP_TYPE_HASH);
	__u32 *key;
	struct limit *value;
	ENTRIES(4096);
	FLAGS(BPF_F_NO_PREALLOC);
} limits MAP;

// Made by the node together with the pod's entry; that of pod 0 counts what belongs to no pod.
struct {
	KIND(BPF_MAP_TYPE_PERCPU_HASH);
	__u32 *key;
	struct counters *value;
	ENTRIES(4096);
	FLAGS(BPF_F_NO_PREALLOC);
} counters MAP;

// Not for programs: what pods that are gone had counted, by tenant.
struct {
	KIND(BPF_MAP_TYPE_HASH);
	__u32 *key;
	struct counters *value;
	ENTRIES(65536);
	FLAGS(BPF_F_NO_PREALLOC);
} totals MAP;

// Not for programs: the numbers of tenants and namespaces, by name.
struct name {
	char name[256];
};

struct {
	KIND(BPF_MAP_TYPE_HASH);
	struct name *key;
	__u32 *value;
	ENTRIES(65536);
	FLAGS(BPF_F_NO_PREALLOC);
} names MAP;

#endif

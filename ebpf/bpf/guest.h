// SPDX-License-Identifier: Apache-2.0
//
// What programs in the guest's kernel have in common (see src/guest): helpers, and an address with its port.
#ifndef JOEY_GUEST_H
#define JOEY_GUEST_H

#include <linux/bpf.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define KIND(kind) int (*type)[kind]
#define ENTRIES(count) int (*max_entries)[count]
#define KEY_SIZE(size) int (*key_size)[size]
#define VALUE_SIZE(size) int (*value_size)[size]
#define KEY(kind) kind *key
#define VALUE(kind) kind *value
#define FLAGS(flags) int (*map_flags)[flags]
#define MAP SEC(".maps")
#define __array(name, kind) typeof(kind) *name[]
// Keeps clang from making one access of two neighbouring fields of a context, which the verifier takes as they are.
#define BARRIER asm volatile("" ::: "memory")
// Likewise where one of two fields is wanted: clang would read from a computed place.
#define READ(field) (*(const volatile __u32 *)&(field))

static void *(*const map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const map_update)(void *map, const void *key, const void *value,
				__u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*const map_delete)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;
static void *(*const storage)(void *map, void *socket, void *value,
			      __u64 flags) = (void *)BPF_FUNC_sk_storage_get;
static long (*const storage_delete)(void *map, void *socket) = (void *)BPF_FUNC_sk_storage_delete;
static __u64 (*const user_and_group)(void) = (void *)BPF_FUNC_get_current_uid_gid;

// `enum` and constants of headers that would bring in the C library's.
enum { IPV4 = 2, IPV6 = 10 }; // AF_*
enum { TCP = 6, UDP = 17 }; // IPPROTO_*
enum { DENY, ALLOW }; // what programs on a cgroup return

// What programs do with numbers in network order.
#define SHORT(number) __builtin_bswap16(number)
#define LONG(number) __builtin_bswap32(number)

// IPv4 is ::ffff:a.b.c.d, as sockets of IPv6 have it. The address is in network order, the port is not.
struct endpoint {
	__u32 address[4];
	__u16 port;
	__u16 unused;
};

INLINE struct endpoint ipv4(__u32 address, __u16 port)
{
	return (struct endpoint){ .address = { 0, 0, LONG(0xffff), address }, .port = port };
}

INLINE int is_ipv4(const struct endpoint *it)
{
	return !it->address[0] && !it->address[1] && it->address[2] == LONG(0xffff);
}

// Of this host without a device of its own: loopback, and the address that is none, which stands for it.
INLINE int is_loopback(const struct endpoint *it)
{
	__u32 last = it->address[3];

	if (is_ipv4(it))
		return !last || (LONG(last) >> 24) == 127;
	return !it->address[0] && !it->address[1] && !it->address[2] && (!last || last == LONG(1));
}

// 127.0.0.1, ::1, and the address that is none.
INLINE int is_localhost(const struct endpoint *it)
{
	__u32 last = it->address[3];

	return is_loopback(it) && (!last || LONG(last) == (is_ipv4(it) ? 0x7f000001 : 1));
}

INLINE int is_same(const struct endpoint *one, const struct endpoint *other)
{
	return one->address[0] == other->address[0] && one->address[1] == other->address[1] &&
	       one->address[2] == other->address[2] && one->address[3] == other->address[3] &&
	       one->port == other->port;
}

// Where a call to connect(2) or sendmsg(2) goes, or what recvmsg(2) and getpeername(2) answer.
INLINE struct endpoint named4(const struct bpf_sock_addr *call)
{
	return ipv4(call->user_ip4, SHORT(call->user_port));
}

INLINE struct endpoint named6(const struct bpf_sock_addr *call)
{
	return (struct endpoint){
		.address = { call->user_ip6[0], call->user_ip6[1], call->user_ip6[2],
			     call->user_ip6[3] },
		.port = SHORT(call->user_port),
	};
}

INLINE void name4(struct bpf_sock_addr *call, const struct endpoint *to)
{
	call->user_ip4 = to->address[3];
	BARRIER;
	call->user_port = SHORT(to->port);
}

INLINE void name6(struct bpf_sock_addr *call, const struct endpoint *to)
{
	call->user_ip6[0] = to->address[0];
	BARRIER;
	call->user_ip6[1] = to->address[1];
	BARRIER;
	call->user_ip6[2] = to->address[2];
	BARRIER;
	call->user_ip6[3] = to->address[3];
	BARRIER;
	call->user_port = SHORT(to->port);
}

#endif

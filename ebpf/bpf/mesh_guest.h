// SPDX-License-Identifier: Apache-2.0
//
// What the mesh's programs in the guest share with the agent: maps and their layouts, which src/guest/mesh.rs has too.
#ifndef JOEY_MESH_GUEST_H
#define JOEY_MESH_GUEST_H

#include "guest.h"

static long (*const set_flags)(struct bpf_sock_ops *event,
			       int flags) = (void *)BPF_FUNC_sock_ops_cb_flags_set;

// What the pod asks for. Zero, as it is before there is a pod: nothing.
enum mode { CAPTURE = 1, OBSERVE = 2 };

struct settings {
	__u32 mode;
	// Where the proxy listens on loopback.
	__u16 outbound;
	__u16 inbound;
	__u16 dns; // 0: queries are left alone
	__u16 every_port; // inbound: but for those that are excluded; else only those that are included
};

struct {
	KIND(BPF_MAP_TYPE_ARRAY);
	ENTRIES(1);
	KEY(__u32);
	VALUE(struct settings);
} settings MAP;

enum port_mark { OUT_EXCLUDED = 1, OUT_INCLUDED = 2, IN_EXCLUDED = 4, IN_INCLUDED = 8 };

// Port → what is said of it.
struct {
	KIND(BPF_MAP_TYPE_HASH);
	ENTRIES(1024);
	KEY(__u32);
	VALUE(__u32);
} ports MAP;

// Lists of prefixes. The pod's own addresses are one.
enum range { EXCLUDED = 1, INCLUDED, OWN };

struct range_key {
	__u32 bits; // of what follows: 32 for the list, then the prefix
	__u32 list;
	__u32 address[4];
};

struct {
	KIND(BPF_MAP_TYPE_LPM_TRIE);
	ENTRIES(1024);
	FLAGS(BPF_F_NO_PREALLOC);
	KEY(struct range_key);
	VALUE(__u32);
} ranges MAP;

// Users and groups whose connections are left alone: the proxy's.
enum owner { USER = 1, GROUP };

struct owner_key {
	__u32 kind;
	__u32 id;
};

struct {
	KIND(BPF_MAP_TYPE_HASH);
	ENTRIES(256);
	KEY(struct owner_key);
	VALUE(__u32);
} owners MAP;

// A redirected connection from its first packet until the proxy has it.
struct pending_key {
	__u32 address[4]; // of who connects
	__u16 port;
	__u16 proxy; // to which port
};

// The oldest are forgotten when it is full, and the proxy does not learn where those were to go.
struct {
	KIND(BPF_MAP_TYPE_LRU_HASH);
	ENTRIES(16384);
	KEY(struct pending_key);
	VALUE(struct endpoint);
} pending MAP;

// What a socket is, for as long as there is one.
enum socket_kind {
	REDIRECTED = 1, // goes to the proxy instead of to `original`
	PROXY, // was bound by the proxy to a port of its own, or was accepted from such a one
	ACCEPTED, // by the proxy, and `original` is where the connection was to go
};

struct socket {
	__u32 kind;
	struct endpoint original;
};

struct {
	KIND(BPF_MAP_TYPE_SK_STORAGE);
	// What is accepted is of the listener's kind from the first.
	FLAGS(BPF_F_NO_PREALLOC | BPF_F_CLONE);
	KEY(int);
	VALUE(struct socket);
} sockets MAP;

// The proxy's listening sockets for inbound connections, IPv4's and then IPv6's: several, as a proxy has one for each
// of its threads, and an old one's go while a new one's come.
#define LISTENERS 8

struct {
	KIND(BPF_MAP_TYPE_SOCKMAP);
	ENTRIES(2 * LISTENERS);
	KEY_SIZE(4);
	VALUE_SIZE(4);
} listeners MAP;

// Which of them is replaced next, by family.
struct {
	KIND(BPF_MAP_TYPE_ARRAY);
	ENTRIES(2);
	KEY(__u32);
	VALUE(__u32);
} turns MAP;

INLINE const struct settings *settings_for(__u32 mode)
{
	__u32 key = 0;
	const struct settings *it = map_lookup(&settings, &key);

	return it && (it->mode & mode) ? it : 0;
}

// The other end of a socket's connection, and the socket's own; of IPv4 over a socket of IPv6 as of IPv4.
INLINE struct endpoint remote(const struct bpf_sock_ops *event)
{
	__u32 short_form = READ(event->remote_ip4), family = READ(event->family);
	struct endpoint it = {
		.address = { READ(event->remote_ip6[0]), READ(event->remote_ip6[1]), READ(event->remote_ip6[2]),
			     READ(event->remote_ip6[3]) },
		.port = LONG(READ(event->remote_port)),
	};

	return family == IPV4 ? ipv4(short_form, it.port) : it;
}

INLINE struct endpoint local(const struct bpf_sock_ops *event, const struct endpoint *remote)
{
	__u32 short_form = READ(event->local_ip4);
	struct endpoint it = {
		.address = { READ(event->local_ip6[0]), READ(event->local_ip6[1]), READ(event->local_ip6[2]),
			     READ(event->local_ip6[3]) },
		.port = READ(event->local_port),
	};

	return is_ipv4(remote) ? ipv4(short_form, it.port) : it;
}

#endif

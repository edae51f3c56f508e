// SPDX-License-Identifier: Apache-2.0
//
// Sidecar mode: which connections the pod's proxy gets, and how it learns where they were to go.
//
// What is captured is what Istio's rules capture (tools/istio-iptables/pkg/capture/run.go), in their order: excluded
// ports; the proxy's own; loopback and the pod itself; excluded ranges; included ports; included ranges.
#ifndef JOEY_MESH_CAPTURE_H
#define JOEY_MESH_CAPTURE_H

#include "mesh_guest.h"

static long (*const put_socket)(struct bpf_sock_ops *event, void *map, void *key,
				__u64 flags) = (void *)BPF_FUNC_sock_map_update;
static long (*const assign)(struct bpf_sk_lookup *packet, void *socket,
			    __u64 flags) = (void *)BPF_FUNC_sk_assign;
static long (*const release)(void *socket) = (void *)BPF_FUNC_sk_release;

// The proxy's port for tunnels (Istio's INBOUND_TUNNEL_PORT).
#define TUNNEL 15008
#define DOMAIN 53
// `/usr/include/linux/netfilter_ipv4.h`, which brings in the C library's headers; IPv6's is the same.
#define SO_ORIGINAL_DST 80
enum { SOL_IP = 0, SOL_IPV6 = 41 };

enum target { DIRECT, TO_OUTBOUND, TO_INBOUND, TO_DNS };

INLINE int is_in(__u32 list, const struct endpoint *it)
{
	struct range_key key = {
		.bits = 32 + 128,
		.list = list,
		.address = { it->address[0], it->address[1], it->address[2], it->address[3] },
	};

	return !!map_lookup(&ranges, &key);
}

INLINE __u32 marks_of(__u32 port)
{
	const __u32 *marks = map_lookup(&ports, &port);

	return marks ? *marks : 0;
}

// Whether the process that calls is the proxy.
INLINE int is_proxy(void)
{
	__u64 both = user_and_group();
	struct owner_key key = { .kind = USER, .id = (__u32)both };

	if (map_lookup(&owners, &key))
		return 1;
	key.kind = GROUP;
	key.id = both >> 32;
	return !!map_lookup(&owners, &key);
}

// `back`: bound to the address by which the proxy marks what it hands on to the pod.
INLINE enum target target_of(const struct settings *it, const struct endpoint *to, int protocol,
			     int back)
{
	__u32 marks = marks_of(to->port);
	int query = it->dns && to->port == DOMAIN;

	if (marks & OUT_EXCLUDED)
		return DIRECT;
	if (is_proxy()) {
		// What the pod sends to a service that the pod itself serves reaches it as from outside; and so does
		// what goes to another loopback address, by which Istio's validation tries it.
		if (protocol != TCP || back || query || to->port == TUNNEL || is_localhost(to))
			return DIRECT;
		return is_loopback(to) || is_in(OWN, to) ? TO_INBOUND : DIRECT;
	}
	if (query)
		return TO_DNS;
	if (protocol != TCP || is_loopback(to) || is_in(OWN, to) || is_in(EXCLUDED, to))
		return DIRECT;
	return (marks & OUT_INCLUDED) || is_in(INCLUDED, to) ? TO_OUTBOUND : DIRECT;
}

// Redirects a connection or a datagram, and remembers where it was to go; 0 if it cannot be remembered.
INLINE int capture(struct bpf_sock_addr *call, struct endpoint *to, int back)
{
	const struct settings *it = settings_for(CAPTURE);
	struct socket fresh = { .kind = REDIRECTED, .original = *to };
	struct socket *known;
	enum target target;

	if (!it || !call->sk || (call->protocol != TCP && call->protocol != UDP))
		return ALLOW;
	target = target_of(it, to, call->protocol, back);
	if (target == DIRECT) {
		// What it was before, by an earlier call.
		known = storage(&sockets, call->sk, 0, 0);
		if (known && known->kind == REDIRECTED)
			storage_delete(&sockets, call->sk);
		return ALLOW;
	}
	known = storage(&sockets, call->sk, &fresh, BPF_SK_STORAGE_GET_F_CREATE);
	if (!known)
		return DENY;
	*known = fresh;
	if (is_ipv4(to)) {
		to->address[3] = LONG(0x7f000001);
	} else {
		to->address[0] = to->address[1] = to->address[2] = 0;
		to->address[3] = LONG(1);
	}
	to->port = target == TO_OUTBOUND ? it->outbound :
		   target == TO_INBOUND	 ? it->inbound :
					   it->dns;
	return ALLOW;
}

// Where a socket's connection or datagrams were to go; null if there is nothing to say.
INLINE const struct endpoint *original(struct bpf_sock_addr *call)
{
	const struct socket *known;

	if (!settings_for(CAPTURE) || !call->sk)
		return 0;
	known = storage(&sockets, call->sk, 0, 0);
	return known && known->kind == REDIRECTED ? &known->original : 0;
}

// An answer of the proxy's to a query is one of the server that was asked.
INLINE const struct endpoint *answered(struct bpf_sock_addr *call, const struct endpoint *from)
{
	const struct settings *it = settings_for(CAPTURE);

	if (!it || !it->dns || from->port != it->dns || !is_loopback(from))
		return 0;
	return original(call);
}

// The proxy's ports are the proxy's: a socket on one of them gets the pod's connections, whoever made it.
INLINE int bound(struct bpf_sock *socket, __u32 port)
{
	const struct settings *it = settings_for(CAPTURE);
	struct socket fresh = { .kind = PROXY };

	if (!it || !port)
		return ALLOW;
	if (socket->protocol == UDP ? port != it->dns :
				      port != it->outbound && port != it->inbound && port != it->dns)
		return ALLOW;
	if (!is_proxy())
		return DENY;
	return storage(&sockets, socket, &fresh, BPF_SK_STORAGE_GET_F_CREATE) ? ALLOW : DENY;
}

INLINE struct pending_key pending_of(const struct endpoint *from, const struct endpoint *to)
{
	return (struct pending_key){
		.address = { from->address[0], from->address[1], from->address[2],
			     from->address[3] },
		.port = from->port,
		.proxy = to->port,
	};
}

// The proxy listens for what comes in. One of its sockets more gets a place; the oldest loses it.
INLINE void listens(struct bpf_sock_ops *event, const struct socket *known,
		    const struct settings *it)
{
	__u32 family = event->family == IPV6, slot, *turn;

	if (known->kind != PROXY || event->local_port != it->inbound)
		return;
	turn = map_lookup(&turns, &family);
	if (!turn)
		return;
	slot = family * LISTENERS + __sync_fetch_and_add(turn, 1) % LISTENERS;
	put_socket(event, &listeners, &slot, BPF_ANY);
}

INLINE void tcp_event(struct bpf_sock_ops *event)
{
	const struct settings *it = settings_for(CAPTURE);
	struct endpoint near, far, *known_original;
	struct pending_key key;
	struct socket *known;

	if (!it || !event->sk)
		return;
	known = storage(&sockets, event->sk, 0, 0);
	if (!known)
		return;
	if (event->op == BPF_SOCK_OPS_TCP_LISTEN_CB) {
		listens(event, known, it);
		return;
	}
	far = remote(event);
	near = local(event, &far);
	switch (event->op) {
	// Before the first packet leaves, so before the proxy can ask.
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (known->kind != REDIRECTED)
			return;
		key = pending_of(&near, &far);
		map_update(&pending, &key, &known->original, BPF_ANY);
		set_flags(event, BPF_SOCK_OPS_STATE_CB_FLAG);
		return;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (known->kind != PROXY)
			return;
		key = pending_of(&far, &near);
		known_original = map_lookup(&pending, &key);
		if (!known_original)
			return;
		known->original = *known_original;
		known->kind = ACCEPTED;
		map_delete(&pending, &key);
		return;
	// The connection was refused, or has ended.
	case BPF_SOCK_OPS_STATE_CB:
		if (event->args[1] != BPF_TCP_CLOSE || known->kind != REDIRECTED)
			return;
		key = pending_of(&near, &far);
		map_delete(&pending, &key);
	}
}

INLINE struct endpoint sender(const struct bpf_sk_lookup *packet)
{
	__u32 short_form = READ(packet->remote_ip4), family = READ(packet->family);
	struct endpoint it = {
		.address = { READ(packet->remote_ip6[0]), READ(packet->remote_ip6[1]),
			     READ(packet->remote_ip6[2]), READ(packet->remote_ip6[3]) },
	};

	return family == IPV4 ? ipv4(short_form, 0) : it;
}

// Hands a packet that opens a connection from outside to the proxy; 0 if it is to be refused.
INLINE int hand_over(struct bpf_sk_lookup *packet)
{
	const struct settings *it = settings_for(CAPTURE);
	__u32 marks, slot, last;
	struct endpoint from;
	void *socket;
	int i;

	if (!it || packet->protocol != TCP)
		return SK_PASS;
	// From the pod itself: by its address, since `ingress_ifindex` is that of the address's device even if the
	// packet came by loopback. From outside nobody gets an answer to such an address.
	from = sender(packet);
	if (is_loopback(&from) || is_in(OWN, &from))
		return SK_PASS;
	marks = marks_of(packet->local_port);
	if (packet->local_port == TUNNEL ||
	    (it->every_port ? marks & IN_EXCLUDED : !(marks & IN_INCLUDED)))
		return SK_PASS;
	// A socket of IPv6 may take both.
	slot = packet->family == IPV4 ? 0 : LISTENERS;
#pragma clang loop unroll(disable)
	for (i = 0; i < 2 * LISTENERS; i++) {
		if (slot + i >= 2 * LISTENERS)
			break;
		last = slot + i;
		socket = map_lookup(&listeners, &last);
		if (!socket)
			continue;
		last = assign(packet, socket, 0);
		release(socket);
		if (!last)
			return SK_PASS;
	}
	return SK_DROP;
}

struct ipv4_name { // struct sockaddr_in
	__u16 family;
	__u16 port;
	__u32 address;
	__u64 unused;
};

struct ipv6_name { // struct sockaddr_in6
	__u16 family;
	__u16 port;
	__u32 flow;
	__u32 address[4];
	__u32 scope;
};

INLINE struct endpoint own(const struct bpf_sock *socket)
{
	__u32 short_form = READ(socket->src_ip4), family = READ(socket->family);
	struct endpoint it = {
		.address = { READ(socket->src_ip6[0]), READ(socket->src_ip6[1]), READ(socket->src_ip6[2]),
			     READ(socket->src_ip6[3]) },
		.port = READ(socket->src_port),
	};

	return family == IPV4 ? ipv4(short_form, it.port) : it;
}

// Answers the proxy's question where a connection that it has accepted was to go.
INLINE void answer(struct bpf_sockopt *call)
{
	const struct socket *known;
	struct endpoint to;

	if (call->optname != SO_ORIGINAL_DST || !call->sk || !settings_for(CAPTURE))
		return;
	known = storage(&sockets, call->sk, 0, 0);
	if (!known || known->kind == REDIRECTED)
		return;
	if (known->kind == ACCEPTED)
		to = known->original;
	// One from outside has come to where it was to go.
	else
		to = own(call->sk);
	if (call->level == SOL_IP && is_ipv4(&to)) {
		struct ipv4_name *name = call->optval;

		if ((void *)(name + 1) > call->optval_end)
			return;
		name->family = IPV4;
		name->port = SHORT(to.port);
		name->address = to.address[3];
		name->unused = 0;
		call->optlen = sizeof(*name);
	} else if (call->level == SOL_IPV6 && !is_ipv4(&to)) {
		struct ipv6_name *name = call->optval;

		if ((void *)(name + 1) > call->optval_end)
			return;
		name->family = IPV6;
		name->port = SHORT(to.port);
		name->flow = name->scope = 0;
		name->address[0] = to.address[0];
		name->address[1] = to.address[1];
		name->address[2] = to.address[2];
		name->address[3] = to.address[3];
		call->optlen = sizeof(*name);
	} else {
		return;
	}
	BARRIER;
	call->retval = 0;
}

#endif

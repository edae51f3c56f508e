// SPDX-License-Identifier: Apache-2.0
//
// Services in the guest: who connects or sends to a service's virtual address connects or sends to one of its
// endpoints, and is told of the virtual address.
//
// On the cgroup of all containers, after the mesh's programs: what those have redirected goes to loopback and is no
// service's, and the sidecar's own connections, which they leave alone, are translated here.
#include "services_guest.h"

static __u32 (*const random)(void) = (void *)BPF_FUNC_get_prandom_u32;
static __u64 (*const coarse_time)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;
static __u64 (*const cookie)(void *context) = (void *)BPF_FUNC_get_socket_cookie;
static int (*const set_result)(int value) = (void *)BPF_FUNC_set_retval;

#define CONNECTION_REFUSED 111
// Halvings that find one of 131,072 endpoints.
#define HALVINGS 18

// Less than 0, 0 or more: as the host has sorted them.
INLINE int compare(const struct endpoint *one, const struct endpoint *other)
{
	for (int at = 0; at < 4; at++) {
		__u32 a = LONG(one->address[at]), b = LONG(other->address[at]);

		if (a != b)
			return a < b ? -1 : 1;
	}
	return one->port == other->port ? 0 : one->port < other->port ? -1 : 1;
}

// Whether an endpoint is one of the front's.
INLINE int is_behind(void *table, const struct front *front, const struct endpoint *at)
{
	__u32 low = front->first, high = front->first + front->count;

	for (int halving = 0; halving < HALVINGS && low < high; halving++) {
		__u32 middle = low + (high - low) / 2;
		const struct backend *backend = map_lookup(table, &middle);
		int order;

		if (!backend)
			return 0;
		order = compare(at, &backend->at);
		if (!order)
			return 1;
		if (order < 0)
			high = middle;
		else
			low = middle + 1;
	}
	return 0;
}

// Chooses an endpoint: the one where this client was, if the service keeps its clients, or else one by the number.
INLINE int choose(void *table, const struct front *front, __u32 number, struct endpoint *to)
{
	__u32 id = front->id, now = coarse_time() / 1000000000, index;
	struct client *client = front->affinity ? map_lookup(&clients, &id) : 0;
	const struct backend *backend;

	if (client && now - client->seconds < front->affinity) {
		struct endpoint at = client->at;

		if (is_behind(table, front, &at)) {
			client->seconds = now;
			*to = at;
			return 1;
		}
	}
	index = front->first + number % front->count;
	backend = map_lookup(table, &index);
	if (!backend)
		return 0;
	*to = backend->at;
	if (front->affinity) {
		struct client new = { .at = *to, .seconds = now };

		map_update(&clients, &id, &new, BPF_ANY);
	}
	return 1;
}

enum found { NO_SERVICE, NO_ENDPOINT, FOUND };

// What `to` is to become.
INLINE enum found translate(__u32 protocol, __u32 number, struct endpoint *to)
{
	__u32 key = 0, *table = map_lookup(&active, &key);
	struct front_key at = { .port = to->port, .protocol = protocol };
	const struct front *front;
	void *fronts_now, *backends_now;

	if (!table || !*table)
		return NO_SERVICE;
	key = *table - 1;
	fronts_now = map_lookup(&fronts, &key);
	backends_now = map_lookup(&backends, &key);
	if (!fronts_now || !backends_now)
		return NO_SERVICE;
	__builtin_memcpy(at.address, to->address, sizeof(at.address));
	front = map_lookup(fronts_now, &at);
	if (!front)
		return NO_SERVICE;
	if (!front->count || !choose(backends_now, front, number, to))
		return NO_ENDPOINT;
	return FOUND;
}

INLINE int refused(void)
{
	set_result(-CONNECTION_REFUSED);
	return DENY;
}

INLINE int connected(struct bpf_sock_addr *call, struct endpoint *to)
{
	struct peer peer = { .service = *to }, *kept;
	struct bpf_sock *socket = call->sk;

	if (!socket)
		return ALLOW;
	switch (translate(call->protocol, random(), to)) {
	case NO_ENDPOINT:
		return refused();
	case FOUND:
		peer.backend = *to;
		kept = storage(&peers, socket, &peer, BPF_SK_STORAGE_GET_F_CREATE);
		// Without it the connection would do, but for what it is told of its peer.
		if (kept)
			*kept = peer;
		return ALLOW;
	default:
		// It may have been connected to a service before.
		storage_delete(&peers, socket);
		return ALLOW;
	}
}

// A socket stays with one endpoint as long as these are the same.
INLINE int sending(struct bpf_sock_addr *call, struct endpoint *to)
{
	struct sent_key key = { .socket = cookie(call) };
	struct endpoint service = *to;
	struct bpf_sock *socket = call->sk;
	const struct peer *peer = socket ? storage(&peers, socket, 0, 0) : 0;

	// One that is connected hears nobody else.
	if (peer && is_same(&peer->service, to)) {
		*to = peer->backend;
		return ALLOW;
	}
	switch (translate(call->protocol, key.socket * 2654435769u >> 8, to)) {
	case NO_ENDPOINT:
		return refused();
	case FOUND:
		key.backend = *to;
		map_update(&sent, &key, &service, BPF_ANY);
		return ALLOW;
	default:
		return ALLOW;
	}
}

// The service that a peer is for a connected socket.
INLINE const struct endpoint *service_of(struct bpf_sock_addr *call, const struct endpoint *from)
{
	struct bpf_sock *socket = call->sk;
	const struct peer *peer = socket ? storage(&peers, socket, 0, 0) : 0;

	return peer && is_same(&peer->backend, from) ? &peer->service : 0;
}

// The same for one that received.
INLINE const struct endpoint *answers(struct bpf_sock_addr *call, const struct endpoint *from)
{
	struct sent_key key = { .socket = cookie(call), .backend = *from };
	const struct endpoint *service = map_lookup(&sent, &key);

	return service ? service : service_of(call, from);
}

#define TRANSLATES(hook, step, family)                                   \
	SEC("cgroup/" #hook #family)                                     \
	int hook##family(struct bpf_sock_addr *call)                     \
	{                                                                \
		struct endpoint to = named##family(call), was = to;      \
		int verdict = step(call, &to);                           \
                                                                         \
		if (!is_same(&to, &was))                                 \
			name##family(call, &to);                         \
		return verdict;                                          \
	}

#define TELLS(hook, step, family)                                        \
	SEC("cgroup/" #hook #family)                                     \
	int hook##family(struct bpf_sock_addr *call)                     \
	{                                                                \
		struct endpoint from = named##family(call);              \
		const struct endpoint *service = step(call, &from);      \
                                                                         \
		if (service)                                             \
			name##family(call, service);                     \
		return ALLOW;                                            \
	}

TRANSLATES(connect, connected, 4)
TRANSLATES(connect, connected, 6)
TRANSLATES(sendmsg, sending, 4)
TRANSLATES(sendmsg, sending, 6)
TELLS(recvmsg, answers, 4)
TELLS(recvmsg, answers, 6)
TELLS(getpeername, service_of, 4)
TELLS(getpeername, service_of, 6)

char _license[] SEC("license") = "Apache-2.0";

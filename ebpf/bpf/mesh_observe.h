// SPDX-License-Identifier: Apache-2.0
//
// Observe mode: the agent is told of each connection, by whom it is and where it goes, and of its end. Nothing is
// changed or refused. Of UDP, a socket's partner is told when it is another one than before.
#ifndef JOEY_MESH_OBSERVE_H
#define JOEY_MESH_OBSERVE_H

#include "mesh_guest.h"

static __u64 (*const ktime)(void) = (void *)BPF_FUNC_ktime_get_ns;
static __u64 (*const process)(void) = (void *)BPF_FUNC_get_current_pid_tgid;
static long (*const command)(void *to, __u32 size) = (void *)BPF_FUNC_get_current_comm;
static __u64 (*const ancestor)(int level) = (void *)BPF_FUNC_get_current_ancestor_cgroup_id;
static __u64 (*const cookie)(void *context) = (void *)BPF_FUNC_get_socket_cookie;
static void *(*const reserve)(void *ring, __u64 size, __u64 flags) = (void *)BPF_FUNC_ringbuf_reserve;
static void (*const submit)(void *data, __u64 flags) = (void *)BPF_FUNC_ringbuf_submit;

// Containers' cgroups are so deep below the root.
#define CONTAINER 2

enum what { OPENED = 1, FAILED, CLOSED, RESET };
enum way { OUT = 1, IN };

// The process that has opened a connection; of what was accepted, the one that has bound the listening socket.
struct who {
	__u64 cgroup; // the container's
	__u32 process;
	__u32 user;
	char command[16];
};

struct event {
	__u64 time; // monotonic nanoseconds
	__u64 socket;
	__u64 sent; // payload of TCP, at its end
	__u64 received;
	struct who who;
	struct endpoint local; // port 0: not known yet
	struct endpoint remote;
	__u8 what;
	__u8 way;
	__u8 protocol;
	__u8 unused[5];
};

struct {
	KIND(BPF_MAP_TYPE_RINGBUF);
	ENTRIES(128 * 1024);
} events MAP;

// Events for which there was no room.
struct {
	KIND(BPF_MAP_TYPE_ARRAY);
	ENTRIES(1);
	KEY(__u32);
	VALUE(__u64);
} lost MAP;

struct seen {
	struct who who;
	struct endpoint partner; // of UDP, the last one
	__u32 way; // of a TCP connection; 0: it has none yet
};

struct {
	KIND(BPF_MAP_TYPE_SK_STORAGE);
	FLAGS(BPF_F_NO_PREALLOC | BPF_F_CLONE);
	KEY(int);
	VALUE(struct seen);
} watched MAP;

INLINE void tell(void *context, const struct seen *seen, __u8 what, __u8 way, __u8 protocol,
		 const struct endpoint *local, const struct endpoint *remote, __u64 sent,
		 __u64 received)
{
	struct event *event = reserve(&events, sizeof(*event), 0);
	__u64 *count;
	__u32 key = 0;

	if (!event) {
		count = map_lookup(&lost, &key);
		if (count)
			__sync_fetch_and_add(count, 1);
		return;
	}
	event->time = ktime();
	event->socket = cookie(context);
	event->sent = sent;
	event->received = received;
	event->who = seen->who;
	event->local = *local;
	event->remote = *remote;
	event->what = what;
	event->way = way;
	event->protocol = protocol;
	__builtin_memset(event->unused, 0, sizeof(event->unused));
	submit(event, 0);
}

// What is known of a socket, made if there is nothing, with the process that calls.
INLINE struct seen *caller(void *socket)
{
	struct seen fresh = {};
	struct seen *seen = storage(&watched, socket, &fresh, BPF_SK_STORAGE_GET_F_CREATE);

	if (!seen)
		return 0;
	seen->who.cgroup = ancestor(CONTAINER);
	seen->who.process = process() >> 32;
	seen->who.user = (__u32)user_and_group();
	command(seen->who.command, sizeof(seen->who.command));
	return seen;
}

// A call to connect(2), or to sendmsg(2) and recvmsg(2) with an address.
INLINE void watch(struct bpf_sock_addr *call, const struct endpoint *partner, __u8 way)
{
	struct endpoint none = {};
	struct seen *seen;

	if (!settings_for(OBSERVE) || !call->sk)
		return;
	if (call->protocol == TCP) {
		seen = caller(call->sk);
		if (seen)
			seen->way = OUT;
		return;
	}
	if (call->protocol != UDP)
		return;
	seen = storage(&watched, call->sk, 0, 0);
	if (seen && is_same(&seen->partner, partner))
		return;
	seen = caller(call->sk);
	if (!seen)
		return;
	seen->partner = *partner;
	tell(call, seen, OPENED, way, UDP, &none, partner, 0, 0);
}

// A socket that may come to listen.
INLINE void watch_bound(struct bpf_sock *socket)
{
	if (socket->protocol == TCP && settings_for(OBSERVE))
		caller(socket);
}

INLINE void watch_tcp(struct bpf_sock_ops *event)
{
	__u64 sent = 0, received = 0;
	struct endpoint near, far;
	struct seen *seen;
	__u8 what = OPENED;

	if (!settings_for(OBSERVE) || !event->sk)
		return;
	seen = storage(&watched, event->sk, 0, 0);
	if (!seen)
		return;
	switch (event->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		set_flags(event, BPF_SOCK_OPS_STATE_CB_FLAG);
		return;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		seen->way = IN;
		set_flags(event, BPF_SOCK_OPS_STATE_CB_FLAG);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (event->args[1] != BPF_TCP_CLOSE || !seen->way)
			return;
		sent = event->bytes_acked;
		received = event->bytes_received;
		// Both count what opens and ends a connection as a byte.
		if (seen->way == OUT && sent)
			sent--;
		switch (event->args[0]) {
		case BPF_TCP_SYN_SENT:
			what = FAILED;
			break;
		// Ends that one side has not agreed to.
		case BPF_TCP_CLOSE_WAIT:
			received -= !!received;
			what = RESET;
			break;
		case BPF_TCP_ESTABLISHED:
		case BPF_TCP_FIN_WAIT1:
			what = RESET;
			break;
		default:
			sent -= !!sent;
			received -= !!received;
			what = CLOSED;
		}
		break;
	default:
		return;
	}
	far = remote(event);
	near = local(event, &far);
	tell(event, seen, what, seen->way, TCP, &near, &far, sent, received);
}

#endif

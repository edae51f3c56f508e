// SPDX-License-Identifier: Apache-2.0
//
// The mesh's programs in the guest: on the cgroup of all containers, and on their network namespace.
#include "mesh_capture.h"
#include "mesh_observe.h"

// The addresses by which the proxy marks what it hands on to the pod: 127.0.0.6 and ::6.
INLINE int is_back4(const struct bpf_sock_addr *call)
{
	return call->sk && call->sk->src_ip4 == LONG(0x7f000006);
}

INLINE int is_back6(const struct bpf_sock_addr *call)
{
	return call->sk && !call->sk->src_ip6[0] && !call->sk->src_ip6[1] &&
	       !call->sk->src_ip6[2] && call->sk->src_ip6[3] == LONG(6);
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *call)
{
	struct endpoint to = named4(call), was = to;
	int verdict = capture(call, &to, is_back4(call));

	watch(call, &was, OUT);
	if (!is_same(&to, &was))
		name4(call, &to);
	return verdict;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *call)
{
	struct endpoint to = named6(call), was = to;
	int verdict = capture(call, &to, is_back6(call));

	watch(call, &was, OUT);
	if (!is_same(&to, &was))
		name6(call, &to);
	return verdict;
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *call)
{
	struct endpoint to = named4(call), was = to;
	int verdict = capture(call, &to, 0);

	watch(call, &was, OUT);
	if (!is_same(&to, &was))
		name4(call, &to);
	return verdict;
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *call)
{
	struct endpoint to = named6(call), was = to;
	int verdict = capture(call, &to, 0);

	watch(call, &was, OUT);
	if (!is_same(&to, &was))
		name6(call, &to);
	return verdict;
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *call)
{
	struct endpoint from = named4(call);
	const struct endpoint *asked = answered(call, &from);

	watch(call, &from, IN);
	if (asked)
		name4(call, asked);
	return ALLOW;
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *call)
{
	struct endpoint from = named6(call);
	const struct endpoint *asked = answered(call, &from);

	watch(call, &from, IN);
	if (asked)
		name6(call, asked);
	return ALLOW;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *call)
{
	const struct endpoint *to = original(call);

	if (to)
		name4(call, to);
	return ALLOW;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *call)
{
	const struct endpoint *to = original(call);

	if (to)
		name6(call, to);
	return ALLOW;
}

SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *socket)
{
	watch_bound(socket);
	return bound(socket, socket->src_port);
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *socket)
{
	watch_bound(socket);
	return bound(socket, socket->src_port);
}

SEC("cgroup/getsockopt")
int getsockopt(struct bpf_sockopt *call)
{
	answer(call);
	return ALLOW;
}

SEC("sockops")
int sock_ops(struct bpf_sock_ops *event)
{
	tcp_event(event);
	watch_tcp(event);
	return ALLOW;
}

SEC("sk_lookup/guest")
int sk_lookup(struct bpf_sk_lookup *packet)
{
	return hand_over(packet);
}

char _license[] SEC("license") = "Apache-2.0";

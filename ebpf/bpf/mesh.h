// SPDX-License-Identifier: Apache-2.0
//
// Which way a packet of a pod in a mesh goes: past the host's stack, as any pod's, or to the proxy that listens in
// the pod's network namespace. Its sockets are looked up, never told: a proxy that comes or goes changes nothing.
//
// The proxy is as Istio's ztunnel: ports and marks are those of istio/istio cni/pkg/iptables/iptables.go, and it takes
// the destination of a connection from getsockname() (istio/ztunnel src/socket.rs, orig_dst_addr_or_default()), which
// is the original one where a listener was assigned to the SYN, as iptables' TPROXY does.
//
// Fails closed: a connection is the proxy's or is none.
#ifndef JOEY_MESH_H
#define JOEY_MESH_H

#include <linux/if_packet.h>

#include "judge.h"

enum {
	DNS = 53,
	OUTBOUND = 15001, // connections that the VM opens
	INBOUND = 15006, // those that others open to it
	TUNNEL = 15008, // those of other proxies, which carry connections
	RESOLVER = 15053, // DNS queries, on loopback
};

// Of frames that the policy let pass the stack, as seen where they leave: they come from the other device, too. No
// socket's packet is taken for one.
#define PASSED 0x6a6f6579
// Of what the VM sends and the proxy gets: ztunnel's own mark (istio-cni's iptables.go, InpodMark), which istio-cni's
// rules leave alone where they are in the namespace. They would redirect all else to an address of the tap, which has
// none.
#define TAKEN 0x539
#define ARP_REPLY 2

static struct bpf_sock *(*const lookup_tcp)(void *context, struct bpf_sock_tuple *tuple, __u32 size,
					    __u64 netns, __u64 flags) = (void *)BPF_FUNC_skc_lookup_tcp;
static struct bpf_sock *(*const lookup_udp)(void *context, struct bpf_sock_tuple *tuple, __u32 size,
					    __u64 netns, __u64 flags) = (void *)BPF_FUNC_sk_lookup_udp;
static long (*const release)(void *socket) = (void *)BPF_FUNC_sk_release;
static long (*const assign)(void *context, void *socket, __u64 flags) = (void *)BPF_FUNC_sk_assign;
static long (*const clone_redirect)(struct __sk_buff *skb, __u32 ifindex,
				    __u64 flags) = (void *)BPF_FUNC_clone_redirect;

static long (*const store_bytes)(struct __sk_buff *skb, __u32 offset, const void *from, __u32 length,
				 __u64 flags) = (void *)BPF_FUNC_skb_store_bytes;
static long (*const replace_header_sum)(struct __sk_buff *skb, __u32 offset, __u64 from, __u64 to,
					__u64 flags) = (void *)BPF_FUNC_l3_csum_replace;
static long (*const replace_sum)(struct __sk_buff *skb, __u32 offset, __u64 from, __u64 to,
				 __u64 flags) = (void *)BPF_FUNC_l4_csum_replace;
static __s64 (*const csum_diff)(void *from, __u32 from_size, void *to, __u32 to_size,
				__u32 seed) = (void *)BPF_FUNC_csum_diff;

// Where a packet goes that the policy allows.
enum way {
	PAST, // out of the other device
	STACK, // to the proxy's sockets
	BOTH, // an answer about the link, which the stack may have asked for
};

// The tuple of a packet as it is, to be changed by who looks for listeners; its size.
INLINE __u32 tuple_of(struct bpf_sock_tuple *tuple, const struct packet *packet)
{
	__builtin_memset(tuple, 0, sizeof(*tuple));
	if (packet->family == 4) {
		tuple->ipv4.saddr = packet->source[0];
		tuple->ipv4.daddr = packet->destination[0];
		tuple->ipv4.sport = packet->source_port;
		tuple->ipv4.dport = packet->destination_port;
		return sizeof(tuple->ipv4);
	}
	copy_address(tuple->ipv6.saddr, packet->source);
	copy_address(tuple->ipv6.daddr, packet->destination);
	tuple->ipv6.sport = packet->source_port;
	tuple->ipv6.dport = packet->destination_port;
	return sizeof(tuple->ipv6);
}

// Whether a connection of the namespace's sockets has this segment. One that only waits for late segments has none
// that opens another.
INLINE int is_connected(struct __sk_buff *skb, const struct packet *packet, int opens)
{
	struct bpf_sock_tuple tuple;
	__u32 state, size = tuple_of(&tuple, packet);
	struct bpf_sock *socket = lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);

	if (!socket)
		return 0;
	state = socket->state;
	release(socket);
	return state != BPF_TCP_LISTEN && !(opens && state == BPF_TCP_TIME_WAIT);
}

// Gives a segment that opens a connection to who listens on `port` of all addresses.
INLINE int give(struct __sk_buff *skb, const struct packet *packet, __u16 port)
{
	struct bpf_sock_tuple tuple;
	__u32 size = tuple_of(&tuple, packet);
	struct bpf_sock *socket;
	long failed = 1;

	// From port 0: nothing is connected to that.
	if (packet->family == 4) {
		tuple.ipv4.sport = 0;
		tuple.ipv4.dport = BE16(port);
	} else {
		tuple.ipv6.sport = 0;
		tuple.ipv6.dport = BE16(port);
	}
	socket = lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!socket)
		return DROP_Proxy;
	if (socket->state == BPF_TCP_LISTEN)
		failed = assign(skb, socket, 0);
	release(socket);
	return failed ? DROP_Proxy : ALLOWED;
}

// An address that is the namespace's own wherever one is, or nobody's: to the proxy it would be its own.
INLINE int is_nowhere(__u32 family, const __u32 *address)
{
	__u32 first = BE32(address[0]);

	if (family == 4)
		return first >> 24 == 127 || first >> 24 == 0;
	// ::, ::1 and all that have IPv4 addresses in them (RFC 4291, 2.5.5).
	return !(address[0] | address[1]) && (!address[2] || BE32(address[2]) == 0xffff);
}

// Whether the flow is one that the proxy has with others, and not the VM. What is not known could be.
INLINE int is_proxys(const struct pod *config, const struct flow_key *key)
{
	void *table = map_lookup(&flows, &config->table);
	const struct flow *flow = table ? map_lookup(table, key) : 0;

	return !flow || flow->proxy;
}

// Whether a connection's opener is the node itself, whose kubelet asks the container and not the mesh; or the
// addresses that istio-cni gives to the kubelet's connections (iptables.go, HostProbeSNATAddress).
INLINE int is_probe(const struct packet *packet)
{
	struct local_key key = { .family = packet->family };
	const __u32 *address = packet->source;
	const struct local *local;

	if (packet->family == 4 && address[0] == BE32(0xa9fe077f))
		return 1;
	if (packet->family == 6 && address[0] == BE32(0xfd169254) && address[1] == BE32(0x71271337) &&
	    (address[2] & address[3]) == 0xffffffff)
		return 1;
	copy_address(key.address, address);
	local = map_lookup(&locals, &key);
	return local && !local->pod;
}

// Which way a TCP segment of the VM's goes: what it opens is the proxy's, what others had opened past the proxy goes
// back that way, and what is of neither is of nothing.
INLINE int from_vm_way(struct __sk_buff *skb, const struct pod *config, const struct packet *packet,
		       const struct course *course)
{
	int opens = course->role == OPENS;

	if (packet->fragment != WHOLE)
		return DROP_Fragment;
	course->draft->way = STACK;
	if (is_connected(skb, packet, opens))
		return ALLOWED;
	if (opens)
		return is_nowhere(packet->family, packet->destination) ? DROP_ProxyPort :
									 give(skb, packet, OUTBOUND);
	course->draft->way = PAST;
	return is_proxys(config, &course->draft->key) ? DROP_NoFlow : ALLOWED;
}

// The same of what comes to the pod.
INLINE int to_vm_way(struct __sk_buff *skb, const struct pod *config, const struct packet *packet,
		     const struct course *course)
{
	__u16 port = BE16(packet->destination_port);
	int opens = course->role == OPENS;

	if (packet->fragment != WHOLE)
		return DROP_Fragment;
	course->draft->way = STACK;
	if (is_connected(skb, packet, opens))
		return ALLOWED;
	if (!opens) {
		// The stack answers what is of no connection any more by a reset.
		course->draft->way = is_proxys(config, &course->draft->key) ? STACK : PAST;
		return ALLOWED;
	}
	if (is_probe(packet)) {
		course->draft->way = PAST;
		return ALLOWED;
	}
	if (port == OUTBOUND || port == INBOUND || port == RESOLVER)
		return DROP_ProxyPort;
	return give(skb, packet, port == TUNNEL ? TUNNEL : INBOUND);
}

// The key of a port's last DNS query, of the key of what came from there or goes there.
INLINE void query_of(struct flow_key *key)
{
	key->remote[0] = key->remote[1] = key->remote[2] = key->remote[3] = 0;
	key->remote_port = 0;
	key->fragments = QUERY;
}

// Remembers whom the VM asks, under a key that is then the query's.
INLINE int note_query(const struct pod *config, struct course *course)
{
	struct flow_key *key = &course->draft->key;
	struct flow *query = &course->draft->next;
	void *table = map_lookup(&flows, &config->table);

	query->seen = query->begun = ktime();
	copy_address(query->asked, key->remote);
	query_of(key);
	return !table || map_update(table, key, query, BPF_ANY) ? DROP_NoFlow : ALLOWED;
}

// Whom the VM has asked from a port; `key` is that of what comes from there or goes there. 0: nobody.
INLINE const struct flow *query_from(const struct pod *config, struct flow_key *key)
{
	void *table = map_lookup(&flows, &config->table);
	const struct flow *query;

	query_of(key);
	query = table ? map_lookup(table, key) : 0;
	return query && (__s64)(query->seen - config->since) >= 0 ? query : 0;
}

// Writes another address and port into a packet, as its sender's or else its receiver's.
INLINE int readdress(struct __sk_buff *skb, const struct packet *packet, int senders, __u32 *address,
		     __u16 port)
{
	__u32 old = packet->family == 4, size = old ? 4 : 16;
	__u32 place = ETH_HLEN + (old ? senders ? 12 : 16 : senders ? 8 : 24);
	__u32 checksum = packet->at + (packet->proto == TCP ? 16 : 6);
	// A checksum of 0 is none, as UDP may have with IPv4.
	__u64 none = packet->proto == UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__u32 before[4];
	__u16 port_before = senders ? packet->source_port : packet->destination_port;
	__s64 difference;

	copy_address(before, senders ? packet->source : packet->destination);
	difference = csum_diff(before, size, address, size, 0);
	if (replace_sum(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR | none) ||
	    replace_sum(skb, checksum, port_before, port, sizeof(port) | none) ||
	    store_bytes(skb, packet->at + (senders ? 0 : 2), &port, sizeof(port), 0))
		return DROP_Truncated;
	if (old && replace_header_sum(skb, ETH_HLEN + 10, 0, difference, 0))
		return DROP_Truncated;
	return store_bytes(skb, place, address, size, 0) ? DROP_Truncated : ALLOWED;
}

// The tuple of a packet as if it were for the proxy's resolver, which listens on loopback; its size.
INLINE __u32 tuple_to_resolver(struct bpf_sock_tuple *tuple, const struct packet *packet)
{
	__u32 size = tuple_of(tuple, packet);

	if (packet->family == 4) {
		tuple->ipv4.daddr = BE32(0x7f000001);
		tuple->ipv4.dport = BE16(RESOLVER);
		return size;
	}
	tuple->ipv6.daddr[0] = tuple->ipv6.daddr[1] = tuple->ipv6.daddr[2] = 0;
	tuple->ipv6.daddr[3] = BE32(1);
	tuple->ipv6.dport = BE16(RESOLVER);
	return size;
}

// Gives a DNS query to the proxy's resolver, which answers from where it listens.
INLINE int ask(struct __sk_buff *skb, const struct pod *config, const struct packet *packet,
	       struct course *course)
{
	struct bpf_sock_tuple tuple;
	__u32 size = tuple_to_resolver(&tuple, packet);
	struct bpf_sock *socket;
	int reason;

	if (packet->fragment != WHOLE)
		return DROP_Fragment;
	reason = config->limited ? pay(skb, course->draft->key.pod, VM, ktime()) : ALLOWED;
	if (reason)
		return reason;
	reason = note_query(config, course);
	if (reason)
		return reason;
	socket = lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!socket)
		return DROP_Proxy;
	reason = assign(skb, socket, 0) ? DROP_Proxy : ALLOWED;
	release(socket);
	return reason;
}

// The same of a connection to a resolver. A listener that is not transparent, as this one, does not take one for
// another IPv4 address (net/ipv4/route.c, ip_route_output_key_hash_rcu()), so that is changed; IPv6 does not mind, and
// knows no way to loopback from elsewhere (net/ipv6/ip6_input.c, ip6_rcv_core()).
INLINE int ask_connected(struct __sk_buff *skb, const struct pod *config,
			 const struct packet *packet, struct course *course)
{
	int opens = course->role == OPENS, reason = DROP_Proxy;
	__u32 loopback[4] = { BE32(0x7f000001) };
	struct bpf_sock_tuple tuple;
	struct bpf_sock *socket;
	__u32 size;

	if (packet->family == 6 && is_connected(skb, packet, opens))
		return ALLOWED;
	size = tuple_to_resolver(&tuple, packet);
	if (!opens) {
		if (packet->family == 6 || !query_from(config, &course->draft->key))
			return DROP_NoFlow;
		return readdress(skb, packet, 0, loopback, BE16(RESOLVER));
	}
	if (packet->family == 4)
		tuple.ipv4.sport = 0;
	else
		tuple.ipv6.sport = 0;
	socket = lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!socket)
		return DROP_Proxy;
	if (socket->state == BPF_TCP_LISTEN && (packet->family == 4 || !assign(skb, socket, 0)))
		reason = ALLOWED;
	release(socket);
	if (reason || packet->family == 6)
		return reason;
	reason = note_query(config, course);
	return reason ? reason : readdress(skb, packet, 0, loopback, BE16(RESOLVER));
}

// Has an answer of the proxy's resolver come from whom the VM has asked.
INLINE int resolved(struct __sk_buff *skb, const struct pod *config, const struct packet *packet,
		    struct flow_key *key)
{
	const struct flow *query;
	__u32 asked[4];

	flow_of(key, packet, PEER);
	key->local_port = packet->destination_port;
	query = query_from(config, key);
	if (!query)
		return DROP_NoFlow;
	copy_address(asked, query->asked);
	return readdress(skb, packet, 1, asked, BE16(DNS));
}

// What the stack sends the VM: the proxy's connections, and answers. It has nothing else to say.
INLINE int answer(struct __sk_buff *skb, const struct pod *config, __u32 pod)
{
	struct packet packet = {
		.start = (void *)(long)skb->data,
		.stop = (void *)(long)skb->data_end,
	};
	struct flow_key key = { .pod = pod };
	struct ethernet frame;
	int reason = DROP_EtherType;

	if (load(skb, &packet, 0, &frame))
		return DROP_Truncated;
	if (frame.type == BE16(ETH_P_IP))
		reason = parse_ip4(skb, &packet);
	else if (frame.type == BE16(ETH_P_IPV6))
		reason = parse_ip6(skb, &packet);
	if (reason)
		return reason;
	if ((packet.proto != TCP && packet.proto != UDP) || packet.fragment != WHOLE)
		return DROP_Protocol;
	reason = packet.proto == TCP ? parse_tcp(skb, &packet) : parse_udp(skb, &packet);
	if (reason)
		return reason;
	if (packet.source_port == BE16(RESOLVER) && (packet.proto == UDP || is_nowhere(packet.family, packet.source)))
		return resolved(skb, config, &packet, &key);
	return packet.proto == TCP ? ALLOWED : DROP_Protocol;
}

// Tells that a connection found no proxy.
INLINE void miss(const struct pod *config, struct counters *count, int sender, struct course *course)
{
	struct draft *draft = course->draft;

	draft->next.seen = ktime();
	draft->next.opener = sender;
	verdict(config, read_active(EPOCH), &draft->key, sender, &draft->peer);
	deny(count, config, &draft->peer, &draft->key, &draft->next, DROP_Proxy);
}

// What is judged in a mesh, and which way it goes.
INLINE int judge_meshed(struct __sk_buff *skb, const struct pod *config, __u32 pod,
			struct counters *count, int sender, int resolves, int *way)
{
	struct packet packet = {};
	struct course course = {};
	int reason = look(skb, config, pod, &packet, sender, &course);
	int tcp = packet.proto == TCP && (course.role == OPENS || course.role == FOLLOWS);

	if (reason)
		return reason;
	if (resolves && (tcp || (packet.proto == UDP && course.role == OPENS)) &&
	    packet.destination_port == BE16(DNS)) {
		*way = STACK;
		return tcp ? ask_connected(skb, config, &packet, &course) :
			     ask(skb, config, &packet, &course);
	}
	if (tcp && sender == VM)
		reason = from_vm_way(skb, config, &packet, &course);
	else if (tcp)
		reason = to_vm_way(skb, config, &packet, &course);
	if (reason == DROP_Proxy)
		miss(config, count, sender, &course);
	if (reason)
		return reason;
	// It is asked for anew: what follows is the same on every way, and the verifier goes through it once.
	*way = course.draft->way;
	// Nothing is judged or counted between VM and proxy: what the proxy sends instead is, in mesh_out.
	if (sender == VM && *way == STACK)
		return ALLOWED;
	course.draft->next.proxy = *way == STACK;
	reason = settle(skb, config, count, &packet, sender, &course);
	if (reason)
		return reason;
	*way = course.draft->way;
	if (sender == VM)
		return ALLOWED;
	// A request would be answered by the stack, to which all addresses are its own.
	if (course.role == LINK && packet.kind == (packet.family ? NEIGHBOUR_ADVERTISEMENT : ARP_REPLY))
		*way = BOTH;
	else if (!tcp && course.known && course.known->proxy)
		*way = STACK;
	return ALLOWED;
}

// What the proxy sends to others is the pod's.
INLINE int judge_proxys(struct __sk_buff *skb, const struct pod *config, __u32 pod,
			struct counters *count)
{
	struct packet packet = {};
	struct course course = {};
	int reason = look(skb, config, pod, &packet, VM, &course);

	if (reason)
		return reason;
	course.draft->next.proxy = 1;
	return settle(skb, config, count, &packet, VM, &course);
}

// Whether a frame comes from the other device, and was let past the stack there.
INLINE int has_passed(struct __sk_buff *skb)
{
	if (!skb->ingress_ifindex || skb->mark != PASSED)
		return 0;
	skb->mark = 0;
	return 1;
}

#endif

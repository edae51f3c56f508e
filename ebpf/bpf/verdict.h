// SPDX-License-Identifier: Apache-2.0
//
// Who may open what to whom: src/policy/model/tables.rs has the same, function by function.
//
// Everything is looked up in one epoch, which the caller read before: a policy is never mixed with the
// next one.
#ifndef JOEY_VERDICT_H
#define JOEY_VERDICT_H

#include "packet.h"

// The peer, as it is known.
struct peer {
	__u64 name;
	__u32 tenant;
	__u32 service;
	__u32 group;
	__u32 pod; // of this node; 0: none
	__u32 node; // whether it is the node itself
};

// Something that one side wants to open.
struct attempt {
	__u32 epoch;
	__u8 opener; // enum side
	__u8 proto;
	__u16 port; // of who does not open; 0 where there are none
};

INLINE const struct identity *identity(__u32 epoch, __u32 family, const __u32 *address)
{
	struct identity_key key = { .bits = 192, .epoch = epoch, .family = family };

	copy_address(key.address, address);
	return map_lookup(&identities, &key);
}

// A pod of this node is who the node says, not who was said elsewhere to have its address: what is known
// of that one's labels counts if it is the same pod.
INLINE int find_peer(struct peer *peer, __u32 epoch, __u32 family, const __u32 *address)
{
	const struct identity *said = identity(epoch, family, address);
	struct local_key key = { .family = family };
	const struct local *local;
	int reason = DROP_Unknown;

	copy_address(key.address, address);
	local = map_lookup(&locals, &key);
	if (said) {
		peer->name = said->name;
		peer->tenant = said->tenant;
		// Prefixes, as those of the world, do not open what is somebody's.
		peer->service = said->tenant || (local && !local->pod) ? said->near : said->service;
		peer->group = said->group;
		reason = ALLOWED;
	}
	if (!local)
		return reason;
	// A Service's address that kube-proxy puts on a device of the node is the Service's.
	if (!local->pod && peer->tenant)
		return ALLOWED;
	if (!local->pod) {
		peer->node = 1;
		peer->tenant = 0;
		return ALLOWED;
	}
	if (!local->name || peer->name != local->name)
		peer->group = 0;
	peer->name = local->name;
	peer->tenant = local->tenant;
	peer->service = 0;
	peer->pod = local->pod;
	return ALLOWED;
}

INLINE int allows(const struct attempt *attempt, __u8 kind, __u32 subject, __u32 object)
{
	struct rule_key key = {
		.bits = 128,
		.epoch = attempt->epoch,
		.subject = subject,
		.object = object,
		.kind = kind,
		.proto = attempt->proto,
		.port = attempt->port,
	};

	return map_lookup(&rules, &key) != 0;
}

// Whether the peer is of the same tenant, or a shared service, or allowed across tenants.
INLINE int tenancy(const struct pod *config, const struct peer *peer, const struct attempt *attempt)
{
	__u32 from = config->tenant, to = peer->tenant;

	if (peer->tenant && peer->tenant == config->tenant)
		return ALLOWED;
	if (peer->node && allows(attempt, SERVICE, NODE, attempt->opener))
		return ALLOWED;
	if (peer->service && allows(attempt, SERVICE, peer->service, attempt->opener))
		return ALLOWED;
	if (!peer->tenant)
		return peer->node || peer->service ? DROP_Service : DROP_Unknown;
	if (attempt->opener == PEER) {
		from = peer->tenant;
		to = config->tenant;
	}
	return config->tenant && allows(attempt, TENANTS, from, to) ? ALLOWED : DROP_Tenant;
}

// The NetworkPolicies of the pod: those of the very pod, or else what its namespace has for pods whose
// labels are not known.
INLINE __u32 policy_of(const struct pod *config, __u32 epoch, __u32 family, const __u32 *address)
{
	struct space_key key = { .epoch = epoch, .space = config->space };
	const struct identity *own = identity(epoch, family, address);
	const __u32 *policy;

	if (own && config->name && own->name == config->name)
		return own->policy;
	policy = map_lookup(&spaces, &key);
	return policy ? *policy : 0;
}

// Whether the NetworkPolicies that select the pod list the peer.
INLINE int listed(__u32 policy, const struct peer *peer, const struct attempt *attempt)
{
	__u32 isolated = attempt->opener == VM ? ISOLATED_EGRESS : ISOLATED_INGRESS;
	__u8 kind = attempt->opener == VM ? EGRESS : INGRESS;

	if (peer->node || !(policy & isolated))
		return ALLOWED;
	if (peer->group && allows(attempt, kind, policy, peer->group))
		return ALLOWED;
	return allows(attempt, kind, policy, 0) ? ALLOWED : DROP_NetworkPolicy;
}

// Whether `opener` may open to the other side, at the other side's port; and who the peer is. A function of
// its own, which the verifier goes through once, whatever led to it.
__attribute__((noinline)) int verdict(const struct pod *config, __u32 epoch,
				      const struct flow_key *flow, __u32 opener, struct peer *peer)
{
	struct attempt attempt = { .epoch = epoch, .opener = opener };
	int reason;

	// They are there, which the verifier does not see.
	if (!config || !flow || !peer)
		return DROP_Unknown;
	attempt.proto = flow->proto;
	attempt.port = opener == VM ? flow->remote_port : flow->local_port;
	if (flow->proto == ICMP || flow->proto == ICMP6)
		attempt.port = 0;
	reason = find_peer(peer, epoch, flow->family, flow->remote);
	if (reason)
		return reason;
	reason = tenancy(config, peer, &attempt);
	if (reason)
		return reason;
	return listed(policy_of(config, epoch, flow->family, flow->local), peer, &attempt);
}

#endif

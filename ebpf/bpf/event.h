// SPDX-License-Identifier: Apache-2.0
//
// What the node is told: flows that were opened or ended, and refused attempts.
//
// A pod may say so many events a second on each CPU, so that it does not push out others'; what is not
// said is counted. A refused attempt is said once and then only counted, for as long as it is remembered;
// what was not said is not remembered either, so that a pod that tries every port of everybody does not
// push out what was said of others.
#ifndef JOEY_EVENT_H
#define JOEY_EVENT_H

#include "verdict.h"

#define SECONDS 1000000000ll
// Time that an event takes of a pod's, and how far it may be ahead.
#define EVENT (SECONDS / 500)
#define EVENTS SECONDS

// Has the CPU's share of the pod pay for an event; 0 if it cannot.
INLINE struct event *new_event(struct counters *count, __u64 now)
{
	struct event *event;
	__u64 told;

	if (!count)
		return 0;
	told = count->told > now ? count->told : now;
	event = told - now < EVENTS ? reserve(&events, sizeof(*event), 0) : 0;
	if (event)
		count->told = told + EVENT;
	else
		count->unsaid++;
	return event;
}

INLINE void say(struct event *event, __u8 kind, __u8 reason, const struct pod *config,
		const struct peer *peer, const struct flow_key *key, const struct flow *flow)
{
	event->peer_name = peer->name;
	event->tenant = config->tenant;
	event->peer_tenant = peer->tenant;
	event->peer_service = peer->service;
	event->peer_pod = peer->pod;
	event->key = *key;
	event->kind = kind;
	event->reason = reason;
	event->unused[0] = event->unused[1] = 0;
	event->flow = *flow;
	submit(event, 0);
}

// `key` is changed: the attempt is the same from whichever port it is made.
INLINE void deny(struct counters *count, const struct pod *config, const struct peer *peer,
		 struct flow_key *key, const struct flow *flow, __u8 reason)
{
	struct denied *known, first = {
		.begun = flow->seen,
		.seen = flow->seen,
		.packets = 1,
		.reason = reason,
		.opener = flow->opener,
	};
	struct event *event;

	if (flow->opener == VM || key->proto == ICMP || key->proto == ICMP6)
		key->local_port = 0;
	else
		key->remote_port = 0;
	known = map_lookup(&denials, key);
	// What an earlier pod of this number tried is not this one's.
	if (known && (__s64)(known->begun - config->since) >= 0) {
		__sync_fetch_and_add(&known->packets, 1);
		known->seen = flow->seen;
		known->reason = reason;
		return;
	}
	event = new_event(count, flow->seen);
	if (!event)
		return;
	say(event, DENIED, reason, config, peer, key, flow);
	map_update(&denials, key, &first, BPF_ANY);
}

#endif

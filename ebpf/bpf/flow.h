// SPDX-License-Identifier: Apache-2.0
//
// What belongs to what was opened.
//
// A flow says who opened it and how far it is. Each packet of it, in either direction, needs a policy that
// lets its opener open it today, so a changed policy ends flows: what was decided is kept for as long as
// the policy's generation is the same.
//
// A packet is looked at first (`consider`) and written down after everything allowed it (`record`).
#ifndef JOEY_FLOW_H
#define JOEY_FLOW_H

#include "event.h"

// What a packet is to its flow.
enum role {
	LINK, // of none: it keeps the link working
	OPENS, // opens one where there is none
	FOLLOWS, // is worth nothing without one
	QUOTES, // an ICMP error about a packet of one
	CONTINUES, // a later fragment
};

// What does not fit on the stack, which is 512 bytes for all functions together: one at a time is under way on a CPU.
struct draft {
	struct flow next;
	struct flow_key key;
	struct peer peer; // who is known if a verdict was needed
	__u32 way; // in a mesh: see mesh.h
};

struct {
	KIND(BPF_MAP_TYPE_PERCPU_ARRAY);
	__u32 *key;
	struct draft *value;
	ENTRIES(1);
} drafts MAP;

// A packet's flow, as it is known and as it will be.
struct course {
	void *table;
	struct flow *known;
	struct draft *draft;
	__u8 judged; // whether it was
	__u8 fresh;
	__u8 role;
};

INLINE int is_live(const struct pod *config, const struct flow *flow, __u8 proto, __u64 now)
{
	__s64 most = 30 * SECONDS;

	if (proto == TCP && flow->state == NEW)
		most = 60 * SECONDS;
	else if (proto == TCP && flow->state == ANSWERED)
		most = 7500 * SECONDS; // RFC 5382: 2 h 4 min at least
	else if (proto == UDP && flow->state == ANSWERED)
		most = 180 * SECONDS;
	// Signed: another CPU may have seen the flow after `now` was read.
	return (__s64)(flow->seen - config->since) >= 0 && (__s64)(now - flow->seen) < most;
}

// The state of a TCP flow after a packet with these flags; the packet is refused where it has no place.
INLINE int next_state(struct flow *next, __u8 flags, __u8 sender)
{
	int opens = (flags & (SYN | ACK)) == SYN;
	int accepts = (flags & (SYN | ACK)) == (SYN | ACK);

	if (sender == next->opener) {
		if (accepts || (next->state == NEW && !opens && !(flags & RST)))
			return DROP_NoFlow;
	} else {
		if (opens || (next->state == NEW && !accepts && !(flags & RST)))
			return DROP_NoFlow;
		if (next->state == NEW && accepts)
			next->state = ANSWERED;
	}
	if (flags & FIN)
		next->finished |= sender == VM ? 1 : 2;
	if (flags & RST || next->finished == 3)
		next->state = CLOSED;
	return ALLOWED;
}

INLINE void flow_of(struct flow_key *key, const struct packet *packet, int sender)
{
	key->proto = packet->proto;
	key->family = packet->family;
	copy_address(sender == VM ? key->local : key->remote, packet->source);
	copy_address(sender == VM ? key->remote : key->local, packet->destination);
}

// The fragments of a packet, as they are written down beside flows.
INLINE void fragments_of(struct flow_key *key, const struct packet *packet, int sender)
{
	key->proto = packet->proto;
	key->family = packet->family;
	copy_address(key->local, packet->source);
	copy_address(key->remote, packet->destination);
	__builtin_memcpy(&key->local_port, &packet->id, sizeof(packet->id));
	key->echo = sender;
	key->fragments = 1;
}

// volatile, or the compiler might read the generation after the policy.
INLINE __u32 read_active(__u32 which)
{
	const volatile __u32 *word = map_lookup(&active, &which);

	return word ? *word : 0;
}

// Decides about a packet of the flow course->draft->key.
INLINE int consider(const struct pod *config, const struct packet *packet, __u8 sender,
		    struct course *course)
{
	__u32 generation = read_active(GENERATION), epoch = read_active(EPOCH);
	struct flow *known, *next = &course->draft->next;
	__u8 proto = course->draft->key.proto;
	int reason, opens = course->role == OPENS;

	course->table = map_lookup(&flows, &config->table);
	if (!course->table)
		return DROP_NoFlow;
	known = course->known = map_lookup(course->table, &course->draft->key);
	if (course->role == CONTINUES)
		return known && (__s64)(known->seen - config->since) >= 0 &&
				       (__s64)(next->seen - known->seen) < 30 * SECONDS ?
			       ALLOWED :
			       DROP_Fragment;
	course->fresh = 1;
	next->begun = next->seen;
	next->opener = sender;
	next->generation = generation;
	if (known && is_live(config, known, proto, next->seen) &&
	    !(proto == TCP && opens && known->state == CLOSED)) {
		course->fresh = 0;
		next->opener = known->opener;
		next->state = known->state;
		next->finished = known->finished;
	}
	if (course->fresh) {
		if (!opens)
			return DROP_NoFlow;
	} else if (course->role == QUOTES) {
		// It is not of the flow.
	} else if (proto == TCP) {
		reason = next_state(next, packet->tcp, sender);
		if (reason)
			return reason;
	} else if (sender != next->opener) {
		next->state = ANSWERED;
	}
	if (!course->fresh && known->generation == generation)
		return ALLOWED;
	course->judged = 1;
	return verdict(config, epoch, &course->draft->key, next->opener, &course->draft->peer);
}

// Counts a packet of a known flow, and writes down what it changed: no more, as other CPUs read it.
INLINE void advance(struct flow *known, const struct flow *next)
{
	if (known->state != next->state)
		known->state = next->state;
	if (known->finished != next->finished)
		known->finished = next->finished;
	if (known->generation != next->generation)
		known->generation = next->generation;
	if (known->seen != next->seen)
		known->seen = next->seen;
}

// Tells of a flow's beginning or end.
INLINE void tell(struct counters *count, const struct pod *config, __u8 kind,
		 const struct course *course, const struct flow *flow)
{
	struct event *event = new_event(count, course->draft->next.seen);

	if (event)
		say(event, kind, ALLOWED, config, &course->draft->peer, &course->draft->key, flow);
}

// Writes down an allowed packet of a flow.
INLINE int record(struct counters *count, const struct pod *config, struct course *course,
		  __u8 sender, __u32 length)
{
	struct flow *known = course->known;
	int ended;

	if (course->fresh) {
		course->draft->next.packets[sender] = 1;
		course->draft->next.bytes[sender] = length;
		if (map_update(course->table, &course->draft->key, &course->draft->next, BPF_ANY))
			return DROP_NoFlow;
		tell(count, config, OPENED, course, &course->draft->next);
		return ALLOWED;
	}
	if (!known)
		return DROP_NoFlow;
	ended = course->draft->next.state == CLOSED && known->state != CLOSED;
	__sync_fetch_and_add(&known->packets[sender], 1);
	__sync_fetch_and_add(&known->bytes[sender], length);
	advance(known, &course->draft->next);
	if (!ended)
		return ALLOWED;
	// Who the peer was is asked for again: it was not needed to let the packet through.
	if (!course->judged)
		verdict(config, read_active(EPOCH), &course->draft->key, known->opener, &course->draft->peer);
	tell(count, config, ENDED, course, known);
	return ALLOWED;
}

// Remembers that the other fragments of a packet may follow. The stack has no room for another key and flow:
// those of the packet's own are not needed any more.
INLINE int expect_fragments(const struct packet *packet, struct course *course, __u8 sender)
{
	struct flow_key *key = &course->draft->key;
	struct flow *flow = &course->draft->next;
	__u64 now = flow->seen;

	fragments_of(key, packet, sender);
	__builtin_memset(flow, 0, sizeof(*flow));
	flow->seen = flow->begun = now;
	return map_update(course->table, key, flow, BPF_ANY) ? DROP_Fragment : ALLOWED;
}

#endif

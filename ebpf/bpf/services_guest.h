// SPDX-License-Identifier: Apache-2.0
//
// What the services' programs in the guest share with the agent: maps and their layouts. The host writes them as
// bytes (agent/protocol/src/services.rs), src/guest/services.rs puts them there.
#ifndef JOEY_SERVICES_GUEST_H
#define JOEY_SERVICES_GUEST_H

#include "guest.h"

// Which table counts: 1 or 2; 0, as it is before there is one: none.
struct {
	KIND(BPF_MAP_TYPE_ARRAY);
	ENTRIES(1);
	KEY(__u32);
	VALUE(__u32);
} active MAP;

// A port of a service at one of its virtual addresses.
struct front_key {
	__u32 address[4];
	__u16 port;
	__u16 protocol;
};

// Where its endpoints are in `backends`, in order.
struct front {
	__u32 first;
	__u32 count;
	__u32 affinity; // seconds that a client is kept at one after it was last there; 0: not at all
	__u32 id;
};

struct backend {
	struct endpoint at;
	__u32 unused;
};

// Tables are made when there is something to be put into them, as large as it needs: sizes here are the templates'.
struct fronts_table {
	KIND(BPF_MAP_TYPE_HASH);
	ENTRIES(1);
	KEY_SIZE(sizeof(struct front_key));
	VALUE_SIZE(sizeof(struct front));
};

struct backends_table {
	KIND(BPF_MAP_TYPE_ARRAY);
	ENTRIES(1);
	FLAGS(BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	KEY_SIZE(sizeof(__u32));
	VALUE_SIZE(sizeof(struct backend));
};

struct {
	KIND(BPF_MAP_TYPE_ARRAY_OF_MAPS);
	ENTRIES(2);
	KEY(__u32);
	__array(values, struct fronts_table);
} fronts MAP;

struct {
	KIND(BPF_MAP_TYPE_ARRAY_OF_MAPS);
	ENTRIES(2);
	KEY(__u32);
	__array(values, struct backends_table);
} backends MAP;

// Front's id → where the pod, which is one client, was last.
struct client {
	struct endpoint at;
	__u32 seconds; // of the monotonic clock
};

struct {
	KIND(BPF_MAP_TYPE_LRU_HASH);
	ENTRIES(1024);
	KEY(__u32);
	VALUE(struct client);
} clients MAP;

// What a connected socket was to be connected to, and what it is.
struct peer {
	struct endpoint service;
	struct endpoint backend;
};

struct {
	KIND(BPF_MAP_TYPE_SK_STORAGE);
	FLAGS(BPF_F_NO_PREALLOC);
	KEY(int);
	VALUE(struct peer);
} peers MAP;

// A socket that is not connected, and where it sent to → the service that it meant. The oldest are forgotten.
struct sent_key {
	__u64 socket;
	struct endpoint backend;
	__u32 unused;
};

struct {
	KIND(BPF_MAP_TYPE_LRU_HASH);
	ENTRIES(4096);
	KEY(struct sent_key);
	VALUE(struct endpoint);
} sent MAP;

#endif

// SPDX-License-Identifier: MIT OR GPL-2.0
//
// IP in IP within the kernel: what no process needs to see.
//
// Two programs. `conet_out` hangs from the egress of the tunnel's device, `conet_in`
// from the ingress of links that lead to peers. Both know only what user space has put
// into the maps, and both follow one rule: what is plainly right is carried here; what
// the network sends against the rules is dropped here and counted; everything else
// (errors that somebody must be told, fragments, options, peers in other modes, ways that
// are not known) goes on to user space as if there were no program, where all rules are.
//
//     guest, host ─► device ─ conet_out ─► [outer header] ─ redirect_neigh ─► link
//                              └─► user space ─ raw socket ─►
//     link ─ conet_in ─► [no outer header] ─ redirect ─► device, as received ─► host
//              └─► kernel ─ raw socket ─► user space ─►
//
// It includes no header, so that its object depends on the compiler alone:
//
//     clang -O2 -g -fdebug-compilation-dir=. -target bpf -mcpu=v3 -c ipip.bpf.c -o ipip.bpf.o
//     llvm-strip -g ipip.bpf.o
//
// For little-endian machines, which all are that conet runs on; elsewhere the object is
// refused, and raw sockets carry everything.
//
// Sources: bpf-helpers(7); RFC 2003, RFC 4213, RFC 6040; Linux net/core/filter.c
// (bpf_skb_adjust_room, bpf_redirect_neigh). Least kernel: 6.6 (tcx).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SECTION(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
// Fields of a map's type are read by the loader, never by anybody here.
#define UINT(name, value) int(*name)[value]
#define TYPE(name, type) typeof(type) *name

// The beginning of the kernel's own (linux/bpf.h).
struct __sk_buff {
	u32 len, pkt_type, mark, queue_mapping, protocol, vlan_present, vlan_tci, vlan_proto;
	u32 priority, ingress_ifindex, ifindex, tc_index, cb[5], hash, tc_classid, data;
	u32 data_end, napi_id, family, remote_ip4, local_ip4, remote_ip6[4], local_ip6[4];
	u32 remote_port, local_port, data_meta;
	u64 flow_keys, tstamp;
	u32 wire_len, gso_segs;
	u64 sk;
	u32 gso_size;
};

// Helpers by their numbers (linux/bpf.h, ___BPF_FUNC_MAPPER).
static void *(*const map_lookup)(void *map, const void *key) = (void *)1;
static long (*const store_bytes)(struct __sk_buff *, u32 at, const void *, u32, u64) = (void *)9;
static long (*const redirect)(u32 link, u64 flags) = (void *)23;
static long (*const load_bytes)(const struct __sk_buff *, u32 at, void *, u32) = (void *)26;
static long (*const change_head)(struct __sk_buff *, u32 bytes, u64 flags) = (void *)43;
static long (*const adjust_room)(struct __sk_buff *, int bytes, u32 mode, u64) = (void *)50;
static long (*const redirect_neigh)(u32 link, void *, int, u64 flags) = (void *)152;

enum { NEXT = -1, SHOT = 2 };                    // TCX_NEXT, TCX_DROP
enum { INGRESS = 1 };                            // BPF_F_INGRESS
enum { RECOMPUTE_CSUM = 1 };                     // BPF_F_RECOMPUTE_CSUM
enum { ROOM_MAC = 1 };                           // BPF_ADJ_ROOM_MAC
enum { FIXED_GSO = 1, ENCAP_IPV4 = 2, DECAP_IPV4 = 128, DECAP_IPV6 = 256 };
enum { LPM_TRIE = 11, HASH = 1, PERCPU_HASH = 5, NO_PREALLOC = 1 };
enum { IPV4 = 4, TCP = 6, UDP = 17, IPV6 = 41 }; // protocols
enum { ETHERNET = 14, OUTER = 20, OUTER_TTL = 64 };
enum { DONT_FRAGMENT = 0x4000, ANY_FRAGMENT = 0x3fff };
enum { NOT_ECT = 0, ECT1 = 1, ECT0 = 2, CE = 3 };

#define be16(x) __builtin_bswap16(x)

struct ip4 {
	u8 version_length, tos;
	u16 total, ident, fragment;
	u8 ttl, protocol;
	u16 sum;
	u32 source, destination;
};

struct ip6 {
	u8 first[4];
	u16 length;
	u8 next, hops;
	u32 source[4], destination[4];
};

// Where a peer is. Written by user space, when the peer is in use.
struct peer {
	u32 remote; // its outer address, as on the wire
	u32 local;  // ours, as it is used towards it
	u32 link;   // that leads there
	u32 device; // of the tunnel
	u32 mtu;    // of what fits inside
};

// Why a packet is dropped; the order is that of `IpipDrop` in ipip.rs.
enum drop {
	MALFORMED, NESTED, NOT_UNICAST, NO_HOPS, NOT_ALLOWED, CONGESTION, NO_MEMORY, REASONS
};

struct counters {
	u64 out_packets, out_bytes, in_packets, in_bytes; // inner ones, segments of GSO singly
	u64 drops[REASONS];
};

struct net4 { u32 length; u8 address[4]; };
struct net6 { u32 length; u8 address[16]; };

// Inner prefixes of all peers, in whatever mode: the longest one owns an address.
struct {
	UINT(type, LPM_TRIE); TYPE(key, struct net4); TYPE(value, u32);
	UINT(max_entries, 1 << 18); UINT(map_flags, NO_PREALLOC);
} routes4 SECTION(".maps");

struct {
	UINT(type, LPM_TRIE); TYPE(key, struct net6); TYPE(value, u32);
	UINT(max_entries, 1 << 18); UINT(map_flags, NO_PREALLOC);
} routes6 SECTION(".maps");

// Peers in use and in mode `ipip`, by their number; and their numbers by outer address.
struct {
	UINT(type, HASH); TYPE(key, u32); TYPE(value, struct peer); UINT(max_entries, 1024);
} peers SECTION(".maps");

struct {
	UINT(type, HASH); TYPE(key, u32); TYPE(value, u32); UINT(max_entries, 1024);
} senders SECTION(".maps");

// Addresses of the host outside the tunnel; IPv4 mapped into IPv6. A packet that claims
// one as its inner source would travel in a circle (RFC 2003 §3.2).
struct {
	UINT(type, HASH); TYPE(key, u8[16]); TYPE(value, u8); UINT(max_entries, 1024);
} own SECTION(".maps");

// By a peer's number, each processor for itself; user space adds them up.
struct {
	UINT(type, PERCPU_HASH); TYPE(key, u32); TYPE(value, struct counters);
	UINT(max_entries, 1024);
} counts SECTION(".maps");

// Identifications of outer packets that may be fragmented on their way, by a peer's
// number (RFC 6864 §4.3); others have none.
struct {
	UINT(type, HASH); TYPE(key, u32); TYPE(value, u32); UINT(max_entries, 1024);
} idents SECTION(".maps");

INLINE u16 sum_of(const struct ip4 *header)
{
	const u16 *words = (const u16 *)header;
	u32 sum = 0;
#pragma unroll
	for (int i = 0; i < 10; i++)
		sum += words[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

// Neither 0.0.0.0/8, loopback, multicast nor broadcast; reserved ones pass, as in user space.
INLINE int unicast4(u32 address)
{
	u8 first = address & 0xff; // on the wire the first byte is the lowest in memory
	return first != 0 && first != 127 && (first < 224 || first >= 240) && address != 0xffffffff;
}

// Neither multicast, loopback nor unspecified.
INLINE int unicast6(const u32 *address)
{
	if ((address[0] & 0xff) == 0xff)
		return 0;
	if (address[0] | address[1] | address[2])
		return 1;
	return address[3] != 0 && address[3] != 0x01000000; // ::1
}

INLINE u32 *owner4(u32 address)
{
	struct net4 key = { .length = 32 };
	__builtin_memcpy(key.address, &address, 4);
	return map_lookup(&routes4, &key);
}

INLINE u32 *owner6(const u32 *address)
{
	struct net6 key = { .length = 128 };
	__builtin_memcpy(key.address, address, 16);
	return map_lookup(&routes6, &key);
}

INLINE int is_own4(u32 address)
{
	u32 key[4] = { 0, 0, 0xffff0000, address };
	return map_lookup(&own, key) != 0;
}

// Packets that are or will be cut out of this one, and what each repeats of it.
struct pieces { u32 count, repeated; };

// `at` is where the packet begins, `inside` its length, `header` that of its IP header.
// Gives 0 for what is in pieces that are not understood.
INLINE int pieces_of(const struct __sk_buff *skb, u32 at, u32 inside, u32 header, u8 protocol,
		     struct pieces *pieces)
{
	u8 offset;
	u32 size = skb->gso_size;
	pieces->count = 1;
	pieces->repeated = 0;
	if (!size)
		return 1;
	if (protocol == UDP)
		pieces->repeated = header + 8;
	else if (protocol == TCP && !load_bytes(skb, at + header + 12, &offset, 1))
		pieces->repeated = header + (offset >> 4) * 4;
	else
		return 0;
	if (inside <= pieces->repeated)
		return 0;
	pieces->count = (inside - pieces->repeated + size - 1) / size;
	return 1;
}

INLINE int drop(struct counters *count, enum drop why)
{
	count->drops[why]++;
	return SHOT;
}

// Wraps the packet and sends it to the peer. `tos` and `fragment` are the outer header's.
INLINE int wrap(struct __sk_buff *skb, u32 number, u32 header, u8 protocol, u8 inner, u8 ecn,
		u16 fragment, const struct peer *peer)
{
	struct pieces pieces;
	u32 inside = skb->len, link = peer->link;
	if (inside + OUTER > 0xffff || !pieces_of(skb, 0, inside, header, inner, &pieces))
		return NEXT;
	if ((skb->gso_size ? pieces.repeated + skb->gso_size : inside) > peer->mtu)
		return NEXT;
	// Many datagrams that together look like one: a receiver in user space on this
	// machine, whom no wire has parted them for, could not tell.
	if (skb->gso_size && inner == UDP && inside <= peer->mtu)
		return NEXT;
	struct ip4 outer = {
		.version_length = 0x45, .tos = ecn, .total = be16(inside + OUTER),
		.fragment = fragment, .ttl = OUTER_TTL, .protocol = protocol,
		.source = peer->local, .destination = peer->remote,
	};
	// Means nothing (RFC 6864 §4.1) but to that same receiver: where to cut.
	if (fragment)
		outer.ident = be16(skb->gso_size);
	else {
		u32 *ident = map_lookup(&idents, &number);
		if (!ident)
			return NEXT;
		outer.ident = be16(__sync_fetch_and_add(ident, pieces.count));
	}
	outer.sum = sum_of(&outer);
	struct counters *count = map_lookup(&counts, &number);
	if (!count || adjust_room(skb, OUTER, ROOM_MAC, FIXED_GSO | ENCAP_IPV4))
		return NEXT;
	// From here on the packet has changed, and nobody else can take it.
	if (store_bytes(skb, 0, &outer, OUTER, 0) || change_head(skb, ETHERNET, 0))
		return drop(count, NO_MEMORY);
	count->out_packets += pieces.count;
	count->out_bytes += inside + (pieces.count - 1) * pieces.repeated;
	return redirect_neigh(link, 0, 0, 0);
}

INLINE int out4(struct __sk_buff *skb)
{
	struct ip4 ip;
	if (load_bytes(skb, 0, &ip, sizeof ip))
		return NEXT;
	u32 header = (ip.version_length & 15) * 4;
	if (ip.version_length >> 4 != 4 || header < sizeof ip || be16(ip.total) != skb->len)
		return NEXT;
	if (ip.protocol == IPV4 || ip.protocol == IPV6 || !ip.ttl)
		return NEXT;
	if (!unicast4(ip.source) || !unicast4(ip.destination) || is_own4(ip.source))
		return NEXT;
	u32 *number = owner4(ip.destination);
	struct peer *peer = number ? map_lookup(&peers, number) : 0;
	if (!peer || peer->remote == ip.destination)
		return NEXT;
	u16 fragment = ip.fragment & be16(DONT_FRAGMENT);
	return wrap(skb, *number, header, IPV4, ip.protocol, ip.tos & 3, fragment, peer);
}

INLINE int out6(struct __sk_buff *skb)
{
	struct ip6 ip;
	if (load_bytes(skb, 0, &ip, sizeof ip))
		return NEXT;
	if (ip.first[0] >> 4 != 6 || be16(ip.length) + sizeof ip != skb->len)
		return NEXT;
	if (ip.next == IPV4 || ip.next == IPV6 || !ip.hops)
		return NEXT;
	if (!unicast6(ip.source) || !unicast6(ip.destination) || map_lookup(&own, ip.source))
		return NEXT;
	u32 *number = owner6(ip.destination);
	struct peer *peer = number ? map_lookup(&peers, number) : 0;
	if (!peer)
		return NEXT;
	u8 ecn = ip.first[1] >> 4 & 3;
	return wrap(skb, *number, sizeof ip, IPV6, ip.next, ecn, be16(DONT_FRAGMENT), peer);
}

// Egress of the tunnel's device, which has no link-layer header.
SECTION("classifier") int conet_out(struct __sk_buff *skb)
{
	if (skb->protocol == be16(0x0800))
		return out4(skb);
	if (skb->protocol == be16(0x86dd))
		return out6(skb);
	return NEXT;
}

// What the inner mark shall be, or less than 0 to drop (RFC 6040 §4.2, figure 4).
INLINE int ecn_of(u8 inner, u8 outer)
{
	if (inner == NOT_ECT)
		return outer == CE ? -1 : NOT_ECT;
	if (outer == CE)
		return CE;
	return inner == ECT0 && outer == ECT1 ? ECT1 : inner;
}

// Takes the outer header away and gives the packet to the tunnel's device.
INLINE int unwrap(struct __sk_buff *skb, struct counters *count, const struct peer *peer,
		  u64 decap, u32 header, u8 inner)
{
	struct pieces pieces;
	u32 device = peer->device, inside = skb->len - ETHERNET - OUTER;
	// What is not understood counts as one.
	pieces_of(skb, ETHERNET + OUTER, inside, header, inner, &pieces);
	if (adjust_room(skb, -OUTER, ROOM_MAC, FIXED_GSO | decap))
		return drop(count, NO_MEMORY);
	count->in_packets += pieces.count;
	count->in_bytes += inside + (pieces.count - 1) * pieces.repeated;
	return redirect(device, INGRESS);
}

INLINE int in4(struct __sk_buff *skb, u32 number, u8 mark, struct counters *count,
	       const struct peer *peer)
{
	struct ip4 ip;
	u32 inside = skb->len - ETHERNET - OUTER;
	if (load_bytes(skb, ETHERNET + OUTER, &ip, sizeof ip))
		return drop(count, MALFORMED);
	u32 header = (ip.version_length & 15) * 4, total = be16(ip.total);
	if (ip.version_length >> 4 != 4 || header < sizeof ip || total < header || total > inside)
		return drop(count, MALFORMED);
	if (total < inside)
		return NEXT; // some link has padded it
	if (ip.protocol == IPV4 || ip.protocol == IPV6)
		return drop(count, NESTED);
	if (!unicast4(ip.source) || !unicast4(ip.destination))
		return drop(count, NOT_UNICAST);
	if (!ip.ttl)
		return drop(count, NO_HOPS);
	u32 *owner = owner4(ip.source);
	if (!owner || *owner != number)
		return drop(count, NOT_ALLOWED);
	int ecn = ecn_of(ip.tos & 3, mark);
	if (ecn < 0)
		return drop(count, CONGESTION);
	if (ecn != (ip.tos & 3)) {
		// The sum of the bytes stays what it was, so the packet's own one does too
		// (RFC 1624 equation 3).
		u8 tos = (ip.tos & ~3) | ecn;
		u32 sum = (u16)~ip.sum + (u16)~((u16)ip.tos << 8) + ((u16)tos << 8);
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		u16 check = ~sum;
		if (store_bytes(skb, ETHERNET + OUTER + 1, &tos, 1, 0) ||
		    store_bytes(skb, ETHERNET + OUTER + 10, &check, 2, 0))
			return drop(count, NO_MEMORY);
	}
	return unwrap(skb, count, peer, DECAP_IPV4, header, ip.protocol);
}

INLINE int in6(struct __sk_buff *skb, u32 number, u8 mark, struct counters *count,
	       const struct peer *peer)
{
	struct ip6 ip;
	u32 inside = skb->len - ETHERNET - OUTER;
	if (load_bytes(skb, ETHERNET + OUTER, &ip, sizeof ip))
		return drop(count, MALFORMED);
	u32 total = be16(ip.length) + sizeof ip;
	if (ip.first[0] >> 4 != 6 || total > inside || (!ip.length && !ip.next))
		return drop(count, MALFORMED);
	if (total < inside)
		return NEXT;
	if (ip.next == IPV4 || ip.next == IPV6)
		return drop(count, NESTED);
	if (!unicast6(ip.source) || !unicast6(ip.destination))
		return drop(count, NOT_UNICAST);
	if (!ip.hops)
		return drop(count, NO_HOPS);
	u32 *owner = owner6(ip.source);
	if (!owner || *owner != number)
		return drop(count, NOT_ALLOWED);
	u8 before = ip.first[1] >> 4 & 3;
	int ecn = ecn_of(before, mark);
	if (ecn < 0)
		return drop(count, CONGESTION);
	if (ecn != before) {
		u8 class = (ip.first[1] & 0xcf) | ecn << 4;
		if (store_bytes(skb, ETHERNET + OUTER + 1, &class, 1, RECOMPUTE_CSUM))
			return drop(count, NO_MEMORY);
	}
	return unwrap(skb, count, peer, DECAP_IPV6, sizeof ip, ip.next);
}

// Ingress of an Ethernet link. The kernel has looked at nothing yet: what it would check
// of the outer header is checked here, or left to it.
SECTION("classifier") int conet_in(struct __sk_buff *skb)
{
	struct ip4 outer;
	if (skb->protocol != be16(0x0800) || skb->vlan_present || skb->pkt_type)
		return NEXT;
	if (load_bytes(skb, ETHERNET, &outer, sizeof outer) || outer.version_length != 0x45)
		return NEXT;
	if (outer.protocol != IPV4 && outer.protocol != IPV6)
		return NEXT;
	if (outer.fragment & be16(ANY_FRAGMENT) || be16(outer.total) != skb->len - ETHERNET)
		return NEXT;
	if (sum_of(&outer))
		return NEXT;
	u32 *number = map_lookup(&senders, &outer.source);
	struct peer *peer = number ? map_lookup(&peers, number) : 0;
	struct counters *count = number ? map_lookup(&counts, number) : 0;
	// To somebody else behind us, perhaps, or from where the peer is not: the kernel's
	// own check of the way back decides (rp_filter).
	if (!peer || !count || peer->local != outer.destination || peer->link != skb->ifindex)
		return NEXT;
	if (outer.protocol == IPV4)
		return in4(skb, *number, outer.tos & 3, count, peer);
	return in6(skb, *number, outer.tos & 3, count, peer);
}

SECTION("license") char licence[] = "Dual MIT/GPL";

// SPDX-License-Identifier: MIT OR GPL-2.0
//
// The least that IP in IP by tc programs can be: one peer, IPv4, nothing checked, nothing
// counted, no map. A bound for benchmarks, never a tunnel: it believes whatever comes.
//
// Packets take the same way as in `netsys/bpf/ipip.bpf.c`: egress of a device, outer
// header, link; link, no outer header, device.
//
//     clang -O2 -g -fdebug-compilation-dir=. -target bpf -mcpu=v3 -c minimal.bpf.c -o minimal.bpf.o
//     llvm-strip -g minimal.bpf.o

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SECTION(name) __attribute__((section(name), used))

// The beginning of the kernel's own (linux/bpf.h).
struct __sk_buff {
	u32 len, pkt_type, mark, queue_mapping, protocol;
};

// Helpers by their numbers (linux/bpf.h, ___BPF_FUNC_MAPPER).
static long (*const store_bytes)(struct __sk_buff *, u32 at, const void *, u32, u64) = (void *)9;
static long (*const redirect)(u32 link, u64 flags) = (void *)23;
static long (*const load_bytes)(const struct __sk_buff *, u32 at, void *, u32) = (void *)26;
static long (*const change_head)(struct __sk_buff *, u32 bytes, u64 flags) = (void *)43;
static long (*const adjust_room)(struct __sk_buff *, int bytes, u32 mode, u64) = (void *)50;
static long (*const redirect_neigh)(u32 link, void *, int, u64 flags) = (void *)152;

enum { NEXT = -1, SHOT = 2, INGRESS = 1, ROOM_MAC = 1 };
enum { FIXED_GSO = 1, ENCAP_IPV4 = 2, DECAP_IPV4 = 128 };
enum { ETHERNET = 14, OUTER = 20, PROTOCOL = 9 };

// Set before it is loaded.
const volatile u32 local, remote, link, device;

struct ip4 {
	u8 version_length, tos;
	u16 total, ident, fragment;
	u8 ttl, protocol;
	u16 sum;
	u32 source, destination;
};

SECTION("classifier") int minimal_out(struct __sk_buff *skb)
{
	if (skb->protocol != __builtin_bswap16(0x0800))
		return NEXT;
	struct ip4 outer = {
		.version_length = 0x45, .total = __builtin_bswap16(skb->len + OUTER),
		.fragment = __builtin_bswap16(0x4000), .ttl = 64, .protocol = 4,
		.source = local, .destination = remote,
	};
	const u16 *words = (const u16 *)&outer;
	u32 sum = 0;
#pragma unroll
	for (int i = 0; i < 10; i++)
		sum += words[i];
	sum = (sum & 0xffff) + (sum >> 16);
	outer.sum = ~((sum & 0xffff) + (sum >> 16));
	if (adjust_room(skb, OUTER, ROOM_MAC, FIXED_GSO | ENCAP_IPV4))
		return NEXT;
	if (store_bytes(skb, 0, &outer, OUTER, 0) || change_head(skb, ETHERNET, 0))
		return SHOT;
	return redirect_neigh(link, 0, 0, 0);
}

SECTION("classifier") int minimal_in(struct __sk_buff *skb)
{
	u8 protocol;
	if (skb->protocol != __builtin_bswap16(0x0800))
		return NEXT;
	if (load_bytes(skb, ETHERNET + PROTOCOL, &protocol, 1) || protocol != 4)
		return NEXT;
	if (adjust_room(skb, -OUTER, ROOM_MAC, FIXED_GSO | DECAP_IPV4))
		return SHOT;
	return redirect(device, INGRESS);
}

SECTION("license") char licence[] = "Dual MIT/GPL";

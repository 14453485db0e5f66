//! Several pairs of queues, and packets that go straight into the guest's memory, as a guest
//! uses them that does not behave.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// Sockets of the host that say something to the guest, each a flow of its own.
fn flows(port: &Port, count: u16) -> Vec<std::net::UdpSocket> {
    let netns = Netns::open(&port.name).unwrap();
    netns
        .run(|| {
            let link = IfName::new("vm").unwrap();
            let mut netlink = Netlink::open().unwrap();
            netlink.add_address(link, "10.77.1.1/24".parse().unwrap()).unwrap();
            let bind = |_| std::net::UdpSocket::bind("10.77.1.1:0").unwrap();
            (0..count).map(bind).collect()
        })
        .unwrap()
}

fn say(flows: &[std::net::UdpSocket]) {
    for socket in flows {
        socket.send_to(b"hello", "10.77.1.10:9").unwrap();
    }
}

const PAIRS: u16 = 4;
const FLOWS: u16 = 64;

/// Rings of four pairs, switched on as no driver does.
const ODD: [usize; 8] = [6, 1, 3, 0, 7, 2, 5, 4];

#[test]
fn each_pair_of_queues_carries_and_is_asked() {
    privileged!(Need::Tun);
    let port = Port::of("pairs", PAIRS);
    let mut guest = Guest::connect_by(&port.path(), u64::MAX, &ODD);
    for round in 0..20 {
        for pair in [2, 0, 3, 1] {
            assert!(guest.is_answered_by(pair), "pair {pair}, round {round}");
        }
    }
    drop(guest);
    // A guest that knows of one pair is served by a port of several.
    assert!(port.serves());
    // What the host says is spread over all of them.
    let flows = flows(&port, FLOWS);
    let mut guest = Guest::connect_by(&port.path(), u64::MAX, &ODD);
    for pair in 0..4 {
        guest.offer_all(2 * pair, BUFFERS + 0x2_0000 * pair as u64);
        guest.kick(2 * pair);
    }
    let counts = || [0, 2, 4, 6].map(|queue| guest.used(queue));
    let mut said = 0;
    // The first ones may come before the last pair is on.
    for some in flows.chunks(8) {
        say(some);
        said += u16::try_from(some.len()).unwrap();
        let begin = Instant::now();
        while counts().iter().sum::<u16>() < said {
            assert!(begin.elapsed() < Duration::from_secs(10), "{:?} of {said}", counts());
            thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(counts().iter().all(|count| *count > 0), "{:?}", counts());
}

/// What waits for a pair that is switched off is given by the first, and so is all that comes
/// after; switched on, it has its share again.
#[test]
fn a_pair_that_is_switched_off_loses_nothing() {
    privileged!(Need::Tun);
    let port = Port::of("off", PAIRS);
    let flows = flows(&port, FLOWS / 2);
    let mut guest = Guest::connect_by(&port.path(), u64::MAX, &ODD);
    assert!((0..4).all(|pair| guest.is_answered_by(pair)));
    let before = guest.used(0);
    // The others have no buffers: packets wait in their queues, and one in each card's hand.
    guest.offer_all(0, BUFFERS + 0x2_0000);
    guest.kick(0);
    say(&flows);
    thread::sleep(Duration::from_millis(50));
    let share = guest.used(0).wrapping_sub(before);
    assert!(share < FLOWS / 2, "all came by one pair: {share}");
    for queue in [2, 5, 4, 3, 6, 7] {
        guest.frontend.set_vring_enable(queue, false).unwrap();
    }
    assert!(guest.waits_for(0, before.wrapping_add(FLOWS / 2)), "{} came", guest.used(0));
    say(&flows);
    assert!(guest.waits_for(0, before.wrapping_add(FLOWS)), "{} came", guest.used(0));
    // In the midst of traffic, again and again.
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                say(&flows);
                thread::sleep(Duration::from_micros(200));
            }
        });
        for round in 0..30 {
            for queue in 2..8 {
                guest.frontend.set_vring_enable(queue, round % 2 == 0).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(guest);
    assert!(port.serves());
}

/// As much as a queue of the device holds, and not the first part of it alone.
#[test]
fn a_full_queue_of_a_pair_that_is_switched_off_is_given_whole() {
    privileged!(Need::Tun);
    const MANY: u16 = 450;
    let port = Port::of("full", 2);
    let flows = flows(&port, FLOWS);
    let mut guest = Guest::connect_by(&port.path(), u64::MAX, &[0, 1, 2, 3]);
    assert!(guest.is_answered_by(0) && guest.is_answered_by(1));
    guest.offer_all(0, BUFFERS + 0x2_0000);
    guest.kick(0);
    let before = guest.used(0);
    // The other pair has no buffers: what comes by that waits.
    let waits = |flow: &&std::net::UdpSocket| {
        let before = guest.used(0);
        say(std::slice::from_ref(flow));
        thread::sleep(Duration::from_millis(50));
        guest.used(0) == before
    };
    let flow = flows.iter().find(waits).expect("a flow of the second pair");
    for _ in 1..MANY {
        say(std::slice::from_ref(flow));
    }
    // The flows that were tried in vain came at once.
    let mut wanted = guest.used(0).wrapping_sub(before) + MANY;
    guest.frontend.set_vring_enable(2, false).unwrap();
    // Buffers are used in the order in which they are offered.
    let mut given = guest.used(0);
    let begin = Instant::now();
    while guest.used(0).wrapping_sub(before) < wanted {
        assert!(begin.elapsed() < Duration::from_secs(10), "{} of {wanted}", guest.used(0));
        while given != guest.used(0) {
            guest.offer(0, given.wrapping_sub(before) % SIZE);
            given = given.wrapping_add(1);
        }
        guest.kick(0);
        thread::sleep(Duration::from_millis(1));
    }
    wanted += 1;
    say(std::slice::from_ref(flow));
    assert!(guest.waits_for(0, before.wrapping_add(wanted)), "what comes next");
}

/// Indices beyond the rings end a connection at most.
#[test]
fn rings_that_there_are_not_are_refused() {
    privileged!(Need::Tun);
    let port = Port::of("index", 2);
    for ring in [4u32, 31, 64, 255, 1 << 16, u32::MAX] {
        for request in [8u32, 9, 10, 11, 12, 13, 18] {
            let mut stream = UnixStream::connect(port.path()).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let say = |stream: &mut UnixStream, request: u32, body: &[u8]| {
                let size = u32::try_from(body.len()).unwrap();
                let head = [request, 1, size].map(u32::to_ne_bytes).concat();
                stream.write_all(&[&head, body].concat()).is_ok()
            };
            say(&mut stream, 3, &[]);
            say(&mut stream, 2, &(1u64 << 32 | 1 << 30).to_ne_bytes());
            let len = if request == 9 { 40 } else { 8 };
            let mut body = vec![0; len];
            body[..4].copy_from_slice(&ring.to_ne_bytes());
            body[4] = 1;
            say(&mut stream, request, &body);
            let _answer = stream.read(&mut [0; 64]);
        }
        assert!(port.serves(), "ring {ring}");
    }
}

/// Packets so large that they are not copied by the port: whole in the guest's buffers; where
/// those are gone, nobody is hurt, not even the process.
#[test]
fn large_packets_go_straight_into_the_guests_memory() {
    privileged!(Need::Tun);
    const LARGE: usize = 20_000;
    const TAKEN: u16 = 10;
    let port = Port::of("large", 2);
    let socket = flows(&port, 1).remove(0);
    let netns = Netns::open(&port.name).unwrap();
    netns
        .run(|| Netlink::open().unwrap().set_mtu(IfName::new("vm").unwrap(), 65_000))
        .unwrap()
        .unwrap();
    let mut guest = Guest::connect(&port.path(), u64::MAX);
    // It has said by which pair it is to be reached.
    assert!(guest.asks_and_is_answered());
    let begin = guest.used(0);
    let send = |number: u8| {
        let data: Vec<u8> = (0..LARGE).map(|at| (at / 7).to_le_bytes()[0] ^ number).collect();
        socket.send_to(&data, "10.77.1.10:9").unwrap();
        data
    };
    for number in 0..6u16 {
        // More than the longest packet needs.
        for slot in 0..SIZE {
            let place = BUFFERS + 0x2_0000 + u64::from(slot) * 2048;
            guest.descriptor(0, slot, place, 2048, WRITE, 0);
        }
        let first = number * TAKEN % SIZE;
        let fresh = if number == 0 { SIZE } else { TAKEN };
        for at in 0..fresh {
            guest.offer(0, (first + SIZE - fresh + at) % SIZE);
        }
        guest.kick(0);
        let data = send(u8::try_from(number).unwrap());
        assert!(guest.waits_for(0, begin.wrapping_add(TAKEN * (number + 1))), "packet {number}");
        let mut got = Vec::new();
        for at in 0..TAKEN {
            let mut buffer = vec![0; 2048];
            let slot = u64::from((first + at) % SIZE);
            guest.memory.read_exact_at(&mut buffer, BUFFERS + 0x2_0000 + slot * 2048).unwrap();
            got.extend(buffer);
        }
        assert_eq!(got[10..12], TAKEN.to_le_bytes(), "packet {number}");
        assert_eq!(got[12..26], [&MAC.0[..], b"\x02conet", &[8, 0]].concat(), "packet {number}");
        assert!(got[26 + 28..26 + 28 + LARGE] == data, "packet {number}");
    }
    // All but the first of those that come next are gone: the kernel leaves out what has no
    // place, and nobody else goes there.
    let next = u64::from(6 * TAKEN % SIZE);
    guest.memory.set_len(BUFFERS + 0x2_0000 + (next + 1) * 2048).unwrap();
    send(0);
    assert!(guest.waits_for(0, begin.wrapping_add(TAKEN * 7)));
    drop(guest);
    assert!(port.serves());
}

#[test]
fn a_segment_whose_data_is_gone_hurts_nobody() {
    privileged!(Need::Tun);
    let port = Port::of("gone", 2);
    let mut guest = Guest::connect(&port.path(), u64::MAX);
    let mut head = vec![1, 1, 54, 0, 0x78, 5, 34, 0, 16, 0, 0, 0];
    head.extend(
        [&b"\x02conet"[..], &MAC.0, &[8, 0, 0x45, 0, 0x4e, 0x20, 0, 0, 0, 0, 64, 6, 0, 0]].concat(),
    );
    head.extend([10, 77, 1, 10, 10, 77, 2, 2]);
    head.resize(256, 0x50);
    guest.memory.write_all_at(&head, BUFFERS).unwrap();
    guest.descriptor(1, 3, BUFFERS, 256, NEXT, 4);
    guest.descriptor(1, 4, BUFFERS + 8192, 20_000, 0, 0);
    guest.offer(1, 3);
    guest.memory.set_len(BUFFERS + 4096).unwrap();
    guest.kick(1);
    thread::sleep(Duration::from_millis(20));
    drop(guest);
    assert!(port.serves());
}

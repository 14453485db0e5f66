use super::*;
fn listener(transport: Transport, address: &str, port: u16) -> Listener {
    Listener { transport, address: address.parse().unwrap(), port }
}

fn forward(text: &str) -> Forward {
    text.parse().unwrap()
}

#[test]
fn a_port_that_the_host_uses_is_found() {
    let listeners = [
        listener(Transport::Tcp, "0.0.0.0", 22),
        listener(Transport::Tcp, "127.0.0.1", 631),
        listener(Transport::Udp, "192.0.2.1", 53),
        listener(Transport::Tcp, "::", 80),
        listener(Transport::Tcp, "2001:db8::1", 8080),
        listener(Transport::Tcp, "::ffff:192.0.2.1", 9090),
    ];
    for (text, port) in [
        ("tcp:22:web", Some(22)),
        ("tcp:192.0.2.9:22:web", Some(22)),
        ("udp:22:web", None),
        ("tcp:631:web", None),
        ("udp:50-60:web", Some(53)),
        ("udp:192.0.2.9:53:web", None),
        ("tcp:79-81:web:1079-1081", Some(80)),
        ("tcp:8080:web", None),
        ("tcp:9090:web", Some(9090)),
        ("auto:web", None),
    ] {
        let taken = taken_by_host(&forward(text), &listeners);
        assert_eq!(taken.map(|taken| taken.port), port, "{text}");
    }
}

#[test]
fn what_is_taken_is_not_free() {
    let one = |port| Ports { transport: Transport::Tcp, first: port, last: port };
    let bound = Some("192.0.2.1".parse().unwrap());
    let taken = [(None, one(80)), (bound, one(81))];
    let free = |text, port| is_free(&forward(text), one(port), &taken);
    assert!(!free("auto:web", 80) && !free("auto:web", 81) && free("auto:web", 82));
    assert!(free("tcp:192.0.2.2:auto:web", 81) && !free("tcp:192.0.2.1:auto:web", 81));
    let listeners = [listener(Transport::Tcp, "0.0.0.0", 22)];
    let hosts = |port| is_hosts(&forward("auto:web"), one(port), &listeners);
    assert!(hosts(22) && !hosts(23));
}

#[test]
fn who_listens_on_the_host_later_takes_nothing_away() {
    let listeners = [listener(Transport::Tcp, "0.0.0.0", 80)];
    let web = forward("tcp:80:web");
    let first = fixed(&web, &[], &listeners);
    assert!(first.unusable && first.ports.is_empty());
    let later = fixed(&web, &fixed(&web, &[], &[]).ports, &listeners);
    assert!(!later.unusable && later.ports == web.fixed().into_iter().collect::<Vec<_>>());
    assert!(later.problem.unwrap().contains("which gets nothing"));
}

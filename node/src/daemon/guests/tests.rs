use super::*;

/// A table with one guest of the configuration, in which nothing is made.
fn guests() -> Guests {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("conet.toml");
    let key = crate::identity::Identity::generate().unwrap();
    let text = format!(
        "[node]\nname = \"me\"\nprivate_key = \"{}\"\naddress = \"192.0.2.1\"\n\
         overlay = \"10.77.1.0/29\"\nstate_dir = \"{}\"\n",
        key.seed_base64().as_str(),
        dir.path().display(),
    );
    std::fs::write(&file, text).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let config = Arc::new(Config::load(&file).unwrap());
    let mut guests = Guests {
        file: dir.keep().join(record::FILE),
        config,
        guests: Vec::new(),
        pieces: None,
        drained: None,
        post: Arc::new(|_| {}),
    };
    let web = GuestConfig {
        rates: conet_hostinject::Rates::default(),
        queues: 1,
        line: None,
        name: "web".to_owned(),
        kind: GuestKind::Netns,
        addresses: vec![IpAddr::from([10, 77, 1, 2])],
    };
    guests.push(web, Origin::Config, State::Unusable("not made in this test".to_owned()));
    guests
}

impl Drop for Guests {
    fn drop(&mut self) {
        if let Some(directory) = self.file.parent().filter(|at| at.starts_with("/tmp")) {
            std::fs::remove_dir_all(directory).ok();
        }
    }
}

const UNLIMITED: control::GuestRates = control::GuestRates { from: None, to: None };

fn refused(name: &str, kind: &str, addresses: &[[u8; 4]]) -> String {
    let addresses = addresses.iter().map(|octets| IpAddr::from(*octets)).collect();
    guests().plan(name.to_owned(), kind, addresses, &UNLIMITED).unwrap_err().to_string()
}

#[test]
fn what_cannot_be_added_is_refused_with_the_remedy() {
    for (name, kind, addresses, said) in [
        ("web", "netns", &[][..], "web is already the name of a guest; give another name"),
        ("me", "netns", &[], "me is already the name of this node; give another name"),
        (
            "x",
            "xen",
            &[],
            "\"xen\" is not a kind of guest; write netns, tap, qemu, uml or colinux; see conet",
        ),
        ("x", "colinux", &[], "a guest in place of coLinux needs the line of its card; write it"),
        ("x", "tap", &[[10, 77, 2, 2]], "10.77.2.2 is not a guest's address in overlay"),
        ("x", "tap", &[[10, 77, 1, 1]], "10.77.1.1 is not a guest's address in overlay"),
        ("x", "tap", &[[10, 77, 1, 7]], "10.77.1.7 is not a guest's address in overlay"),
        ("x", "tap", &[[10, 77, 1, 2]], "10.77.1.2 is the address of guest web; give another"),
        ("x", "tap", &[[10, 77, 1, 3]; 2], "10.77.1.3 is given twice"),
    ] {
        let text = refused(name, kind, addresses);
        assert!(text.starts_with(said), "{text}");
    }
    for name in ["", "home", "a/b", "../x", "sixteen-bytes-ab", "-x", "a b", "a\nb"] {
        assert!(refused(name, "netns", &[]).contains("is no name for a guest"), "{name:?}");
    }
}

#[test]
fn addresses_are_given_from_the_lowest_until_none_is_free() {
    let mut guests = guests();
    for (name, last) in [("a", 3), ("b", 4), ("c", 5), ("d", 6)] {
        let guest = guests.plan(name.to_owned(), "tap", Vec::new(), &UNLIMITED).unwrap();
        assert_eq!(guest.addresses, [IpAddr::from([10, 77, 1, last])]);
        guests.push(guest, Origin::Added, State::Adding);
    }
    let full = guests.plan("e".to_owned(), "netns", Vec::new(), &UNLIMITED).unwrap_err();
    assert_eq!(full.code, "full");
}

#[test]
fn what_cannot_be_removed_is_refused_with_the_remedy() {
    let mut guests = guests();
    let guest = guests.plan("new".to_owned(), "tap", Vec::new(), &UNLIMITED).unwrap();
    guests.push(guest, Origin::Added, State::Adding);
    let code = |name: &str| guests.removable(name).unwrap_err().code;
    assert_eq!(code("web"), "configured");
    assert_eq!(code("new"), "busy");
    assert_eq!(code("wob"), "no-such-guest");
    assert!(guests.removable("wob").unwrap_err().remedy.contains("web, new"));
}

#[test]
fn a_user_changes_nothing() {
    let user = Caller { pid: 7, uid: 1000, administers: false };
    assert_eq!(may_change(user).unwrap_err().code, "denied");
    assert!(may_change(Caller { administers: true, ..user }).is_ok());
}

#[test]
fn what_was_added_is_written_and_the_configurations_is_not() {
    let mut guests = guests();
    let one = guests.plan("one".to_owned(), "tap", Vec::new(), &UNLIMITED).unwrap();
    guests.push(one.clone(), Origin::Added, State::Adding);
    let two = guests.plan("two".to_owned(), "netns", Vec::new(), &UNLIMITED).unwrap();
    guests.push(two.clone(), Origin::Added, State::Removing);
    guests.store().unwrap();
    assert_eq!(load(&guests.file), [Record::of(&one, false), Record::of(&two, true)]);
    assert_eq!(Record::of(&two, true).guest().unwrap().kind, two.kind);
    // Damaged, or of a version that knows more: nothing is guessed.
    std::fs::write(&guests.file, "{").unwrap();
    assert_eq!(load(&guests.file), []);
}

#[test]
fn an_added_guest_that_contradicts_the_configuration_is_kept_and_not_made() {
    let mut guests = guests();
    let other = GuestConfig {
        rates: conet_hostinject::Rates::default(),
        queues: 1,
        line: None,
        name: "other".to_owned(),
        kind: GuestKind::Tap,
        addresses: vec![IpAddr::from([10, 77, 1, 2])],
    };
    guests.restore(Record::of(&other, false));
    let row = guests.list(&BTreeMap::new()).pop().unwrap();
    assert_eq!((row.name.as_str(), row.state.as_str()), ("other", "unusable"));
    assert!(row.problem.unwrap().contains("the address of guest web"));
    guests.store().unwrap();
    assert_eq!(load(&guests.file), [Record::of(&other, false)]);
}

#[test]
fn rates_are_for_guests_whose_packets_somebody_sees() {
    let guests = guests();
    let rates = |from: &str| control::GuestRates { from: Some(from.to_owned()), to: None };
    let plan = |kind, from| guests.plan("x".to_owned(), kind, Vec::new(), &rates(from));
    let tap = plan("tap", "10mbit,100pps").unwrap();
    assert_eq!(tap.rates.from_guest.to_string(), "10mbit,100pps");
    // It is there for the next daemon.
    assert_eq!(Record::of(&tap, false).guest().unwrap().rates, tap.rates);
    let said = plan("netns", "10mbit").unwrap_err().to_string();
    assert!(said.contains("nobody to limit"), "{said}");
    let said = plan("tap", "fast").unwrap_err().to_string();
    assert!(said.contains("not a rate; write 100mbit"), "{said}");
}

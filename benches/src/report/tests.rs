use super::*;

fn row(ours: f64, rule: Option<Rule>) -> Row {
    Row {
        case: "call".to_owned(),
        metric: "same cpu".to_owned(),
        unit: "ns",
        ours,
        peers: vec![("tcp_nodelay".to_owned(), 4000.0), ("least".to_owned(), 5000.0)],
        rule,
        bound: Some("least".to_owned()),
        pin: "cpu0".to_owned(),
        runs: 3,
        spread: 0.1,
    }
}

fn report(rows: Vec<Row>) -> Report {
    let mut report = Report::new("bench", Format::Table);
    report.version("tcp_nodelay", "Linux");
    report.version("absent", "7");
    report.rows = rows;
    report
}

#[test]
fn a_rule_is_computed_from_its_own_row() {
    for (ours, rule, target, met, ratio) in [
        (5000.0, Rule::times(1.25, "tcp_nodelay"), "<= 1.25 * tcp_nodelay", Some(true), Some(1.25)),
        (5001.0, Rule::times(1.25, "tcp_nodelay"), "<= 1.25 * tcp_nodelay", Some(false), None),
        (5000.0, Rule::above("tcp_nodelay", 1000.0), "<= tcp_nodelay + 1 µs", Some(true), None),
        (5001.0, Rule::above("tcp_nodelay", 1000.0), "<= tcp_nodelay + 1 µs", Some(false), None),
        (3200.0, Rule::at_least(0.8, "tcp_nodelay"), ">= 0.8 * tcp_nodelay", Some(true), Some(0.8)),
        (3199.0, Rule::at_least(0.8, "tcp_nodelay"), ">= 0.8 * tcp_nodelay", Some(false), None),
        (800.0, Rule::constant(800.0), "<= 800 ns", Some(true), Some(1.0)),
        (900.0, Rule::constant(800.0), "<= 800 ns", Some(false), Some(1.125)),
    ] {
        let row = row(ours, Some(rule.clone()));
        assert_eq!(rule.text(row.unit), target);
        assert_eq!(row.met(), met, "{ours} {target}");
        if ratio.is_some() {
            assert_eq!(row.ratio(), ratio, "{ours} {target}");
        }
    }
}

#[test]
fn a_peer_that_was_not_measured_is_neither_beaten_nor_not() {
    for rule in [Rule::times(1.25, "absent"), Rule::above("absent", 10.0)] {
        let mut row = row(1.0, Some(rule));
        row.bound = Some("absent".to_owned());
        assert_eq!((row.met(), row.ratio(), row.bound()), (None, None, None));
        let json = report(vec![]).json(&row);
        assert!(json["met"].is_null() && json["ratio"].is_null() && json["bound"].is_null());
        assert!(json["target"].is_string(), "{json}");
    }
}

#[test]
fn a_row_is_one_line_of_json_with_every_field() {
    let report = report(vec![]);
    let json = report.json(&row(6_000.123_456, Some(Rule::times(1.25, "tcp_nodelay"))));
    assert!(!json.to_string().contains('\n'));
    for field in [
        "bench", "case", "metric", "unit", "ours", "peers", "ratio", "target", "met", "bound",
        "pin", "runs", "spread", "kernel", "commit", "versions",
    ] {
        assert!(!json[field].is_null(), "{field} in {json}");
    }
    assert_eq!(json["ours"], 6000.123);
    assert_eq!(json["peers"]["tcp_nodelay"], 4000.0);
    assert_eq!(json["met"], false);
    assert_eq!(json["bound"], json!({"name": "least", "value": 5000.0, "ratio": 1.2}));
    assert_eq!(json["versions"], json!({"tcp_nodelay": "Linux"}));
}

#[test]
fn the_table_says_what_was_missed_and_how_near_it_is() {
    let rows = vec![row(6000.0, Some(Rule::constant(5500.0))), row(1.0, None)];
    let mut out = Vec::new();
    report(rows).print(&mut out).unwrap();
    let out = String::from_utf8(out).unwrap();
    let lines: Vec<_> = out.lines().collect();
    for word in ["6 µs", "10 %", "<= 5.50 µs", "NO", "1.09", "1.20 * least", "tcp_nodelay 4 µs"]
    {
        assert!(lines[1].contains(word), "{word} in {}", lines[1]);
    }
    assert!(!lines[2].contains("NO") && !lines[2].contains("yes"), "{}", lines[2]);
    assert!(out.contains("tcp_nodelay: Linux") && !out.contains("absent"), "{out}");
}

#[test]
fn quantities_have_as_many_digits_as_are_worth_reading() {
    for (value, unit, text) in [
        (4.014, "ns", "4.01 ns"),
        (25.67, "ns", "25.7 ns"),
        (999.4, "ns", "999 ns"),
        (8723.0, "ns", "8.72 µs"),
        (100.0, "pages", "100 pages"),
        (5.0, "ms", "5 ms"),
        (1234.5, "ms", "1234 ms"),
    ] {
        assert_eq!(quantity(value, unit), text);
    }
}

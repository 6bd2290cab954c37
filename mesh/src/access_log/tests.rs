use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn record() -> Record {
    Record {
        time: SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_042),
        duration: Duration::from_nanos(1_234_499),
        upstream: None,
        direction: Direction::Inbound,
        protocol: Protocol::Http1,
        source: Some("spiffe://mesh.local/ns/shop/sa/web".into()),
        destination: None,
        destination_service: None,
        source_address: None,
        destination_address: None,
        method: Some("GET".into()),
        authority: None,
        path: Some("/orders/7".to_owned()),
        query: false,
        grpc_service: None,
        grpc_method: None,
        grpc_status: None,
        grpc_message: None,
        status: Some(200),
        decision: Some(Verdict::Allow),
        policy: Some("shop/orders".into()),
        rule: Some("readers".into()),
        reason: None,
        decision_id: None,
        audit: None,
        request_bytes: 0,
        response_bytes: 412,
        error: None,
        flags: Vec::new(),
        attempts: None,
        tls_version: Some("TLSv1.3"),
        snapshot: Some(3),
        request_id: None,
        trace_id: None,
        user_agent: None,
    }
}

fn line(record: &Record) -> String {
    let mut line = Vec::new();
    record.write_line(&mut line);
    String::from_utf8(line).unwrap()
}

#[test]
fn a_record_is_one_line_without_what_is_unknown() {
    assert_eq!(
        line(&record()),
        "{\"kind\":\"access\",\"time\":\"2023-11-14T22:13:20.000042Z\",\"duration_ms\":1.234,\
         \"direction\":\"inbound\",\"protocol\":\"http/1.1\",\
         \"source\":\"spiffe://mesh.local/ns/shop/sa/web\",\"method\":\"GET\",\
         \"path\":\"/orders/7\",\"status\":200,\"decision\":\"allow\",\"policy\":\"shop/orders\",\
         \"rule\":\"readers\",\"request_bytes\":0,\"response_bytes\":412,\
         \"tls_version\":\"TLSv1.3\",\"snapshot\":3}\n"
    );
}

#[test]
fn every_member_is_written_and_reads_back() {
    let text = |text: &str| Some(text.to_owned());
    let full = Record {
        upstream: Some(Duration::from_hours(72)),
        direction: Direction::Outbound,
        protocol: Protocol::Grpc,
        destination: Some("spiffe://mesh.local/ns/shop/sa/orders".into()),
        destination_service: Some("orders.shop:80".into()),
        source_address: Some(Address::Host("192.0.2.10".parse().unwrap())),
        destination_address: Some(Address::Socket("[2001:db8::1]:8080".parse().unwrap())),
        method: Some("POST".into()),
        authority: text("orders.shop"),
        query: true,
        grpc_service: text("shop.Orders"),
        grpc_method: text("Get"),
        grpc_status: Some(7),
        grpc_message: text("no \"rule\""),
        reason: Some("no rule admits".into()),
        decision_id: text("00c0ffee00c0ffee"),
        audit: Some("shop/next: deny".into()),
        error: Some("timeout"),
        flags: vec!["upstream_sidecar", "cut_off"],
        attempts: Some(2),
        request_id: text("r-1"),
        trace_id: text("4bf92f3577b34da6a3ce929d0e0e4736"),
        user_agent: text("curl/8"),
        ..record()
    };
    let line = line(&full);
    assert_eq!(
        line,
        "{\"kind\":\"access\",\"time\":\"2023-11-14T22:13:20.000042Z\",\"duration_ms\":1.234,\
         \"upstream_ms\":259200000.0,\"direction\":\"outbound\",\"protocol\":\"grpc\",\
         \"source\":\"spiffe://mesh.local/ns/shop/sa/web\",\
         \"destination\":\"spiffe://mesh.local/ns/shop/sa/orders\",\
         \"destination_service\":\"orders.shop:80\",\"source_address\":\"192.0.2.10\",\
         \"destination_address\":\"[2001:db8::1]:8080\",\"method\":\"POST\",\
         \"authority\":\"orders.shop\",\"path\":\"/orders/7\",\"query\":true,\
         \"grpc_service\":\"shop.Orders\",\"grpc_method\":\"Get\",\"grpc_status\":7,\
         \"grpc_message\":\"no \\\"rule\\\"\",\"status\":200,\"decision\":\"allow\",\
         \"policy\":\"shop/orders\",\"rule\":\"readers\",\"reason\":\"no rule admits\",\
         \"decision_id\":\"00c0ffee00c0ffee\",\"audit\":\"shop/next: deny\",\
         \"request_bytes\":0,\"response_bytes\":412,\"error\":\"timeout\",\
         \"flags\":[\"upstream_sidecar\",\"cut_off\"],\"attempts\":2,\
         \"tls_version\":\"TLSv1.3\",\"snapshot\":3,\"request_id\":\"r-1\",\
         \"trace_id\":\"4bf92f3577b34da6a3ce929d0e0e4736\",\"user_agent\":\"curl/8\"}\n"
    );
    let read = serde_json::to_value(Line::parse(&line).unwrap()).unwrap();
    let written: serde_json::Value = serde_json::from_str(&line).unwrap();
    for (name, value) in written.as_object().unwrap() {
        assert_eq!(&read[name], value, "{name}");
    }
}

#[test]
fn times_are_written_as_other_programs_write_them() {
    for micros in [
        0,
        1,
        951_782_399_999_999,
        1_709_164_800_000_000,
        4_102_444_799_100_000,
    ] {
        let time = SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
        let expected = humantime::format_rfc3339_micros(time).to_string();
        assert_eq!(timestamp(time), expected);
    }
}

#[test]
fn an_address_is_written_as_it_is_displayed() {
    for address in [
        "0.0.0.0:1",
        "255.10.9.100:65535",
        "[::1]:80",
        "[fe80::1%2]:80",
    ] {
        let mut record = record();
        record.source_address = Some(Address::Socket(address.parse().unwrap()));
        let read = Line::parse(&line(&record)).unwrap();
        assert_eq!(read.source_address.as_deref(), Some(address));
    }
}

#[test]
fn hostile_characters_are_escaped_and_read_back() {
    let hostile = "/a\n\"\\\u{0}\u{1b}[31m\u{7f}\u{85}\u{9b}\u{202e}\u{2066}\u{2028}\u{200f}é";
    let mut record = record();
    record.path = Some(hostile.to_owned());
    let line = line(&record);
    assert!(
        line.contains(r#""/a\n\"\\\u0000\u001b[31m\u007f\u0085\u009b\u202e\u2066\u2028\u200fé""#),
        "{line}"
    );
    assert_eq!(
        line.matches(is_unsafe).collect::<String>(),
        "\n",
        "only the line's own end"
    );
    assert_eq!(Line::parse(&line).unwrap().path.as_deref(), Some(hostile));
}

#[test]
fn what_a_peer_chose_is_cut_between_characters() {
    let mut record = record();
    record.path = Some("é".repeat(2000));
    record.user_agent = Some(format!("a{}", "é".repeat(200)));
    record.grpc_message = Some("m".repeat(5000));
    let read = Line::parse(&line(&record)).unwrap();
    assert_eq!(read.path.map(|path| path.len()), Some(2048));
    assert_eq!(read.user_agent.map(|agent| agent.len()), Some(255));
    assert_eq!(
        read.grpc_message.map(|message| message.len()),
        Some(TEXT_BYTES_MAX)
    );
}

#[test]
fn refusals_are_told_from_calls_that_merely_failed() {
    assert!(!record().is_refusal());
    for decision in [Verdict::Deny, Verdict::WouldDeny] {
        assert!(
            Record {
                decision: Some(decision),
                ..record()
            }
            .is_refusal()
        );
    }
    for (error, refusal) in [
        ("tls_handshake", true),
        ("bad_request", true),
        ("timeout", false),
    ] {
        let record = Record {
            error: Some(error),
            ..record()
        };
        assert_eq!(record.is_refusal(), refusal, "{error}");
    }
}

#[test]
fn lines_of_other_versions_are_read() {
    let line =
        Line::parse(r#"{"kind":"access","status":200,"from_the_future":{"a":[1]}}"#).unwrap();
    assert_eq!((line.status, line.time), (Some(200), None));
    assert!(Line::parse("{").is_err());
    assert!(Line::parse(r#"{"status":"x"}"#).is_err());
    assert!(Line::parse("[]").is_err());
}

proptest! {
    #[test]
    fn whatever_a_peer_sends_the_line_is_one_line_and_reads_back(
        path in ".*", agent in any::<String>(), reason in "\\PC*",
    ) {
        let mut record = record();
        record.path = Some(path.clone());
        record.user_agent = Some(agent.clone());
        record.reason = Some(reason.clone().into());
        let line = line(&record);
        prop_assert_eq!(line.matches(is_unsafe).count(), 1);
        let read = Line::parse(&line).unwrap();
        prop_assert_eq!(read.path.as_deref(), Some(cut(&path, PATH_BYTES_MAX)));
        prop_assert_eq!(read.user_agent.as_deref(), Some(cut(&agent, USER_AGENT_BYTES_MAX)));
        prop_assert_eq!(read.reason.as_deref(), Some(cut(&reason, TEXT_BYTES_MAX)));
    }
}

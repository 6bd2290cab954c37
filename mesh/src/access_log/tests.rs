use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn record() -> Record {
    Record {
        kind: "access",
        time: timestamp(SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_042)),
        duration_ms: 1.234,
        upstream_ms: None,
        direction: Direction::Inbound,
        protocol: Protocol::Http1,
        source: Some("spiffe://mesh.local/ns/shop/sa/web".into()),
        destination: None,
        destination_service: None,
        source_address: None,
        destination_address: None,
        method: Some("GET".to_owned()),
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
    record.write_line(&mut line).unwrap();
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
        record.reason = Some(reason.clone());
        let line = line(&record);
        prop_assert_eq!(line.matches(is_unsafe).count(), 1);
        let read = Line::parse(&line).unwrap();
        prop_assert_eq!(read.path.as_deref(), Some(cut(&path, PATH_BYTES_MAX)));
        prop_assert_eq!(read.user_agent.as_deref(), Some(cut(&agent, USER_AGENT_BYTES_MAX)));
        prop_assert_eq!(read.reason.as_deref(), Some(cut(&reason, TEXT_BYTES_MAX)));
    }
}

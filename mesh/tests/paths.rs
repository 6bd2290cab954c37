//! The path that is authorized is the path that is forwarded, and it has one spelling.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::too_many_lines,
    missing_docs,
    reason = "tests"
)]

use std::collections::BTreeSet;

use proptest::prelude::*;
use sidegate_mesh::path::split_target;
use sidegate_mesh::{CanonicalPath, PathError};

const DENIED: &str = "/admin/users";

#[track_caller]
fn check(raw: &str, expected: Result<&str, PathError>) {
    let parsed = CanonicalPath::parse(raw);
    assert_eq!(
        parsed.as_ref().map(CanonicalPath::as_str),
        expected.as_ref().copied(),
        "{raw}"
    );
}

#[test]
fn ordinary_paths_stay_as_they_are() {
    for path in [
        "/",
        "/orders",
        "/orders/",
        "/orders/7",
        "/a.b/c-d/_/~",
        "/a!$&'()*+,=:@b",
        "/...",
        "/.well-known/x",
        "/a/..b/c..",
        "*",
        "/%C3%A9",
        "/100%25",
        "/a%25/b",
        "/a%20b",
        "/a%3Fb%23c",
    ] {
        check(path, Ok(path));
    }
}

#[test]
fn each_character_has_one_form() {
    check("/%61%7e%2d", Ok("/a~-"));
    check("/a%3a%40%2b%2C%24", Ok("/a:@+,$"));
    check("/%c3%a9", Ok("/%C3%A9"));
    check("/a%5bb", Ok("/a%5Bb"));
    check("/a[b]{c}|^\"<>`", Ok("/a%5Bb%5D%7Bc%7D%7C%5E%22%3C%3E%60"));
    check("/%2A", Ok("/*"));
}

#[test]
fn what_could_be_another_path_is_refused() {
    use PathError::{
        Backslash, Character, DotSegment, DoubleEncoding, EmptySegment, EncodedControl,
        EncodedSlash, Fragment, NotAbsolute, Parameter, PercentEncoding, Query, Utf8,
    };
    for (raw, error) in [
        ("", NotAbsolute),
        ("orders", NotAbsolute),
        ("**", NotAbsolute),
        ("http://a/b", NotAbsolute),
        ("/a b", Character),
        ("/a\tb", Character),
        ("/a\nb", Character),
        ("/a\0b", Character),
        ("/a\u{7f}", Character),
        ("/\u{e9}", Character),
        ("/a?b", Query),
        ("/a#b", Fragment),
        ("/a\\b", Backslash),
        ("/a%5cb", Backslash),
        ("/a%5Cb", Backslash),
        ("/a;b", Parameter),
        ("/a%3bb", Parameter),
        ("/%", PercentEncoding),
        ("/%2", PercentEncoding),
        ("/%zz", PercentEncoding),
        ("/%%32f", PercentEncoding),
        ("/%u002f", PercentEncoding),
        ("/a%2fb", EncodedSlash),
        ("/a%2Fb", EncodedSlash),
        ("/a%00", EncodedControl),
        ("/a%0d%0ab", EncodedControl),
        ("/a%7fb", EncodedControl),
        ("/a%252fb", DoubleEncoding),
        ("/a%25%32fb", DoubleEncoding),
        ("/a%25%32%66b", DoubleEncoding),
        ("/%2525", DoubleEncoding),
        ("/%c0%ae", Utf8),
        ("/%c0%af", Utf8),
        ("/%ff", Utf8),
        ("/%c3/%a9", Utf8),
        ("/%ed%a0%80", Utf8),
        ("/.", DotSegment),
        ("/..", DotSegment),
        ("/a/../b", DotSegment),
        ("/a/%2e%2E/b", DotSegment),
        ("/a/.%2e", DotSegment),
        ("//", EmptySegment),
        ("/a//b", EmptySegment),
        ("//a", EmptySegment),
        ("/a//", EmptySegment),
    ] {
        check(raw, Err(error));
        assert!(error.code().starts_with("path_"));
    }
}

#[test]
fn segments_are_what_stands_between_the_slashes() {
    let segments = |path: &str| {
        let path = CanonicalPath::parse(path).unwrap();
        path.segments().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(segments("/"), [""]);
    assert_eq!(segments("/orders/7"), ["orders", "7"]);
    assert_eq!(segments("/orders/"), ["orders", ""]);
    assert!(segments("*").is_empty());
    assert!(CanonicalPath::parse("*").unwrap().is_asterisk());
    assert!(!CanonicalPath::parse("/*").unwrap().is_asterisk());
}

#[test]
fn a_grpc_path_is_a_service_and_a_method() {
    let grpc = |path: &str| {
        let path = CanonicalPath::parse(path).unwrap();
        path.grpc()
            .map(|(service, method)| format!("{service} {method}"))
    };
    assert_eq!(
        grpc("/shop.v1.Orders/Get").as_deref(),
        Some("shop.v1.Orders Get")
    );
    assert_eq!(grpc("/a/b_1").as_deref(), Some("a b_1"));
    for path in [
        "/", "/a", "/a/", "/a/b/", "/a/b/c", "/a-b/c", "/a/b.c", "/a%20/b", "*",
    ] {
        assert_eq!(grpc(path), None, "{path}");
    }
}

#[test]
fn the_query_is_cut_off_at_the_first_question_mark() {
    assert_eq!(split_target("/a"), ("/a", None));
    assert_eq!(split_target("/a?"), ("/a", Some("")));
    assert_eq!(split_target("/a?b?c#d"), ("/a", Some("b?c#d")));
}

/// What the most obliging application could make of a path.
fn obliging(path: &str) -> String {
    let mut text = path.to_owned();
    for _ in 0..3 {
        text = decode_once(&text);
    }
    let text = text.replace('\\', "/");
    let text = text.split(['\0', '#', '?']).next().unwrap_or_default();
    let mut segments: Vec<&str> = Vec::new();
    for segment in text.split('/') {
        match segment.split(';').next().unwrap_or_default().trim() {
            "" | "." => {}
            ".." => drop(segments.pop()),
            segment => segments.push(segment),
        }
    }
    format!("/{}", segments.join("/"))
}

fn decode_once(text: &str) -> String {
    let mut decoded = Vec::new();
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if bytes[at] == b'%' => {
                decoded.push(byte);
                at += 3;
            }
            _ => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    // The overlong forms that some decoders take for `.` and `/`.
    let text = String::from_utf8_lossy(&decoded).into_owned();
    text.replace("\u{fffd}\u{fffd}", "/")
}

/// Spellings of the denied path that some application takes for it.
fn spellings() -> BTreeSet<String> {
    let mut spellings = BTreeSet::new();
    let encode = |at: usize, upper: bool| {
        let byte = DENIED.as_bytes()[at];
        let hex = if upper {
            format!("%{byte:02X}")
        } else {
            format!("%{byte:02x}")
        };
        format!("{}{hex}{}", &DENIED[..at], &DENIED[at + 1..])
    };
    for at in 1..DENIED.len() {
        spellings.extend([encode(at, false), encode(at, true)]);
        let twice = encode(at, false).replace('%', "%25");
        spellings.extend([twice.clone(), twice.replace("%25", "%2525")]);
        for other in at + 1..DENIED.len() {
            let byte = DENIED.as_bytes()[other];
            let first = encode(at, true);
            let shifted = other + 2;
            spellings.insert(format!(
                "{}%{byte:02x}{}",
                &first[..shifted],
                &first[shifted + 1..]
            ));
        }
    }
    let between = [
        "//",
        "/./",
        "/%2e/",
        "/x/../",
        "/x/%2e%2e/",
        "/x/.%2E/",
        "/%2E/",
        "\\",
        "%5c",
        "%5C",
        "%2f",
        "%2F",
        "%252f",
        "%255c",
        "/;/",
        "/;a=b/",
        ";a/",
        ";/",
        "%3b/",
        "%3B/",
        "/.;/",
        "/x/..;/",
        "///",
        "/\\",
        "/%2f",
        "%2f%2f",
        "/./././",
        "/%c0%ae/",
        "%c0%af",
        "/x/y/../../",
        "/..%2f",
        "/.%00/",
        "/%2e%00/",
    ];
    for first in between {
        for second in between {
            spellings.insert(format!("{first}admin{second}users"));
        }
        for end in [
            "", "/", "//", "/.", "/x/..", ";", ";a", "%00", "%00.css", "#a", "?a", "\\", "%2f",
            "%23",
        ] {
            spellings.insert(format!("/admin{first}users{end}"));
        }
    }
    spellings
}

#[test]
fn no_spelling_of_a_denied_path_passes_as_another_path() {
    let spellings = spellings();
    assert!(spellings.len() >= 500, "{}", spellings.len());
    let (mut recognised, mut refused) = (0, 0);
    for raw in &spellings {
        match CanonicalPath::parse(raw) {
            Err(_) => refused += 1,
            Ok(path) if path.as_str() == DENIED => recognised += 1,
            Ok(path) => {
                // Only a slash at the end is left to the policy: a Deny of `/x` covers `/x/`.
                let trimmed = path.as_str().trim_end_matches('/');
                let is_known = trimmed == DENIED || obliging(path.as_str()) != DENIED;
                assert!(is_known, "{raw} is forwarded as {path}");
            }
        }
    }
    assert!(
        recognised >= 50 && refused >= 1_000,
        "{recognised} {refused}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(5_000) })]

    #[test]
    fn no_text_panics_and_a_canonical_path_stays_itself(raw in "\\PC*|/[a-c%/.;0-9\\\\]{0,12}") {
        if let Ok(path) = CanonicalPath::parse(&raw) {
            prop_assert_eq!(CanonicalPath::parse(path.as_str()), Ok(path.clone()));
            let grpc = path.grpc().is_some();
            prop_assert!(!grpc || path.segments().count() == 2);
        }
    }

    #[test]
    fn what_is_forwarded_decodes_to_what_was_sent(raw in "/[a-c/%:@+0-9\\[A-F]{0,12}") {
        if let Ok(path) = CanonicalPath::parse(&raw) {
            prop_assert_eq!(decode_once(path.as_str()), decode_once(&raw));
        }
    }
}

//! Authorities have one spelling, and all name forms of a service are one name.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "tests"
)]

use proptest::prelude::*;
use sidegate_mesh::{Authority, AuthorityError, TrustDomain, service_of};

#[track_caller]
fn check(text: &str, expected: Result<(&str, Option<u16>), AuthorityError>) {
    let parsed = Authority::parse(text);
    let parsed = parsed
        .as_ref()
        .map(|a| (a.host(), a.port()))
        .map_err(|e| *e);
    assert_eq!(parsed, expected, "{text}");
}

#[test]
fn an_authority_has_one_spelling() {
    check("orders", Ok(("orders", None)));
    check("Orders.SHOP:8080", Ok(("orders.shop", Some(8080))));
    check("orders.shop:80", Ok(("orders.shop", None)));
    check("orders.shop.", Ok(("orders.shop", None)));
    check("orders.shop.:81", Ok(("orders.shop", Some(81))));
    check("127.0.0.1:1", Ok(("127.0.0.1", Some(1))));
    check("[::1]:8080", Ok(("[::1]", Some(8080))));
    check("[0:0::1]", Ok(("[::1]", None)));
    check("a_b.c", Ok(("a_b.c", None)));
    let authority = Authority::parse("orders.shop:80").unwrap();
    assert_eq!(authority.to_string(), "orders.shop");
    assert_eq!(authority.port_or_default(), 80);
}

#[test]
fn an_authority_that_could_be_two_is_refused() {
    use AuthorityError::{Empty, Host, List, Port, UserInfo};
    check("", Err(Empty));
    check(".", Err(Empty));
    check(":80", Err(Empty));
    check("a@b", Err(UserInfo));
    check("a,b", Err(List));
    for host in [
        "a b",
        "a/b",
        "a?b",
        "a#b",
        "a\\b",
        "a%41",
        "-a",
        "a-",
        "a..b",
        ".a",
        "a..",
        "\u{e9}",
        "a\0",
        "a\r\nb",
        "[::1",
        "::1]",
        "[::1]a",
        "[::1]a:80",
        "[]",
        "[::1%eth0]",
        "[127.0.0.1]",
        "a[::1]",
        "a]:80",
        "*",
        "<a>",
    ] {
        check(host, Err(Host));
    }
    check(&"a".repeat(64), Err(Host));
    check(&["a"; 128].join("."), Err(Host));
    for port in [
        "a:", "a:0", "a:080", "a:+1", "a:-1", "a:65536", "a:x", "a:8 0", "[::1]:", "a:80:80", "::1",
    ] {
        assert!(Authority::parse(port).is_err(), "{port}");
    }
    check("a:80:80", Err(Port));
    check("a:", Err(Port));
}

#[test]
fn every_name_form_of_a_service_is_one_name() {
    let own: TrustDomain = "mesh.local".parse().unwrap();
    let service = |host: &str| service_of(host, "web", &own).map(|name| name.to_string());
    assert_eq!(service("orders").as_deref(), Some("orders.web"));
    for host in [
        "orders.shop",
        "orders.shop.",
        "Orders.Shop",
        "orders.shop.svc",
        "orders.shop.svc.cluster.local",
        "orders.shop.svc.cluster.local.",
        "orders.shop.svc.mesh.local",
    ] {
        assert_eq!(service(host).as_deref(), Some("orders.shop"), "{host}");
    }
    for host in [
        "",
        ".",
        "orders.shop.pod",
        "orders.shop.svc.other.local",
        "orders.shop.svc.cluster",
        "orders.shop.svc.",
        "orders.shop.svc.cluster.local.evil",
        "127.0.0.1",
        "[::1]",
        "a_b.shop",
        "orders..svc",
    ] {
        let expected = (host == "orders.shop.svc.").then(|| "orders.shop".to_owned());
        assert_eq!(service(host), expected, "{host}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(5_000) })]

    #[test]
    fn no_text_panics_and_a_canonical_authority_stays_itself(text in "\\PC*|[a-b.:0-9\\[\\]@,-]{0,10}") {
        if let Ok(authority) = Authority::parse(&text) {
            prop_assert_eq!(Authority::parse(&authority.to_string()), Ok(authority.clone()));
            let own: TrustDomain = "mesh.local".parse().unwrap();
            let _ = service_of(authority.host(), "shop", &own);
        }
    }
}

//! What a service account token says of itself, before anybody is asked about it.
//!
//! Nothing here is believed: the signature is the API server's to check. But a token that says of
//! itself that it is for somebody else, or over, is not worth a review.
//!
//! Invariant: pure, and bounded by `TOKEN_BYTES_MAX`.

use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

use crate::authority::unix_seconds;
use crate::kubernetes::attest::Unattested;

/// Longest token that is looked at; Kubernetes' own have about 1,200 bytes.
pub(crate) const TOKEN_BYTES_MAX: usize = 8 * 1024;

#[derive(Deserialize)]
struct Payload {
    aud: Option<Audience>,
    exp: Option<u64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

impl Audience {
    fn names(&self, wanted: &str) -> bool {
        match self {
            Self::One(name) => name == wanted,
            Self::Many(names) => names.iter().any(|name| name == wanted),
        }
    }
}

/// Refuses a token that cannot be meant for us, now.
///
/// # Errors
///
/// [`Unattested`].
pub(crate) fn check(token: &str, audience: &str, now: SystemTime) -> Result<(), Unattested> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(Unattested::Size { bytes: token.len() });
    }
    let payload = payload(token).ok_or(Unattested::Malformed)?;
    // The tokens of Secrets are for ever and for everybody: they have neither end nor audience.
    let (Some(audiences), Some(expires)) = (payload.aud, payload.exp) else {
        return Err(Unattested::Legacy);
    };
    if !audiences.names(audience) {
        return Err(Unattested::Audience {
            expected: audience.to_owned(),
        });
    }
    if expires <= unix_seconds(now) {
        return Err(Unattested::Expired);
    }
    Ok(())
}

fn payload(token: &str) -> Option<Payload> {
    let mut parts = token.split('.');
    let (header, payload, signature) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() || header.is_empty() || signature.is_empty() {
        return None;
    }
    let json = URL_SAFE_NO_PAD.decode(payload).ok()?;
    serde_json::from_slice(&json).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000)
    }

    fn token(payload: &str) -> String {
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(payload))
    }

    #[track_caller]
    fn check_code(token: &str, expected: Result<(), &'static str>) {
        let checked = check(token, "sidegate-ca", now());
        assert_eq!(checked.map_err(|error| error.code()), expected, "{token}");
    }

    #[test]
    fn a_token_for_us_and_in_date_is_worth_a_review() {
        check_code(&token(r#"{"aud":["sidegate-ca"],"exp":1001}"#), Ok(()));
        check_code(&token(r#"{"aud":"sidegate-ca","exp":1001,"x":{}}"#), Ok(()));
        let both = token(r#"{"aud":["https://api","sidegate-ca"],"exp":1001}"#);
        check_code(&both, Ok(()));
    }

    #[test]
    fn what_is_for_others_or_over_is_refused_unasked() {
        let api = token(r#"{"aud":["https://kubernetes.default.svc"],"exp":1001}"#);
        check_code(&api, Err("token_audience"));
        check_code(
            &token(r#"{"aud":["sidegate-ca "],"exp":1001}"#),
            Err("token_audience"),
        );
        check_code(&token(r#"{"aud":[],"exp":1001}"#), Err("token_audience"));
        check_code(
            &token(r#"{"aud":["sidegate-ca"],"exp":1000}"#),
            Err("token_expired"),
        );
    }

    #[test]
    fn the_token_of_a_secret_is_known_by_what_it_lacks() {
        let legacy = r#"{"iss":"kubernetes/serviceaccount","sub":"system:serviceaccount:a:b"}"#;
        check_code(&token(legacy), Err("token_legacy"));
        check_code(&token(r#"{"aud":["sidegate-ca"]}"#), Err("token_legacy"));
        check_code(&token(r#"{"exp":1001}"#), Err("token_legacy"));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let good = token(r#"{"aud":"sidegate-ca","exp":1001}"#);
        for text in [
            "",
            "..",
            "a.b",
            "e30.!.x",
            &format!("{good}.x"),
            &token("[]"),
            &token(r#"{"aud":"sidegate-ca","exp":-1}"#),
            &token(r#"{"aud":"sidegate-ca","exp":"never"}"#),
        ] {
            check_code(text, Err("token_malformed"));
        }
        let long = format!("{good}{}", "x".repeat(TOKEN_BYTES_MAX));
        check_code(&long, Err("token_size"));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,300}", payload in "\\PC{0,200}") {
            let refused = check(&text, "sidegate-ca", now()).is_err();
            prop_assert!(refused);
            let _any = check(&token(&payload), "sidegate-ca", now());
        }
    }
}

//! SPIFFE IDs: who a workload is.
//!
//! Invariant: a [`SpiffeId`] or [`TrustDomain`] that exists is valid under the SPIFFE-ID
//! specification, §2, and is compared byte for byte.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest SPIFFE ID that is accepted or made, in bytes (SPIFFE-ID §2.3).
pub const SPIFFE_ID_BYTES_MAX: usize = 2048;

/// Longest trust domain name, in bytes (SPIFFE-ID §2.1).
pub const TRUST_DOMAIN_BYTES_MAX: usize = 255;

const SCHEME: &str = "spiffe://";

/// Why a text is not a SPIFFE ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// The scheme is not exactly `spiffe://`.
    #[error("a SPIFFE ID starts with `spiffe://`, in lower case")]
    Scheme,
    /// The trust domain is empty, too long, or has a character outside `[a-z0-9._-]`.
    #[error("a trust domain is 1 to 255 characters of a-z, 0-9, `.`, `-` and `_`")]
    TrustDomain,
    /// A path segment is empty, `.` or `..`, or the path ends with `/`.
    #[error("a path segment must not be empty, `.` or `..`")]
    PathSegment,
    /// The path has a character outside `[a-zA-Z0-9._-]`.
    #[error("a path segment has only a-z, A-Z, 0-9, `.`, `-` and `_`")]
    PathCharacter,
    /// The whole ID exceeds [`SPIFFE_ID_BYTES_MAX`].
    #[error("a SPIFFE ID has at most 2048 bytes")]
    TooLong,
}

/// A trust domain name, such as `cluster.local`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The name, without a scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The trust domain's own ID, without a path: what a signing certificate carries.
    pub fn id(&self) -> SpiffeId {
        SpiffeId {
            text: format!("{SCHEME}{}", self.0).into(),
            path_at: SCHEME.len() + self.0.len(),
        }
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        check_trust_domain(name)?;
        Ok(Self(name.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A SPIFFE ID, such as `spiffe://cluster.local/ns/shop/sa/web`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: Arc<str>,
    /// Where the path starts; the text's length when there is none.
    path_at: usize,
}

impl SpiffeId {
    /// The identity of a service account: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
    ///
    /// # Errors
    ///
    /// [`SpiffeIdError`] when a name is empty or has a character that a path segment may not have.
    pub fn for_workload(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeIdError> {
        check_segment(namespace)?;
        check_segment(service_account)?;
        format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The whole ID.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The whole ID, shared.
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        self.text
            .get(SCHEME.len()..self.path_at)
            .unwrap_or_default()
    }

    /// The path with its leading `/`; empty for a trust domain's own ID.
    pub fn path(&self) -> &str {
        self.text.get(self.path_at..).unwrap_or_default()
    }

    /// Namespace and service account when the path is `/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
    pub fn workload(&self) -> Option<(&str, &str)> {
        let (namespace, rest) = self.path().strip_prefix("/ns/")?.split_once('/')?;
        let service_account = rest.strip_prefix("sa/")?;
        (!service_account.contains('/')).then_some((namespace, service_account))
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > SPIFFE_ID_BYTES_MAX {
            return Err(SpiffeIdError::TooLong);
        }
        let rest = text.strip_prefix(SCHEME).ok_or(SpiffeIdError::Scheme)?;
        let (trust_domain, path) = match rest.split_once('/') {
            Some((trust_domain, path)) => (trust_domain, Some(path)),
            None => (rest, None),
        };
        check_trust_domain(trust_domain)?;
        if let Some(path) = path {
            path.split('/').try_for_each(check_segment)?;
        }
        Ok(Self {
            text: text.into(),
            path_at: SCHEME.len() + trust_domain.len(),
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for SpiffeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for SpiffeId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

impl Serialize for TrustDomain {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for TrustDomain {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

fn check_trust_domain(name: &str) -> Result<(), SpiffeIdError> {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
    if name.is_empty() || name.len() > TRUST_DOMAIN_BYTES_MAX || !name.bytes().all(allowed) {
        return Err(SpiffeIdError::TrustDomain);
    }
    Ok(())
}

fn check_segment(segment: &str) -> Result<(), SpiffeIdError> {
    if matches!(segment, "" | "." | "..") {
        return Err(SpiffeIdError::PathSegment);
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    if segment.bytes().all(allowed) {
        Ok(())
    } else {
        Err(SpiffeIdError::PathCharacter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Result<(), SpiffeIdError>) {
        assert_eq!(text.parse::<SpiffeId>().map(drop), expected, "{text}");
    }

    #[test]
    fn a_workload_id_is_taken_apart() {
        let id: SpiffeId = "spiffe://mesh.local/ns/shop/sa/web".parse().unwrap();
        assert_eq!(id.trust_domain(), "mesh.local");
        assert_eq!(id.path(), "/ns/shop/sa/web");
        assert_eq!(id.workload(), Some(("shop", "web")));
    }

    #[test]
    fn what_the_specification_allows_is_accepted() {
        check("spiffe://a", Ok(()));
        check("spiffe://a_b-c.9/A/b.c/_", Ok(()));
        let longest = format!("spiffe://a/{}", "x".repeat(SPIFFE_ID_BYTES_MAX - 11));
        check(&longest, Ok(()));
        check(&format!("{longest}x"), Err(SpiffeIdError::TooLong));
        check(&format!("spiffe://{}/x", "a".repeat(255)), Ok(()));
    }

    #[test]
    fn what_the_specification_forbids_is_refused() {
        use SpiffeIdError::{PathCharacter, PathSegment, Scheme, TrustDomain};
        check("", Err(Scheme));
        check("http://a/b", Err(Scheme));
        check("SPIFFE://a/b", Err(Scheme));
        check("spiffe:/a/b", Err(Scheme));
        check("spiffe://", Err(TrustDomain));
        check("spiffe:///b", Err(TrustDomain));
        check("spiffe://A/b", Err(TrustDomain));
        check("spiffe://u@a/b", Err(TrustDomain));
        check("spiffe://a:80/b", Err(TrustDomain));
        check("spiffe://a%61/b", Err(TrustDomain));
        check("spiffe://a?q", Err(TrustDomain));
        check(&format!("spiffe://{}/x", "a".repeat(256)), Err(TrustDomain));
        check("spiffe://a/", Err(PathSegment));
        check("spiffe://a/b/", Err(PathSegment));
        check("spiffe://a//b", Err(PathSegment));
        check("spiffe://a/./b", Err(PathSegment));
        check("spiffe://a/../b", Err(PathSegment));
        check("spiffe://a/b?q", Err(PathCharacter));
        check("spiffe://a/b#f", Err(PathCharacter));
        check("spiffe://a/%62", Err(PathCharacter));
        check("spiffe://a/\u{e9}", Err(PathCharacter));
        check("spiffe://a/b\0", Err(PathCharacter));
    }

    #[test]
    fn an_id_of_another_shape_names_no_workload() {
        for text in [
            "spiffe://a",
            "spiffe://a/ns/x",
            "spiffe://a/ns/x/sa/y/z",
            "spiffe://a/x/ns",
        ] {
            assert_eq!(text.parse::<SpiffeId>().unwrap().workload(), None, "{text}");
        }
    }

    #[test]
    fn a_workload_name_cannot_smuggle_a_segment() {
        let trust_domain: TrustDomain = "mesh.local".parse().unwrap();
        assert!(SpiffeId::for_workload(&trust_domain, "shop/sa/web", "x").is_err());
        assert!(SpiffeId::for_workload(&trust_domain, "shop", "").is_err());
    }
}

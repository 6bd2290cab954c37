//! Names in resources: of namespaces, service accounts, services, labels, rules.
//!
//! Invariant: a name that was read is one that Kubernetes and SPIFFE accept too, so that a file
//! that works in a folder works with `kubectl apply`.

use std::collections::BTreeMap;

use serde::de::{self, Deserialize, Deserializer};

use super::problem::Invalid;
use super::value::check_port_name;
use crate::host::is_dns_label;
use crate::spiffe::SpiffeId;

/// Longest DNS subdomain.
const SUBDOMAIN_BYTES_MAX: usize = 253;
/// Longest name of a rule.
const RULE_NAME_CHARS_MAX: usize = 63;
/// Longest name of a gRPC service or method.
pub(super) const GRPC_NAME_BYTES_MAX: usize = 255;
/// Most bytes of all annotations together, as in Kubernetes.
const ANNOTATIONS_BYTES_MAX: usize = 256 * 1024;

const LABEL_HELP: &str =
    "write 1 to 63 characters of a-z, 0-9 and `-`, neither starting nor ending with `-`";

/// Reads a namespace's name.
pub(super) fn namespace<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked(deserializer, |name| dns_label("namespace", name))
}

/// Reads a namespace's name that may be absent, but not empty.
pub(super) fn optional_namespace<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    namespace(deserializer).map(Some)
}

/// Reads a resource's name.
pub(super) fn resource<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked(deserializer, |name| dns_label("resource", name))
}

/// Reads the name of a service of the same namespace.
pub(super) fn service<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked(deserializer, |name| {
        if let Some((first, _)) = name.split_once('.')
            && is_dns_label(first)
        {
            return Err(Invalid::new(
                format!("`{name}` is not the name of a service of this namespace"),
                format!("write `{first}`, in a policy of the service's own namespace"),
            ));
        }
        dns_label("service", name)
    })
}

/// Reads a service account's name.
pub(super) fn service_account<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<String, D::Error> {
    checked(deserializer, |name| {
        if is_dns_subdomain(name) {
            return Ok(());
        }
        if name.contains('*') {
            return Err(Invalid::new(
                format!("`{name}` is a pattern, and identities match exactly"),
                "write each service account, or `namespace: { name: … }` for all of one namespace",
            ));
        }
        if name.starts_with("spiffe://") {
            return Err(Invalid::new(
                format!("`{name}` is not the name of a service account"),
                format!("write `spiffeId: {{ id: \"{name}\" }}`"),
            ));
        }
        Err(Invalid::new(
            format!("`{name}` is not the name of a service account"),
            "write labels of a-z, 0-9 and `-`, with dots between them",
        ))
    })
}

/// Reads the identity of a workload: a SPIFFE ID with a path.
pub(super) fn workload_id<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<SpiffeId, D::Error> {
    let text = String::deserialize(deserializer)?;
    let id: SpiffeId = text.parse().map_err(|error| {
        de::Error::custom(Invalid::new(
            format!("`{text}` is not a SPIFFE ID: {error}"),
            "write one such as \"spiffe://mesh.local/ns/shop/sa/web\", exactly and without a pattern",
        ))
    })?;
    if id.path().is_empty() {
        return Err(de::Error::custom(Invalid::new(
            format!("`{text}` is a trust domain's own ID, which no workload has"),
            format!("write the workload's path too, such as \"{text}/ns/shop/sa/web\""),
        )));
    }
    Ok(id)
}

/// Reads a rule's name.
pub(super) fn rule<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let name = checked(deserializer, |name| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let length = name.chars().count();
        if (1..=RULE_NAME_CHARS_MAX).contains(&length) && name.chars().all(allowed) {
            return Ok(());
        }
        Err(Invalid::new(
            format!("`{name}` is not a rule's name"),
            "write 1 to 63 characters of a-z, A-Z, 0-9, `-`, `_` and `.`",
        ))
    })?;
    Ok(Some(name))
}

/// Reads a port's name that may be absent, but not empty.
pub(super) fn optional_port<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    checked(deserializer, check_port_name).map(Some)
}

/// Reads a gRPC service's full name.
pub(super) fn grpc_service<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked(deserializer, check_grpc_service)
}

/// Checks a gRPC service's full name, `shop.v1.Orders`.
pub(super) fn check_grpc_service(name: &str) -> Result<(), Invalid> {
    if name.len() <= GRPC_NAME_BYTES_MAX && name.split('.').all(is_proto_identifier) {
        return Ok(());
    }
    Err(Invalid::new(
        format!("`{name}` is not the full name of a gRPC service"),
        "write package and service, such as `shop.v1.Orders`",
    ))
}

/// Whether a text is an identifier of the protobuf language.
pub(super) fn is_proto_identifier(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.bytes().all(allowed)
        && text
            .bytes()
            .next()
            .is_some_and(|byte| !byte.is_ascii_digit())
}

/// Reads `metadata.labels`.
pub(super) fn labels<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    let labels = BTreeMap::<LabelKey, LabelValue>::deserialize(deserializer)?;
    Ok(labels
        .into_iter()
        .map(|(key, value)| (key.0, value.0))
        .collect())
}

/// Reads `matchLabels`: an empty one would say "all" where somebody meant to choose.
pub(super) fn match_labels<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    let labels = labels(deserializer)?;
    if labels.is_empty() {
        return Err(de::Error::custom(Invalid::new(
            "`matchLabels` is empty",
            "name at least one label, or write `{}` in place of the whole selector to choose all",
        )));
    }
    Ok(labels)
}

/// Reads `metadata.annotations`.
pub(super) fn annotations<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    let annotations = BTreeMap::<LabelKey, String>::deserialize(deserializer)?;
    let bytes = |(key, value): (&LabelKey, &String)| key.0.len() + value.len();
    if annotations.iter().map(bytes).sum::<usize>() > ANNOTATIONS_BYTES_MAX {
        return Err(de::Error::custom(Invalid::new(
            "the annotations have more than 256 KiB",
            "remove some",
        )));
    }
    Ok(annotations
        .into_iter()
        .map(|(key, value)| (key.0, value))
        .collect())
}

/// A label's or annotation's key: `app` or `app.kubernetes.io/name`.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct LabelKey(String);

impl<'de> Deserialize<'de> for LabelKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let key = |text: &str| {
            let (prefix, name) = match text.split_once('/') {
                Some((prefix, name)) => (Some(prefix), name),
                None => (None, text),
            };
            if prefix.is_none_or(is_dns_subdomain) && is_label_text(name) {
                return Ok(());
            }
            Err(Invalid::new(
                format!("`{text}` is not a label's key"),
                "write 1 to 63 letters, digits, `-`, `_` and `.`, optionally after a domain and `/`",
            ))
        };
        checked(deserializer, key).map(Self)
    }
}

/// A label's value.
struct LabelValue(String);

impl<'de> Deserialize<'de> for LabelValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = |text: &str| {
            if text.is_empty() || is_label_text(text) {
                return Ok(());
            }
            Err(Invalid::new(
                format!("`{text}` is not a label's value"),
                "write at most 63 letters, digits, `-`, `_` and `.`, the first and last no sign",
            ))
        };
        checked(deserializer, value).map(Self)
    }
}

fn is_label_text(text: &str) -> bool {
    let sign = |byte: u8| matches!(byte, b'-' | b'_' | b'.');
    let letter = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    (1..=63).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || sign(byte))
        && letter(text.bytes().next())
        && letter(text.bytes().next_back())
}

/// Whether a text is a DNS subdomain as Kubernetes has it: labels with dots between them.
fn is_dns_subdomain(text: &str) -> bool {
    let is_part = |part: &str| {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !part.is_empty()
            && part.bytes().all(allowed)
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    text.len() <= SUBDOMAIN_BYTES_MAX && text.split('.').all(is_part)
}

fn dns_label(what: &str, name: &str) -> Result<(), Invalid> {
    if is_dns_label(name) {
        return Ok(());
    }
    Err(Invalid::new(
        format!("`{name}` is not a {what}'s name"),
        LABEL_HELP,
    ))
}

/// Reads a text and checks it while its place in the document is known.
fn checked<'de, D: Deserializer<'de>>(
    deserializer: D,
    check: impl FnOnce(&str) -> Result<(), Invalid>,
) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    check(&text).map_err(de::Error::custom)?;
    Ok(text)
}

//! Lists in resources.
//!
//! Invariant: a list that decides something is never empty, because an empty list reads as
//! "nothing" to one and as "everything" to another; and no list is unbounded.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, SeqAccess, Visitor};

use super::authorization::{Rule, Source, Target, Upgrade};
use super::name::{check_grpc_service, is_proto_identifier};
use super::pattern::PathPattern;
use super::problem::Invalid;
use super::static_service::{ServiceEndpoint, ServicePort};
use super::traffic::{GrpcRetryCode, RetryCondition};
use super::value::PortRef;
use super::{RULES_PER_POLICY_MAX, name::GRPC_NAME_BYTES_MAX};
use crate::host::Authority;

/// Most entries of a list of callers, calls, methods, paths, hosts or ports.
const ENTRIES_MAX: usize = 1_000;
/// Most endpoints of a service.
const ENDPOINTS_MAX: usize = 10_000;
/// Longest HTTP method.
const METHOD_BYTES_MAX: usize = 32;

/// Reads `ports` of a policy.
pub(super) fn ports<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Vec<PortRef>>, D::Error> {
    let help = "name at least one port, or remove the field to cover every port";
    filled(d, help, ENTRIES_MAX, Ok).map(Some)
}

/// Reads `rules`.
pub(super) fn rules<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Rule>, D::Error> {
    let help = "write at least one rule; what no rule allows is denied without a policy too";
    filled(d, help, RULES_PER_POLICY_MAX, Ok)
}

/// Reads `from`.
pub(super) fn sources<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Source>, D::Error> {
    let help = "name at least one caller, or write `[{ anyone: {} }]` for any identity of the mesh";
    filled(d, help, ENTRIES_MAX, Ok)
}

/// Reads `to`.
pub(super) fn targets<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Target>, D::Error> {
    let help = "name at least one call, or write `[{ anything: {} }]` for all of them";
    filled(d, help, ENTRIES_MAX, Ok)
}

/// Reads HTTP methods, or `["*"]`.
pub(super) fn http_methods<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let help = "name at least one method, or write `[\"*\"]` for every method";
    let methods = filled(d, help, ENTRIES_MAX, |method: String| {
        if method != "*" {
            check_http_method(&method)?;
        }
        Ok(method)
    })?;
    alone(methods)
}

/// Reads the HTTP methods that may be tried again; there is no `*`.
pub(super) fn retry_methods<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let help = "name at least one method, such as `[GET, HEAD]`";
    filled(d, help, ENTRIES_MAX, |method: String| {
        check_http_method(&method)?;
        Ok(method)
    })
}

/// Reads methods of a gRPC service, or `["*"]`.
pub(super) fn grpc_methods<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let help = "name at least one method, or write `[\"*\"]` for every method";
    let methods = filled(d, help, ENTRIES_MAX, |method: String| {
        if method != "*" && !is_grpc_method(&method) {
            return Err(Invalid::new(
                format!("`{method}` is not the name of a gRPC method"),
                "write it as in the .proto file, without its service, such as `Get`",
            ));
        }
        Ok(method)
    })?;
    alone(methods)
}

/// Reads full names of gRPC methods.
pub(super) fn grpc_full_methods<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let help = "name at least one method, such as `shop.v1.Orders/Get`";
    filled(d, help, ENTRIES_MAX, |full: String| {
        let parts = full.split_once('/');
        let is_full =
            |(service, method)| check_grpc_service(service).is_ok() && is_grpc_method(method);
        if parts.is_some_and(is_full) {
            return Ok(full);
        }
        Err(Invalid::new(
            format!("`{full}` is not the full name of a gRPC method"),
            "write service and method, such as `shop.v1.Orders/Get`",
        ))
    })
}

/// Reads `paths`.
pub(super) fn paths<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<PathPattern>, D::Error> {
    let help = "name at least one path, or write `[\"/**\"]` for every path";
    filled(d, help, ENTRIES_MAX, Ok)
}

/// Reads `hosts`.
pub(super) fn hosts<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Vec<String>>, D::Error> {
    let help = "name at least one host, or remove the field to accept any";
    let hosts = filled(
        d,
        help,
        ENTRIES_MAX,
        |host: String| match Authority::parse(&host) {
            Ok(_) => Ok(host),
            Err(_) if host.contains('*') => Err(Invalid::new(
                format!("`{host}` is a pattern, and hosts match exactly"),
                "write each host, such as `orders.shop`",
            )),
            Err(error) => Err(Invalid::new(
                format!("`{host}` is not a host: {error}"),
                "write one such as `orders.shop`, with or without a port",
            )),
        },
    )?;
    Ok(Some(hosts))
}

/// Reads `upgrades`.
pub(super) fn upgrades<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Upgrade>, D::Error> {
    let help = "write `[websocket]`, or remove the field to allow no upgrade";
    filled(d, help, ENTRIES_MAX, Ok)
}

/// Reads `ports` of a service.
pub(super) fn service_ports<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<ServicePort>, D::Error> {
    let help = "write at least one port, such as `[{ name: http, port: 80 }]`";
    filled(d, help, ENTRIES_MAX, Ok)
}

/// Reads `endpoints`, which may be empty.
pub(super) fn endpoints<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<ServiceEndpoint>, D::Error> {
    bounded(d, ENDPOINTS_MAX, Ok)
}

/// Reads `conditions` of a retry.
pub(super) fn retry_conditions<'de, D: Deserializer<'de>>(
    d: D,
) -> Result<Vec<RetryCondition>, D::Error> {
    let help = "name at least one, such as `[connect-failure]`, or remove the whole retry";
    filled(d, help, ENTRIES_MAX, Ok)
}

/// Reads `codes` of a gRPC retry.
pub(super) fn grpc_codes<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<GrpcRetryCode>, D::Error> {
    let help = "name at least one, such as `[unavailable]`, or remove the whole retry";
    filled(d, help, ENTRIES_MAX, Ok)
}

fn check_http_method(method: &str) -> Result<(), Invalid> {
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    let is_method = (1..=METHOD_BYTES_MAX).contains(&method.len())
        && method.bytes().all(token)
        && !method.contains('*');
    if !is_method {
        return Err(Invalid::new(
            format!("`{method}` is not an HTTP method"),
            "write one such as `GET`, or `[\"*\"]` as the whole list for every method",
        ));
    }
    if method.bytes().any(|byte| byte.is_ascii_lowercase()) {
        return Err(Invalid::new(
            format!("methods are upper case, and `{method}` is not"),
            format!("write `{}`", method.to_ascii_uppercase()),
        ));
    }
    Ok(())
}

fn is_grpc_method(method: &str) -> bool {
    method.len() <= GRPC_NAME_BYTES_MAX && is_proto_identifier(method)
}

/// Refuses a `*` beside names, which would make them meaningless.
fn alone<E: de::Error>(methods: Vec<String>) -> Result<Vec<String>, E> {
    if methods.len() > 1 && methods.iter().any(|method| method == "*") {
        return Err(E::custom(Invalid::new(
            "`*` stands beside other methods, although it is all of them",
            "write `[\"*\"]`, or only the names",
        )));
    }
    Ok(methods)
}

/// Reads a list with at least one entry.
fn filled<'de, D, T, R>(
    deserializer: D,
    help_if_empty: &str,
    max: usize,
    check: impl Fn(T) -> Result<R, Invalid>,
) -> Result<Vec<R>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let entries = bounded(deserializer, max, check)?;
    if entries.is_empty() {
        return Err(de::Error::custom(Invalid::new(
            "the list is empty",
            help_if_empty,
        )));
    }
    Ok(entries)
}

/// Reads a list of at most `max` entries and checks each while its place is known.
fn bounded<'de, D, T, R>(
    deserializer: D,
    max: usize,
    check: impl Fn(T) -> Result<R, Invalid>,
) -> Result<Vec<R>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    deserializer.deserialize_seq(List {
        max,
        check,
        entry: PhantomData,
    })
}

struct List<T, F> {
    max: usize,
    check: F,
    entry: PhantomData<T>,
}

impl<'de, T, R, F> Visitor<'de> for List<T, F>
where
    T: Deserialize<'de>,
    F: Fn(T) -> Result<R, Invalid>,
{
    type Value = Vec<R>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Vec<R>, A::Error> {
        let mut list = Vec::new();
        while let Some(entry) = entries.next_element_seed(Entry {
            check: &self.check,
            entry: PhantomData,
        })? {
            if list.len() == self.max {
                return Err(de::Error::custom(Invalid::new(
                    format!("the list has more than {} entries", self.max),
                    "write several resources",
                )));
            }
            list.push(entry);
        }
        Ok(list)
    }
}

struct Entry<'a, T, F> {
    check: &'a F,
    entry: PhantomData<T>,
}

impl<'de, T, R, F> DeserializeSeed<'de> for Entry<'_, T, F>
where
    T: Deserialize<'de>,
    F: Fn(T) -> Result<R, Invalid>,
{
    type Value = R;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<R, D::Error> {
        let entry = T::deserialize(deserializer)?;
        (self.check)(entry).map_err(de::Error::custom)
    }
}

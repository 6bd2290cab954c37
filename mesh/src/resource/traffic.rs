//! `TrafficPolicy`: how callers call a service.
//!
//! Invariant: everything in it is bounded, and nothing is retried that the policy does not name.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Metadata, Percent, list, name, schema, value};

/// How callers call a service; one per service, in the service's namespace.
#[derive(Clone, Debug, PartialEq)]
pub struct TrafficPolicy {
    /// Its name and namespace.
    pub metadata: Metadata,
    /// What it says.
    pub spec: TrafficPolicySpec,
}

/// The `spec` of a `TrafficPolicy`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct TrafficPolicySpec {
    /// The service, of the policy's own namespace.
    #[serde(deserialize_with = "name::service")]
    #[schemars(schema_with = "schema::dns_label")]
    pub service: String,
    /// Longest time of a whole call until its response's head, for example `2s`.
    #[serde(
        default,
        with = "value::optional_duration",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(schema_with = "schema::duration")]
    pub timeout: Option<Duration>,
    /// When an HTTP request is tried again; absent: never.
    #[serde(
        default,
        deserialize_with = "value::some",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(with = "Retry")]
    pub retry: Option<Retry>,
    /// When a gRPC call is tried again; absent: never.
    #[serde(
        default,
        deserialize_with = "value::some",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(with = "GrpcRetry")]
    pub grpc_retry: Option<GrpcRetry>,
    /// When an endpoint is left out for a while; absent: only while it refuses connections.
    #[serde(
        default,
        deserialize_with = "value::some",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(with = "OutlierEjection")]
    pub outlier_ejection: Option<OutlierEjection>,
    /// How an endpoint is chosen.
    #[serde(
        default,
        deserialize_with = "value::some",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(with = "LoadBalancing")]
    pub load_balancing: Option<LoadBalancing>,
}

/// When an HTTP request is tried again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Retry {
    /// How often it is tried again, at most; 1 to 10.
    #[serde(deserialize_with = "value::attempts")]
    #[schemars(range(min = 1, max = 10))]
    pub attempts: u32,
    /// After which failures, any of them.
    #[serde(deserialize_with = "list::retry_conditions")]
    #[schemars(length(min = 1))]
    pub conditions: Vec<RetryCondition>,
    /// Which methods, in upper case.
    #[serde(deserialize_with = "list::retry_methods")]
    #[schemars(length(min = 1, max = 1_000))]
    pub methods: Vec<String>,
    /// Longest time of one try, for example `500ms`.
    #[serde(
        default,
        with = "value::optional_duration",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(schema_with = "schema::duration")]
    pub per_try_timeout: Option<Duration>,
    /// Retries as a share of requests, at most.
    #[serde(default = "default_budget")]
    pub budget: Percent,
}

/// A failure after which a request may be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum RetryCondition {
    /// No connection could be made: the request was never sent.
    #[serde(rename = "connect-failure")]
    ConnectFailure,
    /// The endpoint refused the stream before it looked at the request.
    #[serde(rename = "refused-stream")]
    RefusedStream,
    /// The connection or stream was reset before the response's head.
    #[serde(rename = "reset")]
    Reset,
    /// The try took longer than `perTryTimeout`.
    #[serde(rename = "timeout")]
    Timeout,
    /// Any status from 500 to 599.
    #[serde(rename = "5xx")]
    ServerError,
    /// 502, 503 or 504.
    #[serde(rename = "gateway-error")]
    GatewayError,
}

/// When a gRPC call is tried again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct GrpcRetry {
    /// How often it is tried again, at most; 1 to 10.
    #[serde(deserialize_with = "value::attempts")]
    #[schemars(range(min = 1, max = 10))]
    pub attempts: u32,
    /// After which status codes, any of them.
    #[serde(deserialize_with = "list::grpc_codes")]
    #[schemars(length(min = 1))]
    pub codes: Vec<GrpcRetryCode>,
    /// Which methods by full name: `shop.v1.Orders/Get`.
    #[serde(deserialize_with = "list::grpc_full_methods")]
    #[schemars(length(min = 1, max = 1_000))]
    pub methods: Vec<String>,
    /// Longest time of one try, for example `500ms`.
    #[serde(
        default,
        with = "value::optional_duration",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(schema_with = "schema::duration")]
    pub per_try_timeout: Option<Duration>,
    /// Retries as a share of calls, at most.
    #[serde(default = "default_budget")]
    pub budget: Percent,
}

/// A gRPC status after which a call may be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GrpcRetryCode {
    /// 1
    Cancelled,
    /// 4
    DeadlineExceeded,
    /// 8
    ResourceExhausted,
    /// 10
    Aborted,
    /// 13
    Internal,
    /// 14
    Unavailable,
}

impl GrpcRetryCode {
    /// The number in `grpc-status`.
    pub fn number(self) -> u32 {
        match self {
            Self::Cancelled => 1,
            Self::DeadlineExceeded => 4,
            Self::ResourceExhausted => 8,
            Self::Aborted => 10,
            Self::Internal => 13,
            Self::Unavailable => 14,
        }
    }
}

/// When an endpoint that fails is left out for a while.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct OutlierEjection {
    /// How many failures one after the other; 1 to 1000.
    #[serde(deserialize_with = "value::consecutive_failures")]
    #[schemars(range(min = 1, max = 1_000))]
    pub consecutive_failures: u32,
    /// How long it is left out.
    #[serde(default = "default_ejection", with = "value::duration")]
    #[schemars(schema_with = "schema::duration")]
    pub duration: Duration,
    /// Largest share of a service's endpoints that are left out at once.
    #[serde(default = "default_max_ejected")]
    pub max_ejected: Percent,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct LoadBalancing {
    /// The rule.
    #[serde(default)]
    pub policy: BalancingPolicy,
    /// Whether endpoints of the caller's own zone come first.
    #[serde(default)]
    pub prefer_zone: bool,
}

/// The rule by which an endpoint is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum BalancingPolicy {
    /// The better of two random endpoints by a peak-sensitive moving average of latency.
    #[default]
    #[serde(rename = "p2c-ewma")]
    P2cEwma,
}

fn default_budget() -> Percent {
    Percent::DEFAULT_BUDGET
}

fn default_ejection() -> Duration {
    Duration::from_secs(10)
}

fn default_max_ejected() -> Percent {
    Percent::HALF
}

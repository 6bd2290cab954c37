//! A line of the log, as it is read again.

use serde::{Deserialize, Serialize};

/// One line of the access log. Fields that this version does not know are passed over, and those
/// that it does may all be missing, so that the lines of other versions can be read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the fields of `Record`, by the same names")]
pub struct Line {
    pub kind: Option<String>,
    pub time: Option<String>,
    pub duration_ms: Option<f64>,
    pub upstream_ms: Option<f64>,
    pub direction: Option<String>,
    pub protocol: Option<String>,
    pub source: Option<String>,
    pub destination: Option<String>,
    pub destination_service: Option<String>,
    pub source_address: Option<String>,
    pub destination_address: Option<String>,
    pub method: Option<String>,
    pub authority: Option<String>,
    pub path: Option<String>,
    pub query: bool,
    pub grpc_service: Option<String>,
    pub grpc_method: Option<String>,
    pub grpc_status: Option<u32>,
    pub grpc_message: Option<String>,
    pub status: Option<u16>,
    pub decision: Option<String>,
    pub policy: Option<String>,
    pub rule: Option<String>,
    pub reason: Option<String>,
    pub decision_id: Option<String>,
    pub audit: Option<String>,
    pub request_bytes: Option<u64>,
    pub response_bytes: Option<u64>,
    pub error: Option<String>,
    pub flags: Vec<String>,
    pub attempts: Option<u32>,
    pub tls_version: Option<String>,
    pub snapshot: Option<u64>,
    pub request_id: Option<String>,
    pub trace_id: Option<String>,
    pub user_agent: Option<String>,
    /// How many calls an aggregated line stands for.
    pub count: Option<u64>,
    /// Start of the last of them.
    pub last_time: Option<String>,
    /// What a diagnostic says.
    pub message: Option<String>,
    /// How bad it is.
    pub level: Option<String>,
}

impl Line {
    /// Reads one line.
    ///
    /// # Errors
    ///
    /// When it is no JSON object, or a known field has another type.
    pub fn parse(line: &str) -> serde_json::Result<Self> {
        // serde would also take a list of the fields' values.
        if !line.trim_start().starts_with('{') {
            return Err(serde::de::Error::custom("not a JSON object"));
        }
        serde_json::from_str(line)
    }

    /// Whether it tells of a call, not of the sidecar itself.
    pub fn is_access(&self) -> bool {
        self.kind.as_deref() == Some("access")
    }

    /// How many calls it stands for.
    pub fn calls(&self) -> u64 {
        self.count.unwrap_or(1)
    }

    /// The start of the call.
    pub fn at(&self) -> Option<time::OffsetDateTime> {
        let format = &time::format_description::well_known::Rfc3339;
        time::OffsetDateTime::parse(self.time.as_deref()?, format).ok()
    }

    /// The code of gRPC that says the same as a code's number: `OK`, `PERMISSION_DENIED` …
    pub fn grpc_code(status: u32) -> &'static str {
        match status {
            0 => "OK",
            1 => "CANCELLED",
            2 => "UNKNOWN",
            3 => "INVALID_ARGUMENT",
            4 => "DEADLINE_EXCEEDED",
            5 => "NOT_FOUND",
            6 => "ALREADY_EXISTS",
            7 => "PERMISSION_DENIED",
            8 => "RESOURCE_EXHAUSTED",
            9 => "FAILED_PRECONDITION",
            10 => "ABORTED",
            11 => "OUT_OF_RANGE",
            12 => "UNIMPLEMENTED",
            13 => "INTERNAL",
            14 => "UNAVAILABLE",
            15 => "DATA_LOSS",
            16 => "UNAUTHENTICATED",
            _ => "INVALID",
        }
    }

    /// Whether the call failed: refused, a server's error, a gRPC status other than OK, or cut off.
    pub fn failed(&self) -> bool {
        self.error.is_some()
            || self.status.is_some_and(|status| status >= 500)
            || self.grpc_status.is_some_and(|status| status != 0)
            || self.decision.as_deref() == Some("deny")
            || self.flags.iter().any(|flag| flag == "cut_off")
    }
}

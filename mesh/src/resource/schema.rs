//! The JSON Schema of the resources, for editors and for the cluster's API server.
//!
//! Invariant: what the strict parser accepts, the schema accepts; the parser refuses more.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use super::{
    API_VERSION, AuthorizationPolicySpec, Kind, Metadata, StaticServiceSpec, TrafficPolicySpec,
};

const DNS_LABEL: &str = "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$";

/// The schema of a whole document of one kind.
pub(super) fn of(kind: Kind) -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let spec = match kind {
        Kind::AuthorizationPolicy => generator.subschema_for::<AuthorizationPolicySpec>(),
        Kind::StaticService => generator.subschema_for::<StaticServiceSpec>(),
        Kind::TrafficPolicy => generator.subschema_for::<TrafficPolicySpec>(),
    };
    let metadata = generator.subschema_for::<Metadata>();
    let definitions = generator.take_definitions(true);
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.as_str(),
        "type": "object",
        "properties": {
            "apiVersion": { "const": API_VERSION },
            "kind": { "const": kind.as_str() },
            "metadata": metadata,
            "spec": spec,
        },
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": false,
        "$defs": definitions,
    })
}

pub(super) fn dns_label(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "pattern": DNS_LABEL })
}

pub(super) fn dns_subdomain(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 253,
        "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
    })
}

pub(super) fn rule_name(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "pattern": "^[-a-zA-Z0-9_.]{1,63}$" })
}

pub(super) fn port_name(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 15,
        "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
    })
}

pub(super) fn port(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "integer", "minimum": 1, "maximum": 65535 })
}

pub(super) fn grpc_service(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 255,
        "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*(\\.[a-zA-Z_][a-zA-Z0-9_]*)*$",
    })
}

pub(super) fn spiffe_id(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 2048,
        "pattern": "^spiffe://[a-z0-9._-]{1,255}(/[a-zA-Z0-9._-]+)+$",
    })
}

pub(super) fn duration(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "description": "A number and its unit, such as `2s` or `250ms`.",
        "pattern": "^\\s*([0-9]+\\s*[a-z]+\\s*)+$",
    })
}

/// A list that may be absent, but not empty.
pub(super) fn optional_list<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let items = generator.subschema_for::<T>();
    json_schema!({ "type": "array", "items": items, "minItems": 1, "maxItems": 1000 })
}

//! The custom resource definitions, made from the Rust types that read the resources.
//!
//! Invariants: the schemas are structural; every object below `spec` preserves what it does not
//! know, so that a misspelt field reaches the strict parser instead of being pruned into a wider
//! rule; nothing gets a default; and what the strict parser accepts, the schema
//! accepts, up to a thousand entries a list.

use serde_json::{Map, Value, json};
use sidegate_mesh::resource::{Kind, schema};

/// The API group of every kind.
pub const GROUP: &str = "sidegate.dev";
/// Its only version.
pub const VERSION: &str = "v1alpha1";

/// Most entries of one list. The API server multiplies the bounds of nested lists to judge what the
/// CEL rules cost, and refuses the definition beyond this (tried); an object is at most 1.5 MiB anyway.
const ITEMS_MAX: u64 = 1_000;

const PRESERVE: &str = "x-kubernetes-preserve-unknown-fields";

/// The plural of a kind, as in URLs and RBAC: `authorizationpolicies`.
pub fn plural(kind: Kind) -> &'static str {
    match kind {
        Kind::AuthorizationPolicy => "authorizationpolicies",
        Kind::StaticService => "staticservices",
        Kind::TrafficPolicy => "trafficpolicies",
    }
}

/// The name of a kind's definition: `authorizationpolicies.sidegate.dev`.
pub fn definition_name(kind: Kind) -> String {
    format!("{}.{GROUP}", plural(kind))
}

/// The short name of a kind, for `kubectl get`.
pub fn short_name(kind: Kind) -> &'static str {
    match kind {
        Kind::AuthorizationPolicy => "sgap",
        Kind::StaticService => "sgss",
        Kind::TrafficPolicy => "sgtp",
    }
}

/// The definition of every kind (`apiextensions.k8s.io/v1`), in the order of [`Kind::ALL`].
pub fn crds() -> Vec<Value> {
    Kind::ALL.into_iter().map(definition).collect()
}

fn definition(kind: Kind) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": definition_name(kind),
            "labels": { "app.kubernetes.io/part-of": "sidegate" },
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.as_str(),
                "listKind": format!("{kind}List"),
                "plural": plural(kind),
                "singular": kind.as_str().to_lowercase(),
                "shortNames": [short_name(kind)],
                "categories": ["sidegate"],
            },
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "schema": { "openAPIV3Schema": object_schema(kind) },
                "subresources": { "status": {} },
                "additionalPrinterColumns": columns(kind),
            }],
        },
    })
}

fn columns(kind: Kind) -> Value {
    let column = |name: &str, path: &str, description: &str| json!({ "name": name, "type": "string", "jsonPath": path, "description": description });
    let mut columns = match kind {
        Kind::AuthorizationPolicy => vec![
            column("Action", ".spec.action", "What a match does"),
            column("Mode", ".spec.mode", "Whether it counts; empty: Enforce"),
        ],
        Kind::StaticService => Vec::new(),
        Kind::TrafficPolicy => vec![column(
            "Service",
            ".spec.service",
            "Which service it is about",
        )],
    };
    columns.extend([
        column(
            "Accepted",
            r#".status.conditions[?(@.type=="Accepted")].status"#,
            "Whether it can be put to use",
        ),
        column(
            "Live",
            ".status.live",
            "How many of the sidecars that it concerns have put it to use",
        ),
        column(
            "Reason",
            r#".status.conditions[?(@.type=="Accepted")].reason"#,
            "Why it is accepted or not",
        ),
        json!({ "name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp" }),
    ]);
    Value::Array(columns)
}

fn object_schema(kind: Kind) -> Value {
    let whole = schema(kind);
    let definitions = whole.get("$defs").cloned().unwrap_or_default();
    let part = |pointer: &str| whole.pointer(pointer).cloned().unwrap_or_default();
    let spec = Structural {
        definitions: &definitions,
    }
    .convert(&part("/properties/spec"));
    let name = part("/$defs/Metadata/properties/name/pattern");
    json!({
        "description": format!("{kind} of Sidegate; see docs/policies.md."),
        "type": "object",
        "required": ["metadata", "spec"],
        "properties": {
            "apiVersion": { "type": "string" },
            "kind": { "type": "string" },
            "metadata": {
                "type": "object",
                "properties": { "name": { "type": "string", "pattern": name } },
            },
            "spec": spec,
            "status": status_schema(),
        },
    })
}

fn status_schema() -> Value {
    let text = |description: &str| json!({ "type": "string", "description": description });
    let number = |description: &str| json!({ "type": "integer", "format": "int64", "minimum": 0, "description": description });
    json!({
        "description": "What became of it; written by the controller.",
        "type": "object",
        "properties": {
            "observedGeneration": number("The generation that all of this is about."),
            "live": text("How many sidecars have put this generation to use: `3 of 4`."),
            "sidecars": {
                "type": "object",
                "properties": {
                    "selected": number("Sidecars that it concerns."),
                    "live": number("Those that have put this generation to use."),
                    "refused": number("Those that refuse this generation."),
                },
            },
            "conditions": {
                "type": "array",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status", "reason", "message", "lastTransitionTime"],
                    "properties": {
                        "type": text("`Accepted` or `Live`."),
                        "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                        "reason": text("One word for machines."),
                        "message": text("What is wrong and where, for people."),
                        "observedGeneration": number("The generation that this is about."),
                        "lastTransitionTime": { "type": "string", "format": "date-time" },
                    },
                },
            },
        },
    })
}

/// From JSON Schema, draft 2020-12, to the part of OpenAPI that the API server calls structural.
struct Structural<'a> {
    definitions: &'a Value,
}

impl Structural<'_> {
    fn convert(&self, schema: &Value) -> Value {
        let mut out = self.shape(schema);
        // What stands beside a reference is said of this use of it.
        if let Some(description) = schema.get("description") {
            out.insert("description".to_owned(), description.clone());
        }
        Value::Object(out)
    }

    fn shape(&self, schema: &Value) -> Map<String, Value> {
        let text = |key: &str| schema.get(key).and_then(Value::as_str);
        if let Some(name) = text("$ref").and_then(|path| path.strip_prefix("#/$defs/")) {
            let target = self.definitions.get(name).unwrap_or(&Value::Null);
            return match self.convert(target) {
                Value::Object(map) => map,
                _ => Map::new(),
            };
        }
        if let Some(variants) = schema.get("oneOf").and_then(Value::as_array) {
            return self.variants(variants);
        }
        match text("type") {
            Some("object") => self.object(schema),
            Some("array") => {
                let items = schema.get("items").unwrap_or(&Value::Null);
                let mut out = kept(schema, &["type", "minItems"]);
                let most = schema.get("maxItems").and_then(Value::as_u64);
                let most = most.unwrap_or(ITEMS_MAX).min(ITEMS_MAX);
                out.insert("maxItems".to_owned(), most.into());
                out.insert("items".to_owned(), self.convert(items));
                out
            }
            _ => kept(
                schema,
                &[
                    "type",
                    "enum",
                    "pattern",
                    "minLength",
                    "maxLength",
                    "minimum",
                    "maximum",
                ],
            ),
        }
    }

    /// Words, a number or a name, or objects with exactly one key.
    fn variants(&self, variants: &[Value]) -> Map<String, Value> {
        let words: Vec<Value> = variants
            .iter()
            .filter_map(|one| one.get("const").cloned())
            .collect();
        if words.len() == variants.len() {
            return map(json!({ "type": "string", "enum": words }));
        }
        let is_object = |one: &Value| one.get("type") == Some(&json!("object"));
        if variants.iter().all(is_object) {
            return self.choice(variants);
        }
        map(json!({ "x-kubernetes-int-or-string": true }))
    }

    fn choice(&self, variants: &[Value]) -> Map<String, Value> {
        let mut properties = Map::new();
        let mut names = Vec::new();
        for variant in variants {
            let fields = variant.get("properties").and_then(Value::as_object);
            for (name, schema) in fields.into_iter().flatten() {
                let mut field = self.convert(schema);
                if let (Some(field), Some(words)) =
                    (field.as_object_mut(), variant.get("description"))
                {
                    field.insert("description".to_owned(), words.clone());
                }
                names.push(name.as_str());
                properties.insert(name.clone(), field);
            }
        }
        let has = |name: &&str| format!("(has(self.{}) ? 1 : 0)", cel_name(name));
        let rule = names.iter().map(has).collect::<Vec<_>>().join(" + ") + " == 1";
        let message = format!("write exactly one of {}", names.join(", "));
        map(json!({
            "type": "object",
            "properties": properties,
            "minProperties": 1,
            "maxProperties": 1,
            PRESERVE: true,
            "x-kubernetes-validations": [{ "rule": rule, "message": message }],
        }))
    }

    fn object(&self, schema: &Value) -> Map<String, Value> {
        let mut out = kept(schema, &["type", "minProperties", "maxProperties"]);
        if let Some(values) = schema
            .get("additionalProperties")
            .filter(|values| values.is_object())
        {
            out.insert("additionalProperties".to_owned(), self.convert(values));
            return out;
        }
        let fields = schema.get("properties").and_then(Value::as_object);
        if let Some(fields) = fields {
            let convert = |(name, field): (&String, &Value)| (name.clone(), self.convert(field));
            let fields: Map<String, Value> = fields.iter().map(convert).collect();
            out.insert("properties".to_owned(), Value::Object(fields));
        }
        if let Some(required) = schema.get("required") {
            out.insert("required".to_owned(), required.clone());
        }
        out.insert(PRESERVE.to_owned(), Value::Bool(true));
        out
    }
}

fn kept(schema: &Value, keys: &[&str]) -> Map<String, Value> {
    let keep = |key: &&str| Some(((*key).to_owned(), schema.get(*key)?.clone()));
    keys.iter().filter_map(keep).collect()
}

fn map(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// A property's name in a CEL expression, where some words are taken.
fn cel_name(name: &str) -> String {
    const TAKEN: [&str; 5] = ["namespace", "package", "import", "const", "in"];
    if TAKEN.contains(&name) {
        format!("__{name}__")
    } else {
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the API server demands of a structural schema, and what we demand of ours.
    fn check(schema: &Value, at: &str, below_spec: bool, objects: &mut usize) {
        let schema = schema
            .as_object()
            .unwrap_or_else(|| panic!("{at}: {schema}"));
        for foreign in [
            "$ref", "$defs", "oneOf", "const", "default", "title", "nullable",
        ] {
            assert!(!schema.contains_key(foreign), "{at}: {foreign}");
        }
        let int_or_string = schema.contains_key("x-kubernetes-int-or-string");
        assert_ne!(schema.contains_key("type"), int_or_string, "{at}: one type");
        assert_ne!(
            schema.get("additionalProperties"),
            Some(&json!(false)),
            "{at}"
        );
        let fields = schema.get("properties").and_then(Value::as_object);
        let is_map = schema.contains_key("additionalProperties");
        assert!(
            !(is_map && fields.is_some()),
            "{at}: properties beside additionalProperties"
        );
        if schema.get("type") == Some(&json!("object")) && below_spec && !is_map {
            *objects += 1;
            assert_eq!(schema.get(PRESERVE), Some(&json!(true)), "{at}");
        }
        for name in schema
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            assert!(
                fields.unwrap().contains_key(name.as_str().unwrap()),
                "{at}: {name}"
            );
        }
        for (name, field) in fields.into_iter().flatten() {
            let below = below_spec || (at.is_empty() && name == "spec");
            check(field, &format!("{at}.{name}"), below, objects);
        }
        for inner in ["items", "additionalProperties"] {
            if let Some(inner) = schema.get(inner) {
                check(inner, &format!("{at}[]"), below_spec, objects);
            }
        }
    }

    #[test]
    fn the_schemas_are_structural_and_keep_what_they_do_not_know() {
        for ((kind, crd), at_least) in Kind::ALL.into_iter().zip(crds()).zip([14, 6, 5]) {
            let schema = crd
                .pointer("/spec/versions/0/schema/openAPIV3Schema")
                .unwrap();
            let mut objects = 0;
            check(schema, "", false, &mut objects);
            assert!(objects >= at_least, "{kind}: {objects}");
            assert_eq!(crd["metadata"]["name"], definition_name(kind));
        }
    }

    fn spec_at(kind: usize, pointer: &str) -> Value {
        let crd = crds().swap_remove(kind);
        let whole = format!("/spec/versions/0/schema/openAPIV3Schema/properties/spec{pointer}");
        crd.pointer(&whole)
            .unwrap_or_else(|| panic!("{whole}"))
            .clone()
    }

    #[test]
    fn a_choice_has_one_key_and_says_which() {
        let from = spec_at(0, "/properties/rules/items/properties/from/items");
        assert_eq!(
            (&from["minProperties"], &from["maxProperties"]),
            (&json!(1), &json!(1))
        );
        let said = &from["x-kubernetes-validations"][0];
        assert_eq!(
            said["message"],
            "write exactly one of workload, namespace, spiffeId, anyone, unauthenticated"
        );
        assert!(
            said["rule"]
                .as_str()
                .unwrap()
                .contains("has(self.__namespace__)")
        );
        let identity = spec_at(1, "/properties/endpoints/items/properties/identity");
        assert_eq!(identity["maxProperties"], 1);
    }

    #[test]
    fn words_numbers_and_maps_keep_their_bounds() {
        assert_eq!(
            spec_at(0, "/properties/action/enum"),
            json!(["Allow", "Deny"])
        );
        assert_eq!(
            spec_at(0, "/properties/ports/items"),
            json!({ "x-kubernetes-int-or-string": true, "description": "A port's number or name." })
        );
        let labels = spec_at(0, "/properties/selector/properties/matchLabels");
        assert_eq!(labels["additionalProperties"], json!({ "type": "string" }));
        assert_eq!(
            spec_at(1, "/properties/ports/items/properties/port/maximum"),
            65535
        );
        assert_eq!(
            spec_at(2, "/properties/retry/properties/attempts/maximum"),
            10
        );
    }

    /// Whether a value is as a schema says, patterns apart: the API server checks those.
    fn fits(schema: &Value, value: &Value) -> Result<(), String> {
        let is_type = match schema.get("type").and_then(Value::as_str) {
            Some("object") => value.is_object(),
            Some("array") => value.is_array(),
            Some("string") => value.is_string(),
            Some("integer") => value.is_u64(),
            Some("boolean") => value.is_boolean(),
            _ => value.is_string() || value.is_u64(),
        };
        if !is_type {
            return Err(format!("{value} is no {schema}"));
        }
        let bound = |key: &str| schema.get(key).and_then(Value::as_u64);
        let size = match value {
            Value::Object(map) => map.len() as u64,
            Value::Array(list) => list.len() as u64,
            Value::String(text) => text.chars().count() as u64,
            _ => value.as_u64().unwrap_or_default(),
        };
        let least = ["minProperties", "minItems", "minLength", "minimum"];
        let most = ["maxProperties", "maxItems", "maxLength", "maximum"];
        if least
            .into_iter()
            .filter_map(bound)
            .any(|least| size < least)
            || most.into_iter().filter_map(bound).any(|most| size > most)
            || schema
                .get("enum")
                .is_some_and(|words| !words.as_array().unwrap().contains(value))
        {
            return Err(format!("{value} is out of {schema}"));
        }
        for name in schema
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            if value.get(name.as_str().unwrap()).is_none() {
                return Err(format!("{name} is missing in {value}"));
            }
        }
        for (name, inner) in value.as_object().into_iter().flatten() {
            let known = schema.get("properties").and_then(|fields| fields.get(name));
            let known = known.or_else(|| schema.get("additionalProperties"));
            known.map_or(Ok(()), |schema| fits(schema, inner))?;
        }
        let mut items = value.as_array().into_iter().flatten();
        items.try_for_each(|item| fits(&schema["items"], item))
    }

    #[test]
    fn what_the_reference_shows_is_valid_and_what_it_forbids_is_not() {
        let text = include_str!("../../mesh/tests/data/reference.yaml");
        let mut kinds = std::collections::BTreeSet::new();
        for document in text.split("\n---\n") {
            let object: Value = serde_saphyr::from_str(document).unwrap();
            let kind = Kind::from_name(object["kind"].as_str().unwrap()).unwrap();
            kinds.insert(kind);
            let schema = object_schema(kind);
            fits(&schema, &object).unwrap();
            let required = schema["properties"]["spec"]["required"].as_array().unwrap();
            for name in required {
                let mut cut = object.clone();
                cut["spec"]
                    .as_object_mut()
                    .unwrap()
                    .remove(name.as_str().unwrap());
                fits(&schema, &cut).unwrap_err();
            }
            // A field that nobody knows is kept, for the strict parser to refuse.
            let mut misspelt = object.clone();
            misspelt["spec"]["selectro"] = json!({});
            fits(&schema, &misspelt).unwrap();
        }
        assert_eq!(kinds.len(), Kind::ALL.len());
        let schema = object_schema(Kind::AuthorizationPolicy);
        let with = |from: Value| {
            let rule = json!({ "from": [from], "to": [{ "tcp": {} }] });
            let spec = json!({ "selector": {}, "action": "Allow", "rules": [rule] });
            json!({ "metadata": {}, "spec": spec })
        };
        fits(&schema, &with(json!({ "anyone": {} }))).unwrap();
        fits(&schema, &with(json!({}))).unwrap_err();
        fits(
            &schema,
            &with(json!({ "anyone": {}, "unauthenticated": {} })),
        )
        .unwrap_err();
    }
}

//! The schema of the resources is frozen: it changes only by adding.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "tests"
)]

use std::path::PathBuf;

use serde_json::Value;
use sidegate_mesh::resource::{Kind, schema};

fn path(kind: Kind) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/schema");
    folder.join(format!("{}.json", kind.as_str().to_lowercase()))
}

#[test]
fn the_schemas_are_those_in_docs() {
    for kind in Kind::ALL {
        if std::env::var_os("SIDEGATE_UPDATE_SCHEMA").is_some() {
            std::fs::create_dir_all(path(kind).parent().unwrap()).unwrap();
            let now = serde_json::to_string_pretty(&schema(kind)).unwrap() + "\n";
            std::fs::write(path(kind), now).unwrap();
        }
        let frozen: Value =
            serde_json::from_str(&std::fs::read_to_string(path(kind)).unwrap()).unwrap();
        assert_eq!(
            frozen,
            schema(kind),
            "run with SIDEGATE_UPDATE_SCHEMA=1 if the change only adds"
        );
    }
}

/// Every object of the schema forbids unknown fields, and every choice has one key.
fn check_objects(schema: &Value, at: &str, objects: &mut usize) {
    match schema {
        Value::Object(map) => {
            if map.get("properties").is_some_and(Value::is_object) && map.contains_key("type") {
                *objects += 1;
                assert_eq!(
                    map.get("additionalProperties"),
                    Some(&Value::Bool(false)),
                    "{at}"
                );
            }
            for (key, inner) in map {
                check_objects(inner, &format!("{at}/{key}"), objects);
            }
        }
        Value::Array(list) => {
            for inner in list {
                check_objects(inner, at, objects);
            }
        }
        _ => {}
    }
}

#[test]
fn no_object_of_a_schema_takes_unknown_fields() {
    for (kind, at_least) in Kind::ALL.into_iter().zip([15, 8, 7]) {
        let mut objects = 0;
        check_objects(&schema(kind), kind.as_str(), &mut objects);
        assert!(objects >= at_least, "{kind}: {objects}");
    }
}

#[test]
fn what_has_no_default_is_required() {
    let policy = schema(Kind::AuthorizationPolicy);
    let required = |pointer: &str| {
        let list = policy.pointer(pointer).unwrap().as_array().unwrap();
        list.iter()
            .map(|field| field.as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        required("/required"),
        ["apiVersion", "kind", "metadata", "spec"]
    );
    let spec = required("/$defs/AuthorizationPolicySpec/required");
    for field in ["selector", "action", "rules"] {
        assert!(
            spec.iter().any(|required| required == field),
            "{field}: {spec:?}"
        );
    }
    assert_eq!(required("/$defs/Rule/required"), ["from", "to"]);
}

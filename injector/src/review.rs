//! The `AdmissionReview`: what the API server asks, and what it hears.
//!
//! Invariant: whatever arrives is answered. What carries a UID is denied with that UID when it is
//! not what it should be; what carries none is no review, and the caller is told so.

use base64::Engine as _;
use json_patch::Patch;
use serde_json::{Value, json};

const API_VERSION: &str = "admission.k8s.io/v1";
/// Longest UID that is repeated.
const UID_BYTES_MAX: usize = 128;

/// What is asked.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Review {
    /// Ties the answer to the question.
    pub(crate) uid: String,
    /// Group of the object's kind; empty for the core group.
    pub(crate) group: String,
    /// The object's kind.
    pub(crate) kind: String,
    /// `status` and such; empty for the object itself.
    pub(crate) sub_resource: String,
    /// `CREATE`, `UPDATE`, `DELETE` or `CONNECT`.
    pub(crate) operation: String,
    /// The object's namespace; empty for what has none.
    pub(crate) namespace: String,
    /// The object as it shall become.
    pub(crate) object: Value,
}

/// Why something is not a review.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Malformed {
    /// Not even a UID could be read.
    #[error("{0}")]
    NoReview(String),
    /// There is a UID, but not what makes a question.
    #[error("request.{field} {problem}")]
    Request {
        /// Ties the answer to the question.
        uid: String,
        /// What is wrong.
        field: &'static str,
        /// Why.
        problem: &'static str,
    },
}

impl Review {
    /// Reads the body of a request.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut envelope: Value = serde_json::from_slice(body)
            .map_err(|error| Malformed::NoReview(format!("this is not JSON: {error}")))?;
        let text = |field: &str| envelope.get(field).and_then(Value::as_str);
        let is_review = text("kind") == Some("AdmissionReview");
        if !is_review || text("apiVersion") != Some(API_VERSION) {
            let message = format!("this is not an AdmissionReview of {API_VERSION}");
            return Err(Malformed::NoReview(message));
        }
        let request = envelope
            .get_mut("request")
            .map(Value::take)
            .unwrap_or_default();
        let uid = request
            .get("uid")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if uid.is_empty() || uid.len() > UID_BYTES_MAX {
            return Err(Malformed::NoReview("request.uid is missing".to_owned()));
        }
        Self::of_request(uid.to_owned(), request)
    }

    fn of_request(uid: String, mut request: Value) -> Result<Self, Malformed> {
        let mut review = Self {
            object: request
                .get_mut("object")
                .map(Value::take)
                .unwrap_or_default(),
            ..Self::default()
        };
        let kind = request.get("kind");
        let of_kind = |field: &str| kind.and_then(|kind| kind.get(field));
        let fields = [
            ("kind.group", of_kind("group"), &mut review.group),
            ("kind.kind", of_kind("kind"), &mut review.kind),
            (
                "subResource",
                request.get("subResource"),
                &mut review.sub_resource,
            ),
            ("operation", request.get("operation"), &mut review.operation),
            ("namespace", request.get("namespace"), &mut review.namespace),
        ];
        for (field, value, place) in fields {
            match value {
                None | Some(Value::Null) => {}
                Some(Value::String(text)) => place.clone_from(text),
                Some(_) => {
                    let problem = "is not a text";
                    return Err(Malformed::Request {
                        uid,
                        field,
                        problem,
                    });
                }
            }
        }
        for (field, value) in [
            ("kind.kind", &review.kind),
            ("operation", &review.operation),
        ] {
            if value.is_empty() {
                let problem = "is missing";
                return Err(Malformed::Request {
                    uid,
                    field,
                    problem,
                });
            }
        }
        review.uid = uid;
        Ok(review)
    }
}

/// What is answered.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Answer {
    /// The object may be, changed by the patch.
    Allowed {
        /// What to change; empty for nothing.
        patch: Patch,
        /// What whoever asked should know.
        warnings: Vec<String>,
    },
    /// The object may not be.
    Denied(Denial),
}

/// Why an object may not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Denial {
    /// As an HTTP status.
    pub(crate) code: u16,
    /// A word of Kubernetes.
    pub(crate) reason: &'static str,
    /// For whoever asked.
    pub(crate) message: String,
    /// Each field with its own message, where that is known.
    pub(crate) causes: Vec<(String, String)>,
}

impl Answer {
    /// The object may be as it is.
    pub(crate) fn unchanged() -> Self {
        Self::Allowed {
            patch: Patch::default(),
            warnings: Vec::new(),
        }
    }

    pub(crate) fn denied(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self::Denied(Denial {
            code,
            reason,
            message: message.into(),
            causes: Vec::new(),
        })
    }

    /// The body of the response.
    pub(crate) fn to_json(&self, uid: &str) -> String {
        let mut response = json!({ "uid": uid });
        if let Some(response) = response.as_object_mut() {
            let mut put = |key: &str, value: Value| {
                response.insert(key.to_owned(), value);
            };
            match self {
                Self::Allowed { patch, warnings } => {
                    put("allowed", true.into());
                    if !patch.0.is_empty() {
                        let patch =
                            base64::engine::general_purpose::STANDARD.encode(patch.to_string());
                        put("patchType", "JSONPatch".into());
                        put("patch", patch.into());
                    }
                    if !warnings.is_empty() {
                        put("warnings", json!(warnings));
                    }
                }
                Self::Denied(denial) => {
                    put("allowed", false.into());
                    put("status", denial.to_status());
                }
            }
        }
        let kind = "AdmissionReview";
        json!({ "apiVersion": API_VERSION, "kind": kind, "response": response }).to_string()
    }
}

impl Denial {
    fn to_status(&self) -> Value {
        let mut status = json!({
            "status": "Failure",
            "code": self.code,
            "reason": self.reason,
            "message": self.message,
        });
        let causes = self.causes.iter().map(|(field, message)| {
            json!({ "reason": "FieldValueInvalid", "field": field, "message": message })
        });
        let causes: Vec<Value> = causes.collect();
        if let (Some(status), false) = (status.as_object_mut(), causes.is_empty()) {
            status.insert("details".to_owned(), json!({ "causes": causes }));
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn review(request: &Value) -> Result<Review, Malformed> {
        let review =
            json!({ "apiVersion": API_VERSION, "kind": "AdmissionReview", "request": request });
        Review::parse(review.to_string().as_bytes())
    }

    #[test]
    fn a_question_is_read_and_what_is_unknown_in_it_does_not_matter() {
        let request = json!({
            "uid": "1", "kind": { "group": "", "version": "v1", "kind": "Pod" }, "operation": "CREATE",
            "namespace": "shop", "object": { "spec": {} }, "oldObject": null, "future": [],
        });
        let review = review(&request).unwrap();
        assert_eq!(
            (
                review.uid.as_str(),
                review.kind.as_str(),
                review.namespace.as_str()
            ),
            ("1", "Pod", "shop")
        );
        assert_eq!(review.object, json!({ "spec": {} }));
        assert_eq!(review.sub_resource, "");
    }

    #[test]
    fn what_has_no_uid_is_no_review() {
        for body in [
            "",
            "{",
            "[]",
            "null",
            "\"AdmissionReview\"",
            r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1beta1","request":{"uid":"1"}}"#,
            r#"{"kind":"Pod","apiVersion":"admission.k8s.io/v1","request":{"uid":"1"}}"#,
            r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}"#,
            r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":7}}"#,
            r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":""}}"#,
        ] {
            assert!(
                matches!(Review::parse(body.as_bytes()), Err(Malformed::NoReview(_))),
                "{body}"
            );
        }
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(matches!(
            Review::parse(deep.as_bytes()),
            Err(Malformed::NoReview(_))
        ));
    }

    #[test]
    fn what_has_a_uid_is_answered_with_it() {
        for request in [
            json!({ "uid": "u" }),
            json!({ "uid": "u", "operation": "CREATE" }),
            json!({ "uid": "u", "operation": 1, "kind": { "kind": "Pod" } }),
            json!({ "uid": "u", "operation": "CREATE", "kind": { "kind": ["Pod"] } }),
            json!({ "uid": "u", "operation": "CREATE", "kind": { "kind": "Pod" }, "namespace": {} }),
        ] {
            match review(&request) {
                Err(Malformed::Request { uid, .. }) => assert_eq!(uid, "u"),
                other => panic!("{request}: {other:?}"),
            }
        }
    }

    #[test]
    fn the_answer_carries_patch_warnings_and_causes() {
        let patch: Patch =
            serde_json::from_value(json!([{ "op": "remove", "path": "/a" }])).unwrap();
        let allowed = Answer::Allowed {
            patch,
            warnings: vec!["careful".to_owned()],
        };
        let json: Value = serde_json::from_str(&allowed.to_json("u")).unwrap();
        assert_eq!(json["response"]["uid"], "u");
        assert_eq!(json["response"]["patchType"], "JSONPatch");
        let patch = base64::engine::general_purpose::STANDARD
            .decode(json["response"]["patch"].as_str().unwrap())
            .unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&patch).unwrap(),
            json!([{ "op": "remove", "path": "/a" }])
        );
        assert_eq!(json["response"]["warnings"], json!(["careful"]));
        let unchanged: Value = serde_json::from_str(&Answer::unchanged().to_json("u")).unwrap();
        assert_eq!(
            unchanged["response"],
            json!({ "uid": "u", "allowed": true })
        );
        let denial = Denial {
            code: 422,
            reason: "Invalid",
            message: "no".to_owned(),
            causes: vec![("spec.x".to_owned(), "why".to_owned())],
        };
        let denied: Value = serde_json::from_str(&Answer::Denied(denial).to_json("u")).unwrap();
        assert_eq!(denied["response"]["allowed"], false);
        assert_eq!(denied["response"]["status"]["code"], 422);
        assert_eq!(
            denied["response"]["status"]["details"]["causes"][0]["field"],
            "spec.x"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            drop(Review::parse(&bytes));
        }
    }
}

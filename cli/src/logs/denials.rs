//! Refusals that sidecars remember, beside those that their logs still have.
//!
//! Always true: a refusal that is in a log, alone or added up with others, is not taken from the
//! memory as well.

use std::collections::HashSet;

use serde_json::Value;
use sidegate_mesh::access_log::Line;

/// What the logs have said about refusals.
#[derive(Debug, Default)]
pub(super) struct Denials {
    known: HashSet<String>,
    sums: Vec<Sum>,
}

/// A line that stands for several refusals of one peer.
#[derive(Debug)]
struct Sum {
    pod: String,
    peer: Peer,
    times: (String, String),
}

/// By what refusals are added up.
#[derive(Debug, PartialEq, Eq)]
struct Peer {
    source: Option<String>,
    address: Option<String>,
    destination: Option<String>,
    decision: Option<String>,
    error: Option<String>,
}

impl Denials {
    /// Remembers a refusal that the log of `pod` has.
    pub(super) fn see(&mut self, pod: &str, text: &str) {
        self.known.extend(key(pod, text));
        let Ok(line) = Line::parse(text) else {
            return;
        };
        if let (Some(first), Some(last)) = (&line.time, &line.last_time) {
            self.sums.push(Sum {
                pod: pod.to_owned(),
                peer: Peer::of(&line),
                times: (first.clone(), last.clone()),
            });
        }
    }

    /// Whether a refusal that the sidecar of `pod` remembers is in no log; then it is known from
    /// now on.
    pub(super) fn is_new(&mut self, pod: &str, text: &str) -> bool {
        let summed = Line::parse(text).is_ok_and(|line| {
            let peer = Peer::of(&line);
            let time = line.time.unwrap_or_default();
            self.sums.iter().any(|sum| {
                let (first, last) = &sum.times;
                sum.pod == pod && sum.peer == peer && *first <= time && time <= *last
            })
        });
        !summed && key(pod, text).is_some_and(|key| self.known.insert(key))
    }

    /// Whether a line that comes later was known before; it is forgotten then.
    pub(super) fn forget(&mut self, pod: &str, text: &str) -> bool {
        !self.known.is_empty() && key(pod, text).is_some_and(|key| self.known.remove(&key))
    }
}

impl Peer {
    fn of(line: &Line) -> Self {
        // Without the port, as the sidecar adds them up.
        let host = |address: &String| {
            let parsed = address.parse::<std::net::SocketAddr>();
            parsed.map_or_else(|_| address.clone(), |address| address.ip().to_string())
        };
        Self {
            source: line.source.clone(),
            address: line.source_address.as_ref().map(host),
            destination: line.destination.clone(),
            decision: line.decision.clone(),
            error: line.error.clone(),
        }
    }
}

/// What two records of one refusal share and others do not: the decision's ID and the side that
/// wrote it down; of what has no ID, everything.
fn key(pod: &str, text: &str) -> Option<String> {
    let value: Value = serde_json::from_str(text).ok()?;
    let text = |name: &str| value.get(name).and_then(Value::as_str);
    Some(match (text("decision_id"), text("direction")) {
        (Some(id), Some(direction)) => format!("{pod} {direction} {id}"),
        _ => format!("{pod} {value}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(second: u8, more: &str) -> String {
        format!(
            r#"{{"kind":"access","time":"2026-11-24T07:00:{second:02}.000000Z","direction":"inbound","source_address":"10.0.0.9:4{second:02}","decision":"deny"{more}}}"#
        )
    }

    #[test]
    fn a_refusal_of_the_log_is_not_taken_from_memory_as_well() {
        let mut denials = Denials::default();
        let in_log = refusal(1, r#","decision_id":"a","reason":"no rule admits""#);
        denials.see("shop/orders", &in_log);
        let remembered = in_log.replace("no rule admits", "told otherwise");
        assert!(!denials.is_new("shop/orders", &remembered));
        assert!(denials.is_new("shop/other", &remembered), "another pod's");
        let other_side = remembered.replace("inbound", "outbound");
        assert!(
            denials.is_new("shop/orders", &other_side),
            "the other side's"
        );
        let handshake = refusal(2, r#","error":"tls_handshake""#);
        assert!(denials.is_new("shop/orders", &handshake));
        assert!(!denials.is_new("shop/orders", &handshake), "twice");
    }

    #[test]
    fn what_the_log_has_added_up_is_not_shown_one_by_one() {
        let mut denials = Denials::default();
        let sum = refusal(
            10,
            r#","flags":["aggregated"],"count":3,"last_time":"2026-11-24T07:00:20.000000Z""#,
        );
        denials.see("shop/orders", &sum);
        assert!(!denials.is_new("shop/orders", &refusal(10, r#","path":"/1""#)));
        assert!(!denials.is_new("shop/orders", &refusal(20, "")));
        assert!(
            denials.is_new("shop/orders", &refusal(21, "")),
            "after them"
        );
        assert!(
            denials.is_new("shop/orders", &refusal(15, r#","error":"x""#)),
            "of another sort"
        );
    }
}

//! Metrics as text.
//!
//! Invariant: the text is the Prometheus text format 0.0.4, which every scraper and `promtool`
//! read. The client library writes `OpenMetrics`, where a counter's family lacks the `_total` that
//! its samples have; here both have it.

use std::fmt::Write as _;

use prometheus_client::registry::Registry;

/// The `content-type` of [`text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Every metric of `registry`, now.
///
/// # Errors
///
/// [`std::fmt::Error`] when a collector fails.
pub fn text(registry: &Registry) -> Result<String, std::fmt::Error> {
    let mut open_metrics = String::new();
    prometheus_client::encoding::text::encode_registry(&mut open_metrics, registry)?;
    to_prometheus(&open_metrics)
}

fn to_prometheus(open_metrics: &str) -> Result<String, std::fmt::Error> {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        let Some(comment) = line.strip_prefix("# ") else {
            writeln!(text, "{line}")?;
            continue;
        };
        let mut words = comment.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            // The type, which comes next, decides about the name.
            (Some("HELP"), Some(_), Some(words)) => help = Some(words),
            (Some("TYPE"), Some(name), Some(kind)) => {
                let suffix = if kind == "counter" { "_total" } else { "" };
                let kind = if kind == "unknown" { "untyped" } else { kind };
                if let Some(help) = help.take() {
                    writeln!(text, "# HELP {name}{suffix} {help}")?;
                }
                writeln!(text, "# TYPE {name}{suffix} {kind}")?;
            }
            _ => {}
        }
    }
    Ok(text)
}

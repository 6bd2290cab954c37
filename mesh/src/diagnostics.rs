//! Messages of a program about itself, as JSON lines.
//!
//! Invariants: each line is one JSON object with `"kind":"diagnostic"`, so that one stream can carry
//! it beside the access log; a serializer writes it, so nothing in a field ends the line or forges a
//! member; only a program installs this, never a library, because it is global.

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;

use crate::access_log::timestamp;
use crate::clock::Clock;

/// Why diagnostics are not what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum DiagnosticsError {
    /// The level is neither a word nor a filter.
    #[error(
        "`{level}` is not a level of diagnostics: error, warn, info, debug, off, or a filter such as \
         info,sidegate_proxy=debug"
    )]
    Level {
        /// What was given.
        level: String,
    },
    /// Something else was installed before.
    #[error("diagnostics are installed already")]
    Installed(#[source] tracing::subscriber::SetGlobalDefaultError),
}

/// Sends diagnostics of `level` to standard error from now on, panics included. A level is a word
/// (`off`, `error`, `warn`, `info`, `debug`; `trace` is as `debug` in a release), or a filter by targets:
/// `info,sidegate_proxy=debug`.
///
/// # Errors
///
/// [`DiagnosticsError`]; nothing has changed then.
pub fn install(level: &str, clock: Arc<dyn Clock>) -> Result<(), DiagnosticsError> {
    let subscriber = subscriber(level, clock, std::io::stderr)?;
    tracing::subscriber::set_global_default(subscriber).map_err(DiagnosticsError::Installed)?;
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        say_panic(panic.payload_as_str().unwrap_or("no message"), place);
    }));
    Ok(())
}

/// What `SIDEGATE_LOG` asks for, else `default`.
pub fn level_from_env(default: &str) -> String {
    let asked = std::env::var("SIDEGATE_LOG").ok();
    asked
        .filter(|level| !level.is_empty())
        .unwrap_or_else(|| default.to_owned())
}

fn say_panic(message: &str, place: Option<String>) {
    let thread = std::thread::current();
    tracing::error!(
        error = message,
        thread = thread.name().unwrap_or("unnamed"),
        place = place.unwrap_or_default(),
        "panicked"
    );
}

/// Checks a level without installing anything.
///
/// # Errors
///
/// [`DiagnosticsError::Level`] when it is none.
pub fn check(level: &str) -> Result<(), DiagnosticsError> {
    filter(level).map(drop)
}

fn filter(level: &str) -> Result<Targets, DiagnosticsError> {
    parse(level).ok_or_else(|| DiagnosticsError::Level {
        level: level.to_owned(),
    })
}

fn parse(level: &str) -> Option<Targets> {
    let pieces: Vec<&str> = level.split(',').map(str::trim).collect();
    // `Targets` takes a word that is no level for a target, and nothing for `error`.
    let read = |piece: &&str| piece.contains('=') || is_level(piece);
    if !pieces.iter().all(read) {
        return None;
    }
    let filter: Targets = pieces.join(",").parse().ok()?;
    // A panic is said whatever is asked for.
    Some(filter.with_target(module_path!(), LevelFilter::ERROR))
}

fn is_level(word: &str) -> bool {
    !word.is_empty() && word.parse::<LevelFilter>().is_ok()
}

/// Writes diagnostics of `level` to `writer`.
fn subscriber<W>(
    level: &str,
    clock: Arc<dyn Clock>,
    writer: W,
) -> Result<impl Subscriber + Send + Sync, DiagnosticsError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .event_format(JsonLines { clock })
        .with_writer(writer);
    let registry = tracing_subscriber::registry();
    Ok(registry.with(filter(level)?).with(lines))
}

struct JsonLines {
    clock: Arc<dyn Clock>,
}

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let mut fields = Fields(Map::new());
        let mut text = |name: &str, text: String| fields.0.insert(name.to_owned(), text.into());
        text("kind", "diagnostic".to_owned());
        text("time", timestamp(self.clock.now()));
        text("level", metadata.level().as_str().to_ascii_lowercase());
        text("target", metadata.target().to_owned());
        event.record(&mut fields);
        writeln!(writer, "{}", Value::Object(fields.0))
    }
}

/// An event's facts, by name.
struct Fields(Map<String, Value>);

impl Fields {
    /// A field never hides one that every line has.
    fn insert(&mut self, field: &Field, value: Value) {
        let name = field.name();
        let taken = matches!(name, "kind" | "time" | "level" | "target");
        let name = if taken {
            format!("field.{name}")
        } else {
            name.to_owned()
        };
        self.0.insert(name, value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.insert(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.insert(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.insert(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.insert(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.insert(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.insert(field, value.into());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let mut text = value.to_string();
        let mut source = value.source();
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        self.insert(field, text.into());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};
    use std::time::SystemTime;

    use super::*;
    use crate::clock::ManualClock;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_message_is_one_json_line_of_its_kind() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = subscriber(
            "info",
            Arc::new(ManualClock::new(SystemTime::UNIX_EPOCH)),
            move || writer.clone(),
        )
        .unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(
                target: "sidegate_mtls::identity",
                generation = 7,
                error = "a\n\"b\"",
                kind = "access",
                "svid rotated"
            );
            tracing::debug!(target: "sidegate_mtls::identity", "not shown");
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["kind"], "diagnostic");
        assert_eq!(
            line["field.kind"], "access",
            "a field cannot pose as another kind"
        );
        assert_eq!(line["level"], "info");
        assert_eq!(line["message"], "svid rotated");
        assert_eq!(line["generation"], 7);
        assert_eq!(line["error"], "a\n\"b\"");
        assert!(line["time"].as_str().unwrap().ends_with('Z'), "{line}");
    }

    #[test]
    fn a_panic_is_said_whatever_is_asked_for() {
        let lines = Lines::default();
        let writer = lines.clone();
        let clock = Arc::new(ManualClock::new(SystemTime::UNIX_EPOCH));
        let subscriber = subscriber("off", clock, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!(target: "elsewhere", "not shown");
            say_panic("lost", None);
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("panicked") && text.contains("lost"), "{text}");
    }

    #[test]
    fn what_is_no_level_is_refused() {
        for level in ["info", "off", "info,sidegate_proxy=debug", "warn, h2=debug"] {
            assert!(check(level).is_ok(), "{level}");
        }
        for level in ["sidegate_proxy=loud", "inof", "warning", "", "info,"] {
            assert!(check(level).is_err(), "{level}");
        }
    }
}

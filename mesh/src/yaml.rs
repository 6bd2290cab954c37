//! What the YAML parser says of a text that is not what it should be, in the one form of every
//! configuration: `NAME:LINE:COLUMN: message`.

/// The place, from 1, and the parser's message, in one line.
pub fn syntax_error(name: &str, error: &serde_saphyr::Error) -> String {
    let place = error.location();
    let (line, column) = place.map_or((1, 1), |at| (at.line().max(1), at.column().max(1)));
    // The plain error repeats the place at its end and draws a snippet; both are said already.
    let message = error.without_snippet().to_string();
    let message = message.lines().next().unwrap_or_default();
    let message = message.split(" at line ").next().unwrap_or(message);
    format!(
        "{name}:{line}:{column}: {}",
        message.trim_start_matches("error: ")
    )
}

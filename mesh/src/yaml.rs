//! YAML: what its parser says of a text that is not what it should be, in the one form of every
//! configuration (`NAME:LINE:COLUMN: message`), and JSON made such that it is YAML.

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

/// JSON as YAML reads it. JSON may hold in its strings, as they are, characters that YAML takes only
/// escaped.
pub fn from_json(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for character in json.chars() {
        match character {
            '\u{7f}'..='\u{9f}'
            | '\u{2028}'
            | '\u{2029}'
            | '\u{feff}'
            | '\u{fffe}'
            | '\u{ffff}' => {
                // As JSON and YAML both write it: these all have four hexadecimal digits.
                let code = u32::from(character);
                let digit = |shift: u32| char::from_digit((code >> shift) & 0xf, 16).unwrap_or('0');
                text.push_str("\\u");
                text.extend([12, 8, 4, 0].map(digit));
            }
            _ => text.push(character),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_character_of_json_is_read_as_yaml() {
        let odd = "\u{7f}\u{85}\u{2028}\u{feff}\u{1f600}é\\u0007";
        let text = from_json(&format!(r#"{{"a":"{odd}"}}"#));
        let read: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        let expected: serde_json::Value =
            serde_json::from_str(&format!(r#"{{"a":"{odd}"}}"#)).unwrap();
        assert_eq!(read, expected);
    }
}

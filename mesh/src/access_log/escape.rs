//! Text that a peer chose, made harmless for whoever looks at the log.

use std::borrow::Cow;
use std::io::{self, Write};

use serde_json::ser::Formatter;

/// JSON whose strings also escape what [`is_unsafe`] names; JSON alone escapes C0.
pub(super) struct Escaped;

impl Formatter for Escaped {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if fragment.bytes().all(|byte| byte < 0x7f) {
            return writer.write_all(fragment.as_bytes());
        }
        writer.write_all(escape(fragment).as_bytes())
    }
}

/// Whether a character must not reach a log or a terminal as it is: C0, DEL and C1 controls,
/// the characters that change the direction of text, and the separators U+2028 and U+2029.
pub fn is_unsafe(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}'
                | '\u{200e}'
                | '\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2066}'..='\u{2069}'
                | '\u{feff}'
        )
}

/// `text` with every unsafe character as `\uXXXX`, so that JSON stays the same JSON.
pub fn escape(text: &str) -> Cow<'_, str> {
    use std::fmt::Write;
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if is_unsafe(character) {
            // All of them are in the basic plane; writing to a string cannot fail.
            write!(escaped, "\\u{:04x}", u32::from(character)).ok();
        } else {
            escaped.push(character);
        }
    }
    Cow::Owned(escaped)
}

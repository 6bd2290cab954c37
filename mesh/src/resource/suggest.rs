//! "Did you mean": the nearest of the words that are possible.
//!
//! Invariant: a suggestion is never more than a help in a message; nothing is corrected.

/// Longest text that is compared; anything longer is no slip of the fingers.
const COMPARED_CHARS_MAX: usize = 64;

/// The possible word nearest to what was written, when it is near enough to be meant.
pub fn nearest<'a>(written: &str, possible: &[&'a str]) -> Option<&'a str> {
    if written.chars().count() > COMPARED_CHARS_MAX {
        return None;
    }
    let folded = written.to_lowercase();
    let near = |word: &&'a str| {
        let limit = 1 + word.chars().count() / 4;
        let far = distance(&folded, &word.to_lowercase());
        (far <= limit).then_some((far, *word))
    };
    let nearest = possible.iter().filter_map(near).min_by_key(|(far, _)| *far);
    nearest.map(|(_, word)| word)
}

/// The words for a sentence: "`a`, `b` or `c`".
pub fn one_of(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
    match quoted.split_last() {
        None => "nothing".to_owned(),
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
    }
}

/// Levenshtein's distance, where two exchanged neighbours count as one.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut before_previous: Vec<usize> = Vec::new();
    let mut previous: Vec<usize> = (0..=b.len()).collect();
    let mut last_char = None;
    for (row, char_a) in a.chars().enumerate() {
        let mut current = vec![row + 1];
        let mut last_b = None;
        for (column, char_b) in b.iter().copied().enumerate() {
            let at =
                |costs: &[usize], index: usize| costs.get(index).copied().unwrap_or(usize::MAX - 1);
            let substituted = at(&previous, column) + usize::from(char_a != char_b);
            let gap = at(&previous, column + 1).min(at(&current, column)) + 1;
            let mut best = substituted.min(gap);
            if last_char == Some(char_b) && last_b == Some(char_a) && column > 0 {
                best = best.min(at(&before_previous, column - 1) + 1);
            }
            current.push(best);
            last_b = Some(char_b);
        }
        last_char = Some(char_a);
        before_previous = std::mem::replace(&mut previous, current);
    }
    previous.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_fingers_is_recognised() {
        let possible = ["methods", "paths", "hosts", "upgrades"];
        assert_eq!(nearest("method", &possible), Some("methods"));
        assert_eq!(nearest("mehtods", &possible), Some("methods"));
        assert_eq!(nearest("Paths", &possible), Some("paths"));
        assert_eq!(nearest("path", &possible), Some("paths"));
        assert_eq!(nearest("headers", &possible), None);
        assert_eq!(nearest(&"m".repeat(1_000), &possible), None);
    }

    #[test]
    fn words_are_listed_as_in_a_sentence() {
        assert_eq!(one_of(&[]), "nothing");
        assert_eq!(one_of(&["a"]), "`a`");
        assert_eq!(one_of(&["a", "b", "c"]), "`a`, `b` or `c`");
    }
}

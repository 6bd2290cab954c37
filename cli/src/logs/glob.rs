//! Paths by pattern, for looking at logs; policies have their own, stricter ones.

/// Whether `path` is like `pattern`: `**` is any number of segments, `*` any part of one.
pub(super) fn matches(pattern: &str, path: &str) -> bool {
    let pattern: Vec<&str> = pattern.split('/').collect();
    let path: Vec<&str> = path.split('/').collect();
    like(
        &pattern,
        &path,
        |pattern| *pattern == "**",
        |pattern, segment| {
            let (pattern, segment): (Vec<char>, Vec<char>) =
                (pattern.chars().collect(), segment.chars().collect());
            like(
                &pattern,
                &segment,
                |one| *one == '*',
                |one, other| one == other,
            )
        },
    )
}

/// Whether `text` is like `pattern`, in which some elements stand for any number of elements.
/// One way back is enough: the last wildcard can always take over from those before it.
fn like<P, T>(
    pattern: &[P],
    text: &[T],
    is_wild: impl Fn(&P) -> bool,
    same: impl Fn(&P, &T) -> bool,
) -> bool {
    let (mut at_pattern, mut at_text) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    while let Some(element) = text.get(at_text) {
        match pattern.get(at_pattern) {
            Some(wild) if is_wild(wild) => {
                back = Some((at_pattern, at_text));
                at_pattern += 1;
            }
            Some(one) if same(one, element) => {
                (at_pattern, at_text) = (at_pattern + 1, at_text + 1);
            }
            _ => {
                let Some((wild_at, taken)) = back else {
                    return false;
                };
                back = Some((wild_at, taken + 1));
                (at_pattern, at_text) = (wild_at + 1, taken + 1);
            }
        }
    }
    pattern
        .get(at_pattern..)
        .unwrap_or_default()
        .iter()
        .all(is_wild)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stays_in_its_segment_and_two_do_not() {
        for (pattern, path, expected) in [
            ("/orders/*", "/orders/7", true),
            ("/orders/*", "/orders/7/events", false),
            ("/orders/*", "/orders", false),
            ("/orders/**", "/orders/7/events", true),
            ("/orders/**", "/orders", true),
            ("**/events", "/orders/7/events", true),
            ("/**/7/*", "/a/b/7/c", true),
            ("/or*s/7", "/orders/7", true),
            ("/or*s/7", "/ordeal/7", false),
            ("*", "/", false),
            ("**", "/a/b", true),
            ("/a*b*c", "/axxbyybzc", true),
            ("/a*b*c", "/axxbyybz", false),
            ("/é*", "/école", true),
        ] {
            assert_eq!(matches(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn many_wildcards_do_not_take_for_ever() {
        let pattern = "*a".repeat(200);
        assert!(!matches(&pattern, &("a".repeat(5_000) + "b")));
    }
}

//! No text makes the parser panic, slow or large.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "tests"
)]

use std::fmt::Write;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use sidegate_mesh::resource::{FILE_BYTES_MAX, parse_documents};
use sidegate_mesh::{Problem, ResourceStore};

const REFERENCE: &str = include_str!("data/reference.yaml");

/// Longer than any reading may take, also on a busy machine without optimization.
const PATIENCE: Duration = Duration::from_secs(30);

#[track_caller]
fn refused(text: &str) -> Problem {
    let start = Instant::now();
    let mut results = parse_documents("a.yaml", text);
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    let last = results.pop().unwrap();
    let Err(problem) = last else {
        panic!("accepted")
    };
    assert!(problem.to_string().len() < 2_000, "{problem}");
    problem
}

fn policy(rules: usize) -> String {
    let mut text = "apiVersion: sidegate.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: a, namespace: b }\nspec:\n  selector: {}\n  action: Allow\n  rules:\n".to_owned();
    for rule in 0..rules {
        writeln!(
            text,
            "    - {{ name: r{rule}, from: [{{ workload: {{ serviceAccount: s{rule} }} }}], to: [{{ http: {{ methods: [GET], paths: [/{rule}] }} }}] }}"
        )
        .unwrap();
    }
    text
}

#[test]
fn ten_thousand_rules_are_read_and_one_more_is_refused() {
    let results = parse_documents("a.yaml", &policy(10_000));
    assert!(results[0].is_ok(), "{results:?}");
    let problem = refused(&policy(10_001));
    assert!(
        problem.message.contains("more than 10000 entries"),
        "{problem}"
    );
    assert_eq!(problem.field.as_deref(), Some("spec.rules"));
}

#[test]
fn an_alias_bomb_is_refused() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..30 {
        let before = level - 1;
        let aliases = vec![format!("*a{before}"); 10].join(", ");
        writeln!(bomb, "a{level}: &a{level} [{aliases}]").unwrap();
    }
    let problem = refused(&bomb);
    assert!(
        problem.message.contains("more than 500000 values"),
        "{problem}"
    );
    assert_eq!(problem.line, 6);
    let wide = format!(
        "a: &a [{}]\nb: [{}]\n",
        "x,".repeat(50_000),
        "*a,".repeat(50_000)
    );
    assert!(refused(&wide).message.contains("values"));
    assert!(refused("a: &a [*a]\n").message.contains("alias"));
}

#[test]
fn deep_nesting_is_refused() {
    let deep = |open: &str| open.repeat(100_000);
    for text in [
        deep("["),
        deep("{"),
        deep("{a: "),
        deep("- "),
        deep("? "),
        deep("[{"),
    ] {
        let problem = refused(&text);
        assert_eq!(problem.line, 1, "{problem}");
    }
    let mut block = String::new();
    for depth in 0..1_000 {
        writeln!(block, "{}a:", " ".repeat(depth)).unwrap();
    }
    let problem = refused(&block);
    assert!(problem.message.contains("more than 32 levels"), "{problem}");
}

#[test]
fn a_large_file_is_refused_unread() {
    let problem = refused(&"# padding\n".repeat(1_000_000));
    assert!(problem.message.contains("10000000 bytes"), "{problem}");
    let at_most = format!(
        "{}{}",
        policy(1),
        "#".repeat(FILE_BYTES_MAX - policy(1).len())
    );
    assert!(parse_documents("a.yaml", &at_most)[0].is_ok());
}

#[test]
fn many_documents_are_refused() {
    let text = format!("{}---\n", policy(1)).repeat(2_001);
    let results = parse_documents("a.yaml", &text);
    assert_eq!(results.len(), 2_001);
    let problem = results[2_000].as_ref().unwrap_err();
    assert!(
        problem.message.contains("more than 2000 documents"),
        "{problem}"
    );
}

#[test]
fn large_hostile_texts_are_read_in_time() {
    // The largest file takes 32 times as long: nothing in it is quadratic.
    let large = |part: &str| part.repeat(FILE_BYTES_MAX / 32 / part.len());
    for part in [
        "a", "a ", "\n", "\t", "- a\n", "a: b\n", "[],", "\"", "'", "|\n", "&a ", "*a ", "!a ",
        "%a\n", "#", "# \n", "---\n", "...\n", "--- a\n", "? ", ": ", "{}", "a,", "\\", "\u{feff}",
        "\r", "\u{e9}", "\0", "\u{2028}", "<<: ",
    ] {
        refused(&large(part));
        refused(&format!("[{}", large(part)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(3_000) })]

    #[test]
    fn no_text_panics(text in "\\PC*|[-a-b:\\[\\]{},&*!|>'\"%@`#?~ \n\t\r.0-9]{0,40}") {
        check_places(&text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn no_change_of_a_good_file_panics(
        at in 0..REFERENCE.len(),
        cut in 0..40_usize,
        insert in "[-a-z:\\[\\]{},&*!|>'\"%#? \n\t]{0,6}",
    ) {
        let end = (at + cut).min(REFERENCE.len());
        if let (Some(before), Some(after)) = (REFERENCE.get(..at), REFERENCE.get(end..)) {
            let text = format!("{before}{insert}{after}");
            check_places(&text);
            let mut store = ResourceStore::new();
            store.replace_folder(&[("a.yaml".to_owned(), REFERENCE.to_owned())]);
            store.replace_folder(&[("a.yaml".to_owned(), text)]);
        }
    }
}

/// Every problem is in the file, or just behind its end.
fn check_places(text: &str) {
    let lines = text.matches(['\n', '\r']).count() + 1;
    for problem in parse_documents("a.yaml", text)
        .into_iter()
        .filter_map(Result::err)
    {
        assert!(
            (1..=lines + 1).contains(&problem.line),
            "{problem}: {text:?}"
        );
        assert!(problem.column >= 1, "{problem}");
        assert!(!problem.to_string().contains('\n'), "{problem}");
    }
}

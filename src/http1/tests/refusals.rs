//! Each refusal is real, documented, and named once.

use std::collections::BTreeSet;

use super::{End, corpus, run_with};
use crate::{config::Limits, http1::Refusal};

const PAGE: &str = include_str!("../../../docs/refusals.md");

/// What the owner of a connection raises; see `Connection::fail`.
const RAISED_ABOVE: [Refusal; 3] = [Refusal::BodyTimeout, Refusal::BodyTooSlow, Refusal::HeadTimeout];

/// One input for each refusal that no case of the corpus provokes.
fn more_inputs() -> Vec<Vec<u8>> {
    let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    [
        "GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\n\r\n".to_owned(),
        "ANMELDUNGSBESTAETIGUNGSFORMULARANFORDERUNG / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        format!("{chunked}0\r\n{}", format!("T: {}\r\n", "v".repeat(2000)).repeat(9)),
        format!("GET / HTTP/1.1\r\n{}", format!("T: {}\r\n", "v".repeat(2000)).repeat(9)),
    ]
    .into_iter()
    .map(String::into_bytes)
    .collect()
}

#[test]
fn every_refusal_is_provoked_by_some_input() {
    let mut inputs: Vec<Vec<u8>> = corpus::cases().into_iter().map(|case| case.raw).collect();
    inputs.extend(more_inputs());
    let mut provoked: BTreeSet<Refusal> = RAISED_ABOVE.into();
    for input in inputs {
        if let End::Refused(refusal) = run_with(&input, &Limits::default()).end {
            assert!(!RAISED_ABOVE.contains(&refusal));
            provoked.insert(refusal);
        }
    }
    let missing: Vec<&Refusal> = Refusal::ALL.iter().filter(|refusal| !provoked.contains(refusal)).collect();
    assert!(missing.is_empty(), "no input provokes {missing:?}");
}

#[test]
fn every_refusal_is_in_the_documentation_as_the_peer_is_told_it() {
    for refusal in Refusal::ALL {
        let (sentence, rule) = refusal.explain().rsplit_once(" (").expect("a sentence with its rule");
        let row = format!("| `{}` | {} | {sentence} | {} | ", refusal.reason(), refusal.status(), rule.trim_end_matches(")."));
        assert!(PAGE.contains(&row), "docs/refusals.md lacks the row {row}");
    }
    let rows = PAGE.lines().filter(|line| line.starts_with("| `") && !line.starts_with("| `--")).count();
    assert_eq!(rows, Refusal::ALL.len(), "docs/refusals.md has a row for something that does not exist");
}

#[test]
fn refusals_are_in_alphabetical_order_and_at_their_own_index() {
    let names: Vec<String> = Refusal::ALL.iter().map(|refusal| format!("{refusal:?}")).collect();
    assert!(names.is_sorted());
    assert!(Refusal::ALL.iter().enumerate().all(|(index, refusal)| *refusal as usize == index));
}

#[test]
fn reasons_are_the_names_of_their_variants_and_sentences_name_a_section() {
    for refusal in Refusal::ALL {
        let name = format!("{refusal:?}").to_lowercase();
        assert_eq!(refusal.reason().replace('-', ""), name);
        let sentence = refusal.explain();
        assert!(sentence.contains("(RFC ") && sentence.ends_with(").") && sentence.len() < 160, "{sentence}");
        assert_eq!(refusal.to_string(), sentence);
    }
}

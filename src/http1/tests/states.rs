//! The table of phases, and what a `Connection` makes of it.

use super::run;
use crate::http1::{Connection, Phase, Refusal, fuzzing::End, state::Step};

#[test]
fn exactly_seven_pairs_of_phase_and_step_are_legal() {
    let mut legal = Vec::new();
    for phase in Phase::ALL {
        for step in Step::ALL {
            if let Some(next) = phase.after(step) {
                legal.push((phase, step, next));
            }
        }
    }
    assert_eq!(
        legal,
        [
            (Phase::Head, Step::HeadEnd, Phase::Body),
            (Phase::Head, Step::Fail, Phase::Responding),
            (Phase::Body, Step::BodyEnd, Phase::Handling),
            (Phase::Body, Step::Fail, Phase::Responding),
            (Phase::Handling, Step::Respond, Phase::Responding),
            (Phase::Responding, Step::Flushed { keep_alive: true }, Phase::Head),
            (Phase::Responding, Step::Flushed { keep_alive: false }, Phase::Closing),
        ]
    );
}

#[test]
fn nothing_leads_out_of_closing() {
    assert!(Step::ALL.iter().all(|step| Phase::Closing.after(*step).is_none()));
}

#[test]
fn a_connection_that_failed_closes_even_if_its_owner_would_keep_it() {
    let mut connection = Connection::new();
    connection.fail();
    connection.flushed(true);
    assert_eq!(connection.phase(), Phase::Closing);
}

#[test]
fn a_peer_that_says_nothing_and_leaves_is_no_fault() {
    let mut connection = Connection::new();
    assert!(!connection.request_begun());
    assert_eq!(connection.peer_closed(0), Ok(()));
    assert_eq!(connection.phase(), Phase::Head);
}

#[test]
fn a_peer_that_leaves_after_an_empty_line_is_no_fault() {
    assert_eq!(run(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n\r\n").end, End::Open);
    assert_eq!(run(b"\r").end, End::Refused(Refusal::Truncated));
}

#[test]
fn a_peer_that_leaves_within_a_request_cuts_it_short() {
    for cut_short in [
        "G",
        "GET / HTTP/1.1\r\nHost: a\r\n\r",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhell",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    ] {
        let run = run(cut_short.as_bytes());
        assert_eq!(run.end, End::Refused(Refusal::Truncated), "{cut_short}");
        assert!(run.requests.is_empty());
    }
}

//! What the parser makes of some bytes, held against what the oracle makes of them.
//!
//! Included by the unit tests and by the fuzz target `oracle`, whose roots both know `oracle` and `uringd`.

use super::{
    oracle,
    uringd::{
        config::{Limits, Permit},
        http1::{
            Span, Version,
            fuzzing::{self, End, Request},
        },
    },
};

fn bounds(limits: &Limits) -> oracle::Bounds {
    oracle::Bounds {
        request_line: limits.request_line_bytes_max,
        fields: limits.fields_max,
        field: limits.field_bytes_max,
        head: limits.head_bytes_max,
        body: limits.body_bytes_max,
        chunk_line: limits.chunk_line_bytes_max,
    }
}

/// What was parsed, in the oracle's terms.
fn translate(request: &Request) -> oracle::Request {
    let (head, bytes) = (&request.head, &request.head_bytes);
    let owned = |span: Span| span.of(bytes).to_vec();
    oracle::Request {
        method: owned(head.method),
        path: owned(head.path),
        query: head.query.map(owned),
        host: head.host.map(owned),
        http11: head.version == Version::Http11,
        fields: head.fields.iter().map(|field| (owned(field.name), owned(field.value))).collect(),
        body: request.body.clone(),
        keep_alive: head.keep_alive,
        expect_continue: head.expect_continue,
    }
}

/// Holds the two readings against each other, and the parser's against that of the same bytes in pieces. `Ok`: whether
/// there was a request that both accept.
pub fn compare(bytes: &[u8], cuts: &[usize], limits: &Limits) -> Result<bool, String> {
    let run = fuzzing::run(bytes, &[], limits, Permit::default());
    if fuzzing::run(bytes, cuts, limits, Permit::default()) != run {
        return Err(format!("other events when cut at {cuts:?}"));
    }
    let reading = oracle::read(bytes, &bounds(limits));
    let requests: Vec<oracle::Request> = run.requests.iter().map(translate).collect();
    let agree = requests == reading.requests
        && match (&reading.end, run.end) {
            (oracle::End::Clean, End::Open) => true,
            (oracle::End::Closing, End::Closing) => true,
            // A refusal before the end of the request: it must not have been possible to go on.
            (oracle::End::Incomplete, End::Refused(_)) => true,
            (oracle::End::Wrong(statuses), End::Refused(refusal)) => statuses.contains(&refusal.status()),
            _ => false,
        };
    match agree {
        true => Ok(!requests.is_empty()),
        false => Err(format!("oracle: {reading:?}\nparser: {requests:?} {:?}", run.end)),
    }
}

/// For a fuzzer: the two agree about whatever `data` says is sent, under whatever limits.
#[allow(dead_code, reason = "the unit tests make their inputs themselves")]
pub fn fuzz(data: &[u8]) {
    if let Some((limits, cuts, bytes)) = fuzzing::instructions(data)
        && let Err(why) = compare(bytes, &cuts, &limits)
    {
        panic!("{}: {why}", bytes.escape_ascii());
    }
}

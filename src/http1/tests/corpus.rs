//! The cases of `tests/corpus`: known attacks, known quirks, and the answer that we want.

use serde_json::Value;

use super::{Random, fuzzing, run_with};
use crate::{
    config::{Limits, Permit},
    http1::{
        Refusal,
        fuzzing::{End, Run},
    },
};

/// A row of the corpus that this layer can judge.
pub(super) struct Case {
    pub(super) id: String,
    pub(super) raw: Vec<u8>,
    pub(super) limits: Limits,
    prefer: u64,
    allow: Vec<u64>,
    conn: String,
    /// Our cases name the refusal that ends them, if one does, so that each rule is told from all others.
    reason: Option<String>,
}

/// The shared cases, and our own that go further into each rule.
const CORPUS: [&str; 2] = [include_str!("../../../tests/corpus/http1-cases.jsonl"), include_str!("../../../tests/corpus/more-cases.jsonl")];

/// Rows whose preferred answer is not this layer's to give, or is another of the allowed ones; with the reason.
const EXCEPTIONS: [(&str, u64, &str); 2] = [
    ("CK-02z3", 413, "a chunk of 4 GiB + 5 is no overflow in 64 bits: it is too large, like any other above the limit"),
    ("KA-16", 200, "426 is the answer of a handler that speaks WebSocket"),
];

/// Rows whose connection ends for a reason above this layer.
const CLOSED_ABOVE: [(&str, &str); 1] = [("KA-17", "the number of requests on a connection is the shard's to count")];

/// Rows that suppose a limit of 64 KiB for bodies.
const SMALL_BODIES: [&str; 2] = ["CK-10", "KA-12"];

pub(super) fn cases() -> Vec<Case> {
    CORPUS.iter().flat_map(|file| file.lines()).filter_map(|line| case(&serde_json::from_str(line).expect("a row is JSON"))).collect()
}

fn case(row: &Value) -> Option<Case> {
    let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let id = text("id");
    if !["RL", "HD", "CL", "TE", "CK", "EX", "KA"].contains(&row["group"].as_str()?) {
        return None;
    }
    let raw = row["steps"].as_array().and_then(|list| steps(list)).or_else(|| row["raw"].as_str().map(latin1))?;
    let mut limits = Limits::default();
    if SMALL_BODIES.contains(&id.as_str()) {
        limits.body_bytes_max = 64 << 10;
    } else if !row["needs"].is_null() {
        return None;
    }
    let allow = row["allow"].as_array()?.iter().filter_map(Value::as_u64).collect();
    Some(Case {
        id,
        raw,
        limits,
        prefer: row["prefer"].as_u64()?,
        allow,
        conn: text("conn"),
        reason: row["reason"].as_str().map(str::to_owned),
    })
}

/// The bytes of a case in steps; `None` when it depends on time or on signals.
fn steps(steps: &[Value]) -> Option<Vec<u8>> {
    let mut raw = Vec::new();
    for step in steps {
        match (step["raw"].as_str(), step["action"].as_str()) {
            (Some(piece), _) => raw.extend(latin1(piece).repeat(step["repeat"].as_u64().unwrap_or(1) as usize)),
            (None, Some("wait for 100")) => {}
            _ => return None,
        }
    }
    Some(raw)
}

/// One character is one byte.
fn latin1(text: &str) -> Vec<u8> {
    text.chars().map(|character| u8::try_from(u32::from(character)).expect("a row is latin-1")).collect()
}

/// The status of the first answer; handlers answer 200.
fn first_status(run: &Run) -> u64 {
    match (run.requests.first(), run.end) {
        (Some(_), _) => 200,
        (None, End::Refused(refusal)) => u64::from(refusal.status()),
        (None, _) => 0,
    }
}

fn judge(case: &Case, run: &Run) -> Result<(), String> {
    let exception = EXCEPTIONS.iter().find(|(id, ..)| *id == case.id);
    let wanted = exception.map_or(case.prefer, |(_, status, _)| *status);
    let status = first_status(run);
    if status != wanted || !case.allow.contains(&status) && exception.is_none_or(|(id, ..)| *id != "KA-16") {
        return Err(format!("answered {status}, wanted {wanted}, allowed {:?}", case.allow));
    }
    let targets: Vec<&[u8]> = run.requests.iter().map(|request| request.head.path.of(&request.head_bytes)).collect();
    if targets.contains(&b"/evil".as_slice()) {
        return Err("a handler saw /evil".to_owned());
    }
    let reason = if let End::Refused(refusal) = run.end { Some(refusal.reason()) } else { None };
    if case.reason.is_some() && case.reason.as_deref() != reason {
        return Err(format!("refused as {reason:?}, wanted {:?}", case.reason));
    }
    let open = run.end == End::Open;
    let closed_above = CLOSED_ABOVE.iter().any(|(id, _)| *id == case.id);
    match case.conn.as_str() {
        "keep" if !open => Err(format!("the connection ended: {:?}", run.end)),
        "close" if open && !closed_above => Err("the connection stayed open".to_owned()),
        "keep" if contains(&case.raw, b"GET /next ") && targets.last() != Some(&b"/next".as_slice()) => {
            Err("the second request was not seen".to_owned())
        }
        _ => Ok(()),
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    memchr::memmem::find(haystack, needle).is_some()
}

/// Runs every case cut at the places that `cuts` makes for it and wants the same as from one piece.
fn check_cut(ways: impl Fn(&Case) -> Vec<Vec<usize>>) {
    for case in cases() {
        let whole = run_with(&case.raw, &case.limits);
        for cuts in ways(&case) {
            let run = fuzzing::run(&case.raw, &cuts, &case.limits, Permit::default());
            assert_eq!(run, whole, "{} cut at {cuts:?}", case.id);
        }
    }
}

#[test]
fn every_case_gets_the_preferred_answer() {
    let cases = cases();
    assert!(cases.len() > 950, "only {} cases were judged", cases.len());
    let wrong: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            let run = run_with(&case.raw, &case.limits);
            judge(case, &run).err().map(|why| format!("{}: {why}; {:?}", case.id, run.end))
        })
        .collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn cases_are_the_same_byte_by_byte() {
    check_cut(|case| match case.raw.len() {
        0..=300_000 => vec![(1..case.raw.len()).collect()],
        _ => vec![],
    });
}

#[test]
fn cases_are_the_same_in_any_two_pieces() {
    check_cut(|case| match case.raw.len() {
        0..=300 => (1..case.raw.len()).map(|cut| vec![cut]).collect(),
        _ => vec![],
    });
}

#[test]
fn cases_are_the_same_in_random_pieces() {
    let seed = 0x5eed_0001;
    check_cut(|case| {
        let mut random = Random(seed + case.raw.len() as u64);
        (0..10).map(|_| random.cuts(7, case.raw.len())).collect()
    });
}

#[test]
fn what_follows_a_case_does_not_change_it() {
    for case in cases() {
        let alone = run_with(&case.raw, &case.limits);
        for tail in [b"GET /tail HTTP/1.1\r\nHost: a\r\n\r\n".as_slice(), b"\x00\xff\r\n\r\n"] {
            let more = run_with(&[&case.raw, tail].concat(), &case.limits);
            match alone.end {
                // The case ends in the middle of a request, which the tail then continues.
                End::Refused(Refusal::Truncated) => continue,
                End::Open => assert_eq!(more.requests[..alone.requests.len()], alone.requests, "{}", case.id),
                End::Closing | End::Refused(_) => assert_eq!(more, alone, "{}", case.id),
            }
        }
    }
}

#[test]
fn cases_and_their_mutations_break_no_invariant() {
    let seed = 0x5eed_0002;
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    for case in cases().iter().filter(|case| case.raw.len() < 2000) {
        for _ in 0..20 {
            let count = random.below(8);
            let mut data = vec![(count << 1 | random.below(2)) as u8];
            data.extend(random.bytes(count * 2));
            data.extend(&case.raw);
            let at = random.below(case.raw.len()) + 1 + count * 2;
            if random.below(3) > 0 {
                data[at] = random.pick(b"\r\n\t ;:,0aZ\x00\xff\"");
            }
            fuzzing::fuzz_connection(&data);
            fuzzing::fuzz_chunked(&data);
        }
    }
}

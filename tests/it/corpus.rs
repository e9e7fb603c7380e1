//! The cases of tests/corpus, judged as the runner beside the shared original (http1-cases.jsonl) judges them; those of
//! more-cases.jsonl are our own and go further into each rule.
//!
//! One JSON object a line: `id`, `group`, `raw` (a character a byte), `prefer` (the status wanted), `allow` (statuses
//! also tolerated; 0 is closed without an answer), `conn` (close, keep, any), `why` (RFC section or CVE), `level`;
//! in more-cases.jsonl also `reason`, the refusal that ends it, which is judged in `src/http1/tests`.
//! A case passes when its first final status is allowed; a refused request is answered once and nothing more is
//! served; a connection that must close is closed, one that must stay open serves a further request; no handler
//! ever saw /evil; and all of that however the bytes were split. Groups with steps, timing or a misbehaving handler,
//! and cases that need an option, have tests of their own: `keep_alive`, `pipelining`, `framing`, `expect`,
//! `limits`, `slow_peer`, `half_close`, `drain`.

use std::{
    env, fs, io,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::{Client, End, PATIENCE, Random, Server, for_each_backend, get};

/// Groups that can be judged from their bytes alone.
const GROUPS: [&str; 5] = ["RL", "HD", "CL", "TE", "CK"];
/// A pause after which the server is taken to have said all it will.
const QUIET: Duration = Duration::from_millis(100);
/// Exchanges at the same time; they mostly wait.
const AT_ONCE: usize = 12;

struct Case {
    id: String,
    raw: Vec<u8>,
    half_close: bool,
    prefer: u16,
    allow: Vec<u16>,
    /// `close`, `keep` or `any`.
    connection: String,
    why: String,
}

#[test]
fn every_case_is_judged_right_whole() {
    judge_all(&cases(), Way::Whole, "builtin:echo", &[]);
}

#[test]
fn every_case_is_judged_right_byte_by_byte() {
    judge_all(&cases(), Way::Bytes, "builtin:echo", &[]);
}

#[test]
fn every_case_is_judged_right_split_at_random() {
    judge_all(&cases(), Way::Random, "builtin:echo", &[]);
}

/// What a refused request is followed by is no request, be it on the wire already.
#[test]
fn nothing_behind_a_refused_case_is_served() {
    let mut refused = cases();
    refused.retain(|case| case.prefer >= 400 && case.connection == "close" && !case.half_close);
    refused.iter_mut().for_each(|case| case.raw.extend(get("/evil").bytes()));
    assert!(refused.len() >= 500, "only {} cases are refused", refused.len());
    judge_all(&refused, Way::Whole, "builtin:echo", &[]);
}

/// With what a WSGI application was given in place of what a handler was given. `URINGD_TEST_PYTHON` names the interpreter.
#[test]
fn every_case_is_judged_right_before_a_python_application() {
    let python = env::var("URINGD_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    if !Command::new(&python).arg("-V").stdout(Stdio::null()).status().is_ok_and(|status| status.success()) {
        return crate::support::skipped("every_case_is_judged_right_before_a_python_application", "there is no Python");
    }
    let apps = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/apps");
    for way in [Way::Whole, Way::Bytes, Way::Random] {
        judge_all(&cases(), way, "conformance:app", &["--python", &python, "--chdir", apps, "--workers", "1"]);
    }
}

#[derive(Clone, Copy, Debug)]
enum Way {
    Whole,
    Bytes,
    Random,
}

/// Runs every case against a target that tells what it was given, several at once, and fails with the list of those that
/// fail.
fn judge_all(cases: &[Case], way: Way, target: &str, options: &[&str]) {
    for_each_backend(|backend| {
        let server = backend.serve(target, options);
        let random = Mutex::new(Random::new());
        let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| {
                    while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let pieces = pieces(&case.raw, way, &random);
                        if let Err(verdict) = judge(&server, case, &pieces) {
                            let start = crate::support::text(&case.raw[..case.raw.len().min(90)]);
                            failed.lock().unwrap().push(format!("{} {verdict}  {start:?}  ({})", case.id, case.why));
                        }
                    }
                });
            }
        });
        let mut failed = failed.into_inner().unwrap();
        failed.sort();
        assert!(failed.is_empty(), "{} of {} failed, {way:?}:\n{}", failed.len(), cases.len(), failed.join("\n"));
    });
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, least) in [("http1-cases.jsonl", 190), ("more-cases.jsonl", 750)] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
        let lines = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let rows = lines.lines().map(|line| serde_json::from_str::<Value>(line).expect("a JSON object a line"));
        let judged: Vec<Case> = rows.filter_map(|row| case(&row)).collect();
        assert!(judged.len() >= least, "only {} cases of {name} to judge", judged.len());
        cases.extend(judged);
    }
    cases
}

/// `None`: a case that bytes alone do not decide.
fn case(row: &Value) -> Option<Case> {
    let text = |key: &str| row[key].as_str().unwrap_or("").to_owned();
    let status = |value: &Value| u16::try_from(value.as_u64().unwrap()).unwrap();
    let judged = GROUPS.contains(&&*text("group")) && row["raw"].is_string() && row.get("needs").is_none();
    let steps = row["steps"].as_array().map_or(&[][..], Vec::as_slice);
    judged.then(|| Case {
        id: text("id"),
        raw: text("raw").chars().map(|byte| u8::try_from(byte).expect("latin-1")).collect(),
        half_close: steps.iter().any(|step| step["action"] == "shutdown_write"),
        prefer: status(&row["prefer"]),
        allow: row["allow"].as_array().unwrap().iter().map(status).collect(),
        connection: text("conn"),
        why: text("why"),
    })
}

fn pieces<'a>(raw: &'a [u8], way: Way, random: &Mutex<Random>) -> Vec<&'a [u8]> {
    match way {
        Way::Whole => vec![raw],
        Way::Bytes if raw.len() <= 600 => raw.chunks(1).collect(),
        Way::Bytes | Way::Random => random.lock().unwrap().pieces(raw, 6),
    }
}

fn judge(server: &Server, case: &Case, pieces: &[&[u8]]) -> Result<(), String> {
    let (answers, closed) = exchange(server, case, pieces);
    let finals: Vec<&Answer> = answers.iter().filter(|answer| !(100..200).contains(&answer.status)).collect();
    let status = finals.first().map_or(0, |answer| answer.status);
    if !case.allow.contains(&status) {
        let left = if closed { "" } else { ", left open" };
        return Err(format!("status {status}{left}; allowed {:?}", case.allow));
    }
    if status == 0 && !closed {
        return Err("no answer and left open".to_owned());
    }
    if answers.iter().any(|answer| answer.target().contains("/evil")) {
        return Err("a handler saw /evil".to_owned());
    }
    if status >= 400 && case.prefer >= 400 && finals.len() > 1 && case.connection == "close" {
        let statuses: Vec<u16> = finals.iter().map(|answer| answer.status).collect();
        return Err(format!("something was served after the {status}: {statuses:?}"));
    }
    if case.connection == "close" && !closed {
        return Err(format!("status {status} but the connection was left open"));
    }
    if case.connection == "keep" && status == case.prefer {
        let served = |target: &str| finals.iter().any(|answer| answer.body.contains(&format!("\"{target}\"")));
        if !served("/probe") {
            return Err(format!("status {status}, then the connection did not serve another request"));
        }
        if crate::support::find(&case.raw, b"GET /next").is_some() && !served("/next") {
            return Err("the second request on the wire was not served".to_owned());
        }
    }
    Ok(())
}

/// Sends the case, then (where the connection must stay open) a probe. The answers, and whether it was closed.
///
/// What must come is waited for as long as a busy machine may take: an answer, the probe's answer, or the end.
fn exchange(server: &Server, case: &Case, pieces: &[&[u8]]) -> (Vec<Answer>, bool) {
    let mut client = server.connect();
    // Refused while still sending: what was answered may still be there to read.
    let _ = send_pieces(&mut client, pieces);
    if case.half_close {
        client.finish_sending();
    }
    let (mut data, mut probed) = (String::new(), false);
    let patience = Instant::now() + PATIENCE;
    while Instant::now() < patience {
        match client.end_within(QUIET) {
            End::Eof | End::Reset => return (answers(&data), true),
            End::More(more) => data += &more,
            End::Open if answers(&data).iter().all(|answer| answer.status < 200) => {}
            End::Open if case.connection == "any" => break,
            End::Open if case.connection == "keep" && !probed => {
                probed = true;
                let _ = client.try_send(get("/probe"));
            }
            End::Open if probed && data.contains("/probe") => break,
            End::Open => {}
        }
    }
    (answers(&data), false)
}

fn send_pieces(client: &mut Client, pieces: &[&[u8]]) -> io::Result<()> {
    for (index, piece) in pieces.iter().enumerate() {
        if index > 0 {
            thread::sleep(Duration::from_micros(200));
        }
        client.try_send(piece)?;
    }
    Ok(())
}

/// One response as it came; the last of a connection may be incomplete.
#[derive(Debug)]
struct Answer {
    /// 0: no status line.
    status: u16,
    body: String,
}

impl Answer {
    /// The target that a handler says it was asked for.
    fn target(&self) -> &str {
        let after = self.body.split("\"target\":").nth(1).unwrap_or("").trim_start();
        after.strip_prefix('"').and_then(|target| target.split('"').next()).unwrap_or("")
    }
}

/// Splits what the server sent. A lenient reader: what it makes of a broken answer fails the case.
fn answers(mut data: &str) -> Vec<Answer> {
    let mut answers = Vec::new();
    while !data.is_empty() {
        let (answer, length) = answer(data);
        answers.push(answer);
        data = data.get(length..).unwrap_or("");
    }
    answers
}

/// The first answer in `data`, and its length.
fn answer(data: &str) -> (Answer, usize) {
    let status = data.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)).and_then(|digits| digits.parse().ok());
    let (Some(status), Some((head, rest))) = (status, data.split_once("\r\n\r\n")) else {
        return (Answer { status: 0, body: data.to_owned() }, data.len());
    };
    let field = |name: &str| {
        let mut fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
        fields.find(|field| field.0.eq_ignore_ascii_case(name)).map(|field| field.1.trim())
    };
    let length = if (100..200).contains(&status) || [204, 304].contains(&status) || rest.is_empty() {
        0
    } else if let Some(length) = field("content-length").and_then(|length| length.parse::<usize>().ok()) {
        rest.char_indices().nth(length).map_or(rest.len(), |(index, _)| index)
    } else if field("transfer-encoding") == Some("chunked") {
        rest.find("0\r\n\r\n").map_or(rest.len(), |end| end + 5)
    } else {
        rest.len()
    };
    (Answer { status, body: rest[..length].to_owned() }, head.len() + 4 + length)
}

#[test]
fn the_judge_takes_answers_apart() {
    let two = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n";
    let statuses: Vec<u16> = answers(two).iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200, 404]);
    let answers = answers("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{\"target\": \"/evil\"");
    assert_eq!((answers.len(), answers[1].target()), (2, "/evil"));
}

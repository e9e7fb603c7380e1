//! Random and mutated requests, read by the parser and by `tests/it/oracle.rs`, which share no code.

use super::{Random, compare::compare, corpus};
use crate::config::Limits;

/// Pieces that requests are made of, good and bad ones.
const METHODS: [&str; 10] = ["GET", "POST", "HEAD", "OPTIONS", "get", "CONNECT", "Foo", "G(T", "", "PUT"];
const TARGETS: [&str; 17] = [
    "/",
    "/a?b",
    "*",
    "http://a",
    "http://a/b?c",
    "HTTPS://A:1?x",
    "a:1",
    "/a#b",
    "ftp://a/",
    "http://u@a/",
    "//x",
    "/x//",
    "http://a//b",
    "http://a?//b",
    "/%00",
    "a",
    "/\u{7f}",
];
const VERSIONS: [&str; 8] = ["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/1.9", "HTTP/2.0", "HTTP/1.10", "http/1.1"];
const FIELDS: [&str; 41] = [
    "Host: a",
    "Host: a",
    "Host: a",
    "Host: a:1",
    "host:\tA",
    "Host: ",
    "Host: [::1]:80",
    "Host: [1:2::3.4.5.6]",
    "Host: a..b",
    "Host: a:99999",
    "Content-Length: 5",
    "Content-Length: 0",
    "content-length:005\t",
    "Content-Length: 5, 5",
    "Content-Length: +5",
    "Content-Length: 99999999999",
    "Content-Length: 9223372036854775808",
    "Content_Length: 7",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: chunked",
    "transfer-encoding:\tChunked ",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: chunked, chunked",
    "Transfer_Encoding: chunked",
    "Connection: close",
    "Connection: a, keep-alive",
    "Connection: ,Close,",
    "Expect: 100-continue",
    "Expect: 100-Continue",
    "Expect: x",
    "Expect: ,100-continue, ,",
    "X: y",
    "X:",
    "X : y",
    " X: y",
    "X",
    ": y",
    "X: a\tb \u{e9}",
    "Authorization: a",
    "Range: bytes=0-1",
];
const BODIES: [&str; 16] = [
    "",
    "hello",
    "5\r\nhello\r\n0\r\n\r\n",
    "5\r\nhello\r\n0\r\nX: y\r\n\r\n",
    "1;a=b\r\nx\r\n0;c\r\n\r\n",
    "0\r\n\r\n",
    "00005 ; a = \"q\\\"\" ;b\r\nhello\r\n000\r\n\r\n",
    "5;\r\nhello\r\n0\r\n\r\n",
    "5 \r\nhello\r\n0\r\n\r\n",
    "A\r\n0123456789\r\n0\r\n\r\n",
    "5\nhello\r\n0\r\n\r\n",
    "5\r\nhello0\r\n\r\n",
    "100000005\r\nhello\r\n",
    "11111111111111111\r\nx",
    "0\r\nX : y\r\n\r\n",
    "0\r\nX: y\r\n",
];
const LINE_ENDS: [&str; 24] = {
    let mut ends = ["\r\n"; 24];
    ends[0] = "\n";
    ends[1] = "\r";
    ends
};

fn generate(random: &mut Random) -> Vec<u8> {
    let mut text = String::new();
    if random.below(8) == 0 {
        text += "\r\n";
    }
    let space = if random.below(40) == 0 { "  " } else { " " };
    let method = if random.below(4) == 0 { random.pick(&METHODS) } else { random.pick(&METHODS[..2]) };
    let target = if random.below(3) == 0 { random.pick(&TARGETS) } else { random.pick(&TARGETS[..2]) };
    text += &[method, space, target, space, random.pick(&VERSIONS), "\r\n"].concat();
    if random.below(8) > 0 {
        text += "Host: a\r\n";
    }
    for _ in 0..random.below(4) {
        text += random.pick(&FIELDS);
        text += if random.below(10) == 0 { random.pick(&LINE_ENDS) } else { "\r\n" };
    }
    text += "\r\n";
    text += random.pick(&BODIES);
    text.into_bytes()
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(bytes.len() + 1);
    match random.below(6) {
        0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
        1 if at < bytes.len() => bytes[at] = random.pick(b"\r\n\t :;,\"\\/?#%@[]\x00\x0b\x7f\x80\xff09aAzZ-_"),
        2 => bytes.insert(at, random.pick(b"\r\n\t :;,\"\x00\xa00aZ")),
        3 => drop(bytes.drain(at..(at + random.below(4)).min(bytes.len()))),
        4 => {
            let end = (at + random.below(40)).min(bytes.len());
            let copy = bytes[at..end].to_vec();
            bytes.splice(at..at, copy);
        }
        _ => {
            let piece = random.pick(&FIELDS).as_bytes();
            bytes.splice(at..at, [b"\r\n", piece].concat());
        }
    }
}

/// Limits as they are, or so small that random requests meet them.
fn limits(random: &mut Random) -> Limits {
    match random.below(4) {
        0 => Limits {
            request_line_bytes_max: 10 + random.below(30),
            fields_max: 1 + random.below(4),
            field_bytes_max: 7 + random.below(30),
            head_bytes_max: 40 + random.below(80),
            body_bytes_max: random.below(12) as u64,
            chunk_line_bytes_max: 1 + random.below(20),
            ..Limits::default()
        },
        _ => Limits::default(),
    }
}

/// Compares `count` inputs made from `seed`; returns how many of them had a request that was accepted.
fn compare_many(seed: u64, count: usize, mut make: impl FnMut(&mut Random) -> Vec<u8>) -> usize {
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    let mut accepted = 0;
    for number in 0..count {
        let bytes = make(&mut random);
        let cuts = random.cuts(3, bytes.len());
        let limits = limits(&mut random);
        match compare(&bytes, &cuts, &limits) {
            Ok(any) => accepted += usize::from(any),
            Err(why) => panic!("seed {seed:#x}, input {number}: {}\n{limits:?}\n{why}", bytes.escape_ascii()),
        }
    }
    accepted
}

/// Set to try other inputs than those that everybody tries.
fn seed(default: u64) -> u64 {
    std::env::var("URINGD_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn generated_requests_mean_to_the_parser_what_they_mean_to_the_oracle() {
    let accepted = compare_many(seed(0x5eed_0003), 20_000, |random| {
        let mut bytes = generate(random);
        for _ in 0..random.below(3) {
            bytes.extend(generate(random));
        }
        bytes
    });
    assert!((2_000..18_000).contains(&accepted), "{accepted} inputs were accepted: the generator is lopsided");
}

#[test]
fn mutated_requests_mean_to_the_parser_what_they_mean_to_the_oracle() {
    let cases: Vec<Vec<u8>> = corpus::cases().into_iter().map(|case| case.raw).filter(|raw| raw.len() < 2000).collect();
    let accepted = compare_many(seed(0x5eed_0004), 30_000, |random| {
        let mut bytes = if random.below(2) == 0 { cases[random.below(cases.len())].clone() } else { generate(random) };
        for _ in 0..random.below(4) {
            mutate(&mut bytes, random);
        }
        bytes
    });
    assert!((2_000..28_000).contains(&accepted), "{accepted} inputs were accepted: the generator is lopsided");
}

#[test]
fn the_oracle_agrees_with_every_case() {
    for case in corpus::cases() {
        if let Err(why) = compare(&case.raw, &[], &case.limits) {
            panic!("{}: {why}", case.id);
        }
    }
}

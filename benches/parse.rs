//! What our rules cost above `httparse` alone, on a head as browsers send it, and what a trickle costs.
//!
//! `cargo bench --bench parse`. `ours` should stay below 1.25 times `httparse_alone` (benches/README.md has
//! what it was); `ours_in_two_pieces` pays for a second look, `ours_byte_by_byte` for one look at
//! each byte.

use std::{hint::black_box, mem::MaybeUninit};

use divan::Bencher;
use uringd::{
    config::{Limits, Permit},
    http1::{Connection, Event, Head},
};

/// 20 fields, about 700 bytes.
const BROWSER: &[u8] = b"GET /articles/2024/io-uring?page=2&sort=date HTTP/1.1\r\n\
    Host: www.example.com\r\n\
    Connection: keep-alive\r\n\
    Cache-Control: max-age=0\r\n\
    sec-ch-ua: \"Chromium\";v=\"140\", \"Not=A?Brand\";v=\"24\"\r\n\
    sec-ch-ua-mobile: ?0\r\n\
    sec-ch-ua-platform: \"Linux\"\r\n\
    DNT: 1\r\n\
    Upgrade-Insecure-Requests: 1\r\n\
    User-Agent: Mozilla/5.0 (X11; Linux x86_64) Chrome/140.0.0.0\r\n\
    Accept: text/html,application/xml;q=0.9,*/*;q=0.8\r\n\
    Sec-Fetch-Site: same-origin\r\n\
    Sec-Fetch-Mode: navigate\r\n\
    Sec-Fetch-User: ?1\r\n\
    Sec-Fetch-Dest: document\r\n\
    Referer: https://www.example.com/articles\r\n\
    Accept-Encoding: gzip, deflate, br\r\n\
    Accept-Language: en-US,en;q=0.9\r\n\
    Cookie: session=8f14e45fceea167a; theme=dark\r\n\
    If-None-Match: \"5d8c72a5\"\r\n\
    Priority: u=0, i\r\n\
    \r\n";

fn main() {
    divan::main();
}

#[divan::bench(sample_size = 1000)]
fn httparse_alone() -> usize {
    let mut fields = [const { MaybeUninit::uninit() }; 128];
    let mut request = httparse::Request::new(&mut []);
    let status = request.parse_with_uninit_headers(black_box(BROWSER), &mut fields).expect("a good head");
    assert!(status.is_complete());
    request.headers.len()
}

#[divan::bench(sample_size = 1000)]
fn ours(bencher: Bencher) {
    check(bencher, &[BROWSER.len()]);
}

#[divan::bench(sample_size = 1000)]
fn ours_in_two_pieces(bencher: Bencher) {
    check(bencher, &[BROWSER.len() / 2, BROWSER.len()]);
}

#[divan::bench(sample_size = 1000)]
fn ours_byte_by_byte(bencher: Bencher) {
    let ends: Vec<usize> = (1..=BROWSER.len()).collect();
    check(bencher, &ends);
}

/// Parses the head of a new connection, of which ever more bytes are there.
fn check(bencher: Bencher, ends: &[usize]) {
    let limits = Limits::default();
    let mut head = Head::default();
    bencher.bench_local(|| {
        let mut connection = Connection::new();
        for end in ends {
            let (count, event) =
                connection.next_event(black_box(&BROWSER[..*end]), &mut head, &limits, Permit::default()).expect("a good head");
            if event == Event::Head {
                assert_eq!(count, BROWSER.len());
            }
        }
        assert_eq!(head.fields.len(), 20);
    });
}

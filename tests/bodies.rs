//! Bodies, end to end and in one process: large requests become files before their handler runs, and streamed
//! responses hold no handler, however slowly they are read.

mod in_process;

use std::{
    io::{Read, Write},
    net::Shutdown,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use uringd::{Body, Config, Request, Response, Running, Server};

use in_process::{WAIT, connect, serve};

/// Streams that handlers are making at this moment.
static STREAMING: AtomicUsize = AtomicUsize::new(0);

fn application(request: &Request<'_>) -> Response {
    let number = || request.query().parse::<u64>().unwrap_or(0);
    match request.path() {
        "/sum" => {
            let mut body = request.body();
            let mut sum = 0u64;
            let mut buffer = [0; 8192];
            loop {
                match body.read(&mut buffer).expect("a complete body") {
                    0 => break,
                    n => sum += buffer[..n].iter().map(|&byte| u64::from(byte)).sum::<u64>(),
                }
            }
            let place = if request.body_bytes().is_some() { "memory" } else { "file" };
            Response::text(format!("{} {sum} {place}", body.len()))
        }
        "/stream" | "/sized" | "/short" => {
            let length = number();
            let made = if request.path() == "/short" { length - 1 } else { length };
            let write = move |out: &mut uringd::StreamWriter<'_>| {
                STREAMING.fetch_add(1, Ordering::SeqCst);
                let written = (0..made.div_ceil(1000)).try_for_each(|line| {
                    let left = (made - line * 1000).min(1000) as usize;
                    out.write_all(&pattern(line)[..left])
                });
                STREAMING.fetch_sub(1, Ordering::SeqCst);
                written
            };
            let body = if request.path() == "/stream" { Body::stream(write) } else { Body::stream_sized(length, write) };
            Response::new(200).body(body)
        }
        "/owned" => Response::new(200).body(expected(number() as usize)),
        "/long" => Response::new(200).body(Body::stream_sized(3, |out| out.write_all(b"abcdef"))),
        "/panic" => Response::new(200).body(Body::stream(|out| {
            out.write_all(b"begun")?;
            out.flush()?;
            panic!("planned");
        })),
        "/file" => {
            let mut file = std::env::temp_dir();
            file.push(format!("uringd-test-{}", std::process::id()));
            std::fs::write(&file, (0..number()).map(|i| i as u8).collect::<Vec<u8>>()).expect("a temporary file");
            let opened = std::fs::File::open(&file).expect("just written");
            let _ = std::fs::remove_file(&file);
            Response::new(200).body(Body::file(opened).expect("fstat"))
        }
        _ => Response::text("ok"),
    }
}

fn pattern(line: u64) -> [u8; 1000] {
    let mut bytes = [b'.'; 1000];
    bytes[..20].copy_from_slice(format!("{line:019}\n").as_bytes());
    bytes
}

fn expected(length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 1000);
    (0..length.div_ceil(1000) as u64).for_each(|line| bytes.extend_from_slice(&pattern(line)));
    bytes.truncate(length);
    bytes
}

/// With one handler thread.
fn each_backend(change: impl Fn(&mut Config), story: impl Fn(&str, &Running)) {
    let change = |config: &mut Config| {
        config.handlers = 1;
        change(config);
    };
    in_process::each_backend(|| Server::new(application), change, story);
}

fn ask(address: &str, request: &str) -> Vec<u8> {
    let mut stream = connect(address);
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer and its end");
    answer
}

fn get(address: &str, path: &str) -> (String, Vec<u8>) {
    split(ask(address, &format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")))
}

fn split(answer: Vec<u8>) -> (String, Vec<u8>) {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a head") + 4;
    (String::from_utf8(answer[..end].to_vec()).expect("ASCII"), answer[end..].to_vec())
}

/// Decodes chunks; `None` when the last one is missing.
fn unchunk(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = bytes.windows(2).position(|two| two == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).ok()?, 16).ok()?;
        bytes = &bytes[end + 2..];
        if size == 0 {
            return (bytes == b"\r\n").then_some(body);
        }
        body.extend_from_slice(bytes.get(..size)?);
        bytes = &bytes[size + 2..];
    }
}

/// Waits until a condition holds.
fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < WAIT, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The tests count streams and connections of the process: one at a time.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[test]
fn small_bodies_stay_in_memory_and_large_ones_arrive_whole_in_a_file() {
    let _alone = alone();
    each_backend(
        |_| {},
        |address, _| {
            for (length, place) in [(0usize, "memory"), (65_536, "memory"), (65_537, "file"), (200_000, "file"), (5_000_000, "file")] {
                let body: Vec<u8> = (0..length).map(|i| (i * 7) as u8).collect();
                let sum: u64 = body.iter().map(|&byte| u64::from(byte)).sum();
                let mut stream = connect(address);
                write!(stream, "POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n").expect("sent");
                stream.write_all(&body).expect("sent");
                // The connection goes on afterwards.
                write!(stream, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
                let mut answer = String::new();
                stream.read_to_string(&mut answer).expect("an answer and its end");
                assert!(answer.contains(&format!("\r\n\r\n{length} {sum} {place}")), "{length}: {answer}");
                assert!(answer.ends_with("ok"), "{answer}");
            }
        },
    );
}

#[test]
fn a_chunked_body_becomes_a_file_too() {
    let _alone = alone();
    each_backend(
        |_| {},
        |address, _| {
            let mut request = "POST /sum HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned();
            for _ in 0..300 {
                request += &format!("3e8\r\n{}\r\n", "\u{1}".repeat(1000));
            }
            request += "0\r\n\r\n";
            let (_, body) = split(ask(address, &request));
            assert_eq!(String::from_utf8_lossy(&body), "300000 300000 file");
        },
    );
}

#[test]
fn a_streamed_body_arrives_whole_however_long() {
    let _alone = alone();
    each_backend(
        |_| {},
        |address, _| {
            for length in [0usize, 1, 20_000, 3_000_000] {
                let (head, body) = get(address, &format!("/stream?{length}"));
                assert!(head.contains("Transfer-Encoding: chunked"), "{head}");
                assert!(unchunk(&body).is_some_and(|body| body == expected(length)), "{length}");
                let (head, body) = get(address, &format!("/sized?{length}"));
                assert!(head.contains(&format!("Content-Length: {length}\r\n")), "{head}");
                assert!(body == expected(length), "{length}");
                let (head, body) = split(ask(address, &format!("GET /stream?{length} HTTP/1.0\r\n\r\n")));
                assert!(!head.contains("chunked") && body == expected(length), "{length}");
            }
        },
    );
}

#[test]
fn a_body_that_breaks_its_promise_cannot_be_taken_for_a_whole_one() {
    let _alone = alone();
    each_backend(
        |_| {},
        |address, _| {
            let (head, body) = get(address, "/short?5000");
            assert!(head.contains("Content-Length: 5000") && body.len() == 4999);
            let two = "GET /long HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
            let answer = String::from_utf8(ask(address, two)).expect("ASCII");
            assert!(answer.contains("\r\n\r\nabcHTTP/1.1 200 OK\r\n"), "cut to its length: {answer}");
            let (head, body) = get(address, "/panic");
            assert!(head.starts_with("HTTP/1.1 200") && body == b"5\r\nbegun\r\n", "no last chunk: {body:?}");
        },
    );
}

#[test]
fn head_of_a_stream_has_no_body_and_the_handler_is_free() {
    let _alone = alone();
    each_backend(
        |_| {},
        |address, _| {
            let request = "HEAD /stream?5000000 HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
            let answer = String::from_utf8(ask(address, request)).expect("ASCII");
            assert!(answer.contains("GMT\r\n\r\nHTTP/1.1 200 OK\r\n") && answer.ends_with("ok"), "{answer}");
        },
    );
}

#[test]
fn a_file_is_sent_whole() {
    let _alone = alone();
    each_backend(
        |_| {},
        |address, _| {
            for length in [0usize, 10, 1_000_000] {
                let (head, body) = get(address, &format!("/file?{length}"));
                assert!(head.contains(&format!("Content-Length: {length}\r\n")), "{head}");
                assert!(body == (0..length).map(|i| i as u8).collect::<Vec<u8>>(), "{length}");
            }
        },
    );
}

#[test]
fn a_stream_to_a_client_that_does_not_read_goes_to_a_file_and_frees_its_handler() {
    let _alone = alone();
    each_backend(
        |_| {},
        |address, _| {
            let length = 60_000_000;
            let mut slow = connect(address);
            write!(slow, "GET /sized?{length} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
            // The only handler has made it all, though nothing has been read, and serves the next.
            assert!(get(address, "/").1 == b"ok");
            assert_eq!(STREAMING.load(Ordering::SeqCst), 0);
            let mut answer = Vec::new();
            slow.read_to_end(&mut answer).expect("all of it");
            assert!(split(answer).1 == expected(length));
        },
    );
}

#[test]
fn without_memory_for_responses_they_go_through_files_and_arrive_whole() {
    let _alone = alone();
    let tight = |config: &mut Config| config.limits.response_memory_total_bytes_max = 100_000;
    each_backend(tight, |address, running| {
        let length = 8_000_000;
        let slow: Vec<_> = (0..4)
            .map(|_| {
                let mut stream = connect(address);
                write!(stream, "GET /owned?{length} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
                stream
            })
            .collect();
        until("all are answered", || running.stats()[0].answers[2].read() == 4);
        for mut stream in slow {
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).expect("all of it");
            assert!(split(answer).1 == expected(length));
        }
    });
}

#[test]
fn a_handler_waits_for_a_client_that_does_not_read_as_long_as_the_send_limit_and_no_longer() {
    let _alone = alone();
    let small = |config: &mut Config| {
        config.limits.response_spool_bytes_max = 1 << 20;
        config.timeouts.send = Duration::from_millis(300);
    };
    each_backend(small, |address, running| {
        let mut stuck = connect(address);
        write!(stuck, "GET /stream?100000000 HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
        until("the handler is at work", || STREAMING.load(Ordering::SeqCst) == 1);
        until("the handler is free", || STREAMING.load(Ordering::SeqCst) == 0);
        until("the connection was reset", || running.stats()[0].send_timeouts.read() == 1);
        assert!(get(address, "/").1 == b"ok");
    });
}

#[test]
fn a_handler_learns_that_its_client_is_gone() {
    let _alone = alone();
    let small = |config: &mut Config| config.limits.response_spool_bytes_max = 1 << 20;
    each_backend(small, |address, _| {
        let mut gone = connect(address);
        write!(gone, "GET /stream?100000000 HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
        until("the handler is at work", || STREAMING.load(Ordering::SeqCst) == 1);
        drop(gone);
        until("the handler is free", || STREAMING.load(Ordering::SeqCst) == 0);
    });
}

#[test]
fn without_room_in_the_spool_large_bodies_get_507_and_others_are_served() {
    let _alone = alone();
    let full = |config: &mut Config| config.limits.spool_bytes_max = 100_000;
    each_backend(full, |address, running| {
        let mut stream = connect(address);
        write!(stream, "POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n").expect("sent");
        stream.write_all(&[1; 300_000]).expect("taken in or dropped");
        stream.shutdown(Shutdown::Write).expect("open");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer and its end");
        assert!(answer.starts_with("HTTP/1.1 507 "), "{answer}");
        assert_eq!(running.stats()[0].spool_full.read(), 1);
        let small = format!("POST /sum HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 9\r\n\r\n{}", "\u{1}".repeat(9));
        assert!(ask(address, &small).ends_with(b"9 9 memory"));
    });
}

#[test]
fn without_a_disk_large_bodies_get_507_at_once_for_a_while() {
    let _alone = alone();
    let nowhere = |config: &mut Config| config.spool_directory = "/nonexistent".into();
    each_backend(nowhere, |address, running| {
        for round in 0..2 {
            let mut stream = connect(address);
            write!(stream, "POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n").expect("sent");
            if round == 0 {
                // The second time it is refused at its head.
                stream.write_all(&[1; 300_000]).expect("taken in or dropped");
            }
            stream.shutdown(Shutdown::Write).expect("open");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("an answer and its end");
            assert!(answer.starts_with("HTTP/1.1 507 "), "{answer}");
        }
        assert_eq!(running.stats()[0].spool_errors.read(), 1);
        assert!(get(address, "/").1 == b"ok");
    });
}

#[test]
fn without_memory_for_bodies_they_get_503_and_requests_without_go_on() {
    let _alone = alone();
    let tight = |config: &mut Config| config.limits.body_memory_total_bytes_max = 50_000;
    each_backend(tight, |address, _| {
        let mut first = connect(address);
        write!(first, "POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n").expect("sent");
        first.write_all(&[1; 60_000]).expect("taken in or dropped");
        let mut answer = String::new();
        first.shutdown(Shutdown::Write).expect("open");
        first.read_to_string(&mut answer).expect("an answer and its end");
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("Retry-After: "), "{answer}");
        assert!(get(address, "/").1 == b"ok");
    });
}

#[test]
fn one_address_has_as_many_connections_as_it_may_and_others_are_reset() {
    let _alone = alone();
    let two = |config: &mut Config| config.limits.connections_per_ip_max = Some(2);
    each_backend(two, |address, running| {
        let held: Vec<_> = (0..2).map(|_| connect(address)).collect();
        until("both are open", || running.stats()[0].open.read() == 2);
        let mut third = connect(address);
        let refused = third.read(&mut [0; 1]);
        assert!(matches!(&refused, Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset), "{refused:?}");
        drop(held);
        until("both are gone", || running.stats()[0].open.read() == 0);
        assert!(get(address, "/").1 == b"ok");
    });
}

#[test]
fn the_answer_after_a_connections_life_is_its_last() {
    let _alone = alone();
    let short = |config: &mut Config| config.timeouts.life = Some(Duration::from_millis(1));
    each_backend(short, |address, _| {
        let mut stream = connect(address);
        let mut answer = String::new();
        // Longer than its life; no longer wait can make this fail.
        std::thread::sleep(Duration::from_millis(5));
        write!(stream, "GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("sent");
        stream.read_to_string(&mut answer).expect("an answer and its end");
        assert!(answer.contains("Connection: close\r\n"), "{answer}");
    });
}

#[test]
fn nothing_of_a_request_is_left_when_its_client_leaves_in_the_middle() {
    let _alone = alone();
    each_backend(
        |_| {},
        |address, running| {
            let before = std::fs::read_dir("/proc/self/fd").expect("Linux").count();
            let unfinished: Vec<_> = (0..8)
                .map(|_| {
                    let mut stream = connect(address);
                    write!(stream, "POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\n").expect("sent");
                    stream.write_all(&[1; 400_000]).expect("taken in");
                    stream
                })
                .collect();
            drop(unfinished);
            until("all are gone", || running.stats()[0].open.read() == 0);
            until("no file is left open", || std::fs::read_dir("/proc/self/fd").expect("Linux").count() <= before);
        },
    );
}

/// A closure is a handler, and so is what it captures.
#[test]
fn a_handler_shares_what_it_captures() {
    let _alone = alone();
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    let handler = move |_: &Request<'_>| format!("{}", count.fetch_add(1, Ordering::SeqCst));
    let story = |address: &str, _: &Running| assert!(get(address, "/").1 == b"0" && get(address, "/").1 == b"1");
    serve(Server::new(handler), |_| {}, story).expect("started");
    assert_eq!(seen.load(Ordering::SeqCst), 2);
}

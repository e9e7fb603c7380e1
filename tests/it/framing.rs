//! RFC 9112 sections 6 and 7, on good requests; the bad ones are cases of the corpus.

use crate::support::{CHUNKED, Random, Server, for_each_backend, get, post, text};

/// `request`, whose echo must be `body`, and behind it another request.
fn expect_body(server: &Server, request: &[u8], body: &str) {
    let mut client = server.connect();
    client.send([request, get("/next").as_bytes()].concat());
    assert_eq!(client.read_response().echo().is("body"), body);
    assert_eq!(client.read_response().echo().is("target"), "/next");
}

#[test]
fn a_body_with_a_length_reaches_the_handler() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        expect_body(&server, &post("/", "hello"), "hello");
        expect_body(&server, &post("/", ""), "");
        let all_bytes: Vec<u8> = (0..=255).collect();
        expect_body(&server, &post("/", &all_bytes), &text(&all_bytes));
    });
}

#[test]
fn a_chunked_body_reaches_the_handler_decoded() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        for (chunks, body) in [
            ("0\r\n\r\n", ""),
            ("5\r\nhello\r\n0\r\n\r\n", "hello"),
            ("1\r\nh\r\n2\r\nel\r\n2\r\nlo\r\n0\r\n\r\n", "hello"),
            ("A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", "01234567890123456789"),
            ("0005\r\nhello\r\n000\r\n\r\n", "hello"),
            ("2\r\n\r\n\r\n0\r\n\r\n", "\r\n"),
        ] {
            expect_body(&server, format!("{CHUNKED}{chunks}").as_bytes(), body);
        }
    });
}

#[test]
fn chunk_extensions_and_trailers_are_read_past() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        let chunks = "5;name=value;other=\"quoted\"\r\nhello\r\n0;last\r\nX-Trailer: v\r\nHost: evil\r\n\r\n";
        let echo = client.ask(format!("{CHUNKED}{chunks}")).echo();
        assert_eq!(echo.is("body"), "hello");
        assert_eq!(echo.field("x-trailer"), None, "a trailer became a header");
        assert_eq!(echo.field("host").as_deref(), Some("test"));
        client.expect_kept();
    });
}

#[test]
fn every_place_to_cut_a_request_gives_the_same_answer() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let chunked = format!("{CHUNKED}5;x=1\r\nhello\r\n0\r\nX-T: v\r\n\r\n");
        for request in [get("/cut?q").into_bytes(), post("/cut", "hello"), chunked.into_bytes()] {
            let mut client = server.connect();
            let whole = client.ask(&request).body;
            for cut in 1..request.len() {
                client.send_pieces([&request[..cut], &request[cut..]].into_iter());
                assert_eq!(text(&client.read_response().body), text(&whole), "cut after {cut} bytes");
            }
            client.send_byte_by_byte(&request);
            assert_eq!(text(&client.read_response().body), text(&whole), "byte by byte");
        }
    });
}

#[test]
fn large_bodies_arrive_whole_wherever_they_are_cut() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut random = Random::new();
        let body: String = (0..300_000).map(|number| char::from(b'a' + (number / 7 % 26) as u8)).collect();
        let mut chunked = CHUNKED.to_owned();
        for piece in random.pieces(body.as_bytes(), 50) {
            chunked += &format!("{:x}\r\n{}\r\n", piece.len(), text(piece));
        }
        chunked += "0\r\n\r\n";
        for request in [post("/", &body), chunked.into_bytes()] {
            for _ in 0..5 {
                let mut client = server.connect();
                client.send_split(&request, &mut random);
                assert!(client.read_response().echo().is("body") == body, "the body changed on its way");
            }
        }
    });
}

#[test]
fn bodies_of_every_size_around_the_buffers_arrive_whole() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        for edge in [1 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10] {
            for size in [edge - 1, edge, edge + 1] {
                let answer = client.ask(post("/", vec![b'x'; size]));
                assert_eq!(answer.echo().is("body").len(), size);
            }
        }
    });
}

/// Larger than what waits in memory: such a body goes through a file while it arrives.
#[test]
fn a_body_of_many_megabytes_arrives_whole() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let body = "0123456789abcdef".repeat(12 << 16);
        for _ in 0..4 {
            let answer = server.ask(post("/", &body));
            assert!(answer.echo().is("body") == body, "the body changed on its way");
        }
    });
}

#[test]
fn a_get_request_may_have_a_body() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let request = "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
        expect_body(&server, request.as_bytes(), "hello");
    });
}

#[test]
fn a_hundred_thousand_chunks_of_ten_bytes_are_accepted() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        let chunks = "a\r\n0123456789\r\n".repeat(100_000);
        let answer = client.ask(format!("{CHUNKED}{chunks}0\r\n\r\n"));
        assert_eq!(answer.echo().is("body").len(), 1_000_000);
    });
}

/// CK-05: each chunk costs six bytes on the wire and work, for one byte of body.
#[test]
fn a_million_chunks_of_one_byte_are_refused() {
    for_each_backend(|backend| {
        let server = backend.serve("builtin:echo", &[]);
        let mut client = server.connect();
        client.send(CHUNKED);
        let _ = client.try_send("1\r\nx\r\n".repeat(1_000_000) + "0\r\n\r\n");
        let answer = client.read_response();
        assert!([400, 413].contains(&answer.status), "{answer:?}");
        client.expect_closed();
    });
}

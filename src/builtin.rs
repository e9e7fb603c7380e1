//! The targets that come with the server: `builtin:welcome`, `hello`, `hello-pool`, `echo`, `sleep`, `stream`.

use std::{
    borrow::Cow,
    io::{Read, Write},
    sync::{Arc, LazyLock},
    thread,
    time::Duration,
};

use serde_json::json;

use crate::{
    driver::Peer,
    handler::{Body, Handler, Request, Response, Runs},
};

/// The longest that `builtin:sleep` sleeps.
const SLEEP_MAX: Duration = Duration::from_secs(3600);

/// The largest body that `builtin:echo` repeats: its answer is made in memory.
const ECHO_BYTES_MAX: u64 = 64 << 20;

/// `builtin:stream` has one answer of this size that every client shares: `/?bytes=8388608&shared`.
const SHARED_BYTES_MAX: usize = 8 << 20;

/// A built-in target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Builtin {
    /// A page that says what is running and what to do next.
    Welcome,
    /// `Hello, World!`, on the ring thread.
    Hello,
    /// The same, on a handler thread.
    HelloPool,
    /// The request as it was understood, as JSON.
    Echo,
    /// Sleeps `?ms=N`, then says so.
    Sleep,
    /// Streams `?bytes=N` from a handler thread.
    Stream,
}

impl Builtin {
    pub const NAMES: [(&'static str, Builtin); 6] = [
        ("builtin:welcome", Builtin::Welcome),
        ("builtin:hello", Builtin::Hello),
        ("builtin:hello-pool", Builtin::HelloPool),
        ("builtin:echo", Builtin::Echo),
        ("builtin:sleep", Builtin::Sleep),
        ("builtin:stream", Builtin::Stream),
    ];

    pub fn named(name: &str) -> Option<Builtin> {
        Builtin::NAMES.iter().find(|pair| pair.0 == name).map(|pair| pair.1)
    }

    pub fn name(self) -> &'static str {
        Builtin::NAMES.iter().find(|pair| pair.1 == self).map_or("", |pair| pair.0)
    }
}

impl Handler for Builtin {
    fn handle(&self, request: &Request<'_>) -> Response {
        match self {
            Builtin::Welcome => Response::html(include_str!("welcome.html")),
            Builtin::Hello | Builtin::HelloPool => Response::new(200).content_type("text/plain").body("Hello, World!"),
            Builtin::Echo => echo(request),
            Builtin::Sleep => sleep(request),
            Builtin::Stream => stream(request),
        }
    }

    fn runs(&self, _request: &Request<'_>) -> Runs {
        match self {
            Builtin::Welcome | Builtin::Hello => Runs::Inline,
            Builtin::HelloPool | Builtin::Echo | Builtin::Sleep | Builtin::Stream => Runs::OnPool,
        }
    }
}

fn echo(request: &Request<'_>) -> Response {
    let headers: Vec<_> = request.headers().map(|(name, value)| (name.to_ascii_lowercase(), latin1(value))).collect();
    let remote = match request.peer() {
        Peer::Inet(address) => address.to_string(),
        Peer::Unix => "unix".to_owned(),
    };
    let mut body = Vec::new();
    if request.body().len() > ECHO_BYTES_MAX || request.body().read_to_end(&mut body).is_err() {
        return Response::text("builtin:echo repeats bodies of 64 MiB at most\n").status(413);
    }
    let seen = json!({
        "method": request.method(),
        "target": request.target(),
        "path": request.path(),
        "query": request.query(),
        "version": request.version(),
        "headers": headers,
        "body": latin1(&body),
        "remote": remote,
    });
    Response::json(seen.to_string())
}

fn sleep(request: &Request<'_>) -> Response {
    let asked = request.query().split('&').find_map(|pair| pair.strip_prefix("ms="));
    match asked.unwrap_or("0").parse().map(Duration::from_millis) {
        Ok(time) if time <= SLEEP_MAX => {
            thread::sleep(time);
            Response::text(format!("slept {} ms\n", time.as_millis()))
        }
        _ => Response::text("ms should be a number of milliseconds, an hour at most: /?ms=250\n").status(400),
    }
}

fn stream(request: &Request<'_>) -> Response {
    const LINE: &[u8] = b"Hello, World!\n";
    static LINES: LazyLock<Arc<[u8]>> = LazyLock::new(|| LINE.repeat(SHARED_BYTES_MAX / LINE.len() + 1)[..SHARED_BYTES_MAX].into());
    let asked = request.query().split('&').find_map(|pair| pair.strip_prefix("bytes="));
    let Ok(length) = asked.unwrap_or("14").parse::<u64>() else {
        return Response::text("bytes should be a number: /?bytes=1000000\n").status(400);
    };
    let response = Response::new(200).content_type("text/plain");
    if request.query().ends_with("&shared") && length == SHARED_BYTES_MAX as u64 {
        return response.body(LINES.clone());
    }
    response.body(Body::stream_sized(length, move |out| {
        let lines = LINE.repeat(1000);
        let mut left = length;
        while left > 0 {
            let piece = lines.len().min(usize::try_from(left).unwrap_or(lines.len()));
            out.write_all(&lines[..piece])?;
            left -= piece as u64;
        }
        Ok(())
    }))
}

/// Each byte as the character of the same number, as HTTP/1.1 fields are read in CGI and WSGI.
fn latin1(bytes: &[u8]) -> Cow<'_, str> {
    match bytes.is_ascii() {
        true => String::from_utf8_lossy(bytes),
        false => bytes.iter().map(|&byte| char::from(byte)).collect(),
    }
}

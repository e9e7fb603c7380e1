//! A second reading of RFC 9112's request grammar: slow, obvious, with nothing in common with the parser it checks.
//!
//! It wants all bytes at once, splits them into lines, and holds every line against the ABNF. It does not stop at the
//! first broken rule but gathers the status of each, because which one a server meets first is its own choice: that
//! of a server under test must be among them, and when there are none, the server must accept.
//!
//! Only the standard library, no I/O, no clock.

use std::collections::BTreeSet;

/// Limits, as the server under test has them.
#[derive(Clone, Debug)]
pub struct Bounds {
    pub request_line: usize,
    pub fields: usize,
    pub field: usize,
    pub head: usize,
    pub body: u64,
    pub chunk_line: usize,
}

/// A request as the RFC defines it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    pub method: Vec<u8>,
    pub path: Vec<u8>,
    pub query: Option<Vec<u8>>,
    pub host: Option<Vec<u8>>,
    /// HTTP/1.0 when false.
    pub http11: bool,
    pub fields: Vec<(Vec<u8>, Vec<u8>)>,
    pub body: Vec<u8>,
    pub keep_alive: bool,
    pub expect_continue: bool,
}

/// What a connection's bytes are.
#[derive(Debug, PartialEq, Eq)]
pub struct Reading {
    pub requests: Vec<Request>,
    pub end: End,
}

#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// Nothing is left, or one empty line.
    Clean,
    /// The last request has no end. A server may refuse it early if it has its reasons.
    Incomplete,
    /// The last request said that the connection ends; what follows is nothing.
    Closing,
    /// The next request is wrong; these are the statuses of the rules that it breaks.
    Wrong(BTreeSet<u16>),
}

/// Reads all requests.
pub fn read(bytes: &[u8], bounds: &Bounds) -> Reading {
    let mut requests = Vec::new();
    let mut rest = bytes.to_vec();
    loop {
        if rest.is_empty() || rest == b"\r\n" {
            return Reading { requests, end: End::Clean };
        }
        match read_one(&rest, bounds) {
            Err(end) => return Reading { requests, end },
            Ok((request, length)) => {
                let keep_alive = request.keep_alive;
                requests.push(request);
                rest = rest[length..].to_vec();
                if !keep_alive {
                    return Reading { requests, end: End::Closing };
                }
            }
        }
    }
}

fn wrong(status: u16) -> End {
    End::Wrong(BTreeSet::from([status]))
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    (0..haystack.len()).find(|at| haystack[*at..].starts_with(needle))
}

fn read_one(bytes: &[u8], bounds: &Bounds) -> Result<(Request, usize), End> {
    let skip = if bytes.starts_with(b"\r\n") { 2 } else { 0 };
    if bytes[skip..].starts_with(b"\r\n") {
        return Err(wrong(400));
    }
    let Some(length) = find(&bytes[skip..], b"\r\n\r\n") else {
        return Err(End::Incomplete);
    };
    let head_length = skip + length + 4;
    let mut broken = BTreeSet::new();
    if head_length > bounds.head {
        broken.insert(431);
    }
    let lines = split_lines(&bytes[skip..skip + length]);
    let mut request = Request::default();
    let authority = read_request_line(&lines[0], bounds, &mut request, &mut broken);
    read_fields(&lines[1..], bounds, &mut request.fields, &mut broken);

    let hosts = values(&request.fields, "host");
    match hosts.as_slice() {
        [] if request.http11 => {
            broken.insert(400);
        }
        [] => request.host = authority,
        [host] => {
            if !is_host(host) || authority.is_some_and(|authority| !same(&authority, host)) {
                broken.insert(400);
            }
            request.host = Some(host.clone());
        }
        _ => {
            broken.insert(400);
        }
    }
    for name in [
        "authorization",
        "content-range",
        "content-type",
        "if-modified-since",
        "if-range",
        "if-unmodified-since",
        "max-forwards",
        "proxy-authorization",
        "range",
    ] {
        if values(&request.fields, name).len() > 1 {
            broken.insert(400);
        }
    }

    let lengths = values(&request.fields, "content-length");
    let codings = values(&request.fields, "transfer-encoding");
    let mut content_length = 0;
    if let Some(length) = lengths.first() {
        match std::str::from_utf8(length).ok().filter(|text| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit())) {
            None => drop(broken.insert(400)),
            Some(digits) => {
                let digits = digits.trim_start_matches('0');
                let maximum = "9223372036854775807";
                if digits.len() > maximum.len() || (digits.len() == maximum.len() && digits > maximum) {
                    broken.insert(400);
                } else {
                    content_length = digits.parse::<u64>().unwrap_or(0);
                    if content_length > bounds.body {
                        broken.insert(413);
                    }
                }
            }
        }
    }
    if lengths.len() > 1 || codings.len() > 1 || (!lengths.is_empty() && !codings.is_empty()) {
        broken.insert(400);
    }
    if let Some(coding) = codings.first() {
        if !request.http11 {
            broken.insert(400);
        }
        let names: Vec<Vec<u8>> = coding.split(|byte| *byte == b',').map(trim).collect();
        let chunked = names.iter().filter(|name| same(name, b"chunked")).count();
        let last = names.last().is_some_and(|name| same(name, b"chunked"));
        if chunked != 1 || !last || names.iter().any(Vec::is_empty) {
            broken.insert(400);
        } else if names.len() > 1 {
            broken.insert(501);
        }
    }

    if request.method == b"TRACE" && (content_length > 0 || !codings.is_empty()) {
        broken.insert(400);
    }

    let options: Vec<Vec<u8>> = values(&request.fields, "connection")
        .iter()
        .flat_map(|value| value.split(|byte| *byte == b',').map(trim).collect::<Vec<_>>())
        .collect();
    let close = options.iter().any(|option| same(option, b"close"));
    let keep = options.iter().any(|option| same(option, b"keep-alive"));
    request.keep_alive = !close && (request.http11 || keep);

    let expectations: Vec<Vec<u8>> = values(&request.fields, "expect")
        .iter()
        .flat_map(|value| value.split(|byte| *byte == b',').map(trim).collect::<Vec<_>>())
        .filter(|expectation| !expectation.is_empty())
        .collect();
    if expectations.iter().any(|expectation| !same(expectation, b"100-continue")) {
        broken.insert(417);
    }
    request.expect_continue = !expectations.is_empty() && request.http11 && (content_length > 0 || !codings.is_empty());

    if !broken.is_empty() {
        return Err(End::Wrong(broken));
    }
    let rest = &bytes[head_length..];
    if !codings.is_empty() {
        let (body, length) = read_chunked(rest, bounds)?;
        request.body = body;
        return Ok((request, head_length + length));
    }
    let content_length = content_length as usize;
    if rest.len() < content_length {
        return Err(End::Incomplete);
    }
    request.body = rest[..content_length].to_vec();
    Ok((request, head_length + content_length))
}

/// At each CRLF. A CR or LF elsewhere stays in its line, where no rule allows it.
fn split_lines(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut lines = vec![Vec::new()];
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"\r\n") {
            lines.push(Vec::new());
            at += 2;
        } else {
            lines.last_mut().expect("there is one from the start").push(bytes[at]);
            at += 1;
        }
    }
    lines
}

/// `request-line = method SP request-target SP HTTP-version`; returns the authority of an absolute-form target.
fn read_request_line(line: &[u8], bounds: &Bounds, request: &mut Request, broken: &mut BTreeSet<u16>) -> Option<Vec<u8>> {
    if line.len() > bounds.request_line {
        broken.insert(414);
    }
    // The method ends where its bytes do: a line that is one long token breaks two rules.
    if line.iter().take_while(|byte| is_tchar(**byte)).count() > 32 {
        broken.insert(501);
    }
    let parts: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let [method, target, version] = parts.as_slice() else {
        broken.insert(400);
        // Too many or too few parts may well begin like a request for another version.
        if parts.iter().any(|part| part.starts_with(b"HTTP/")) {
            broken.insert(505);
        }
        return None;
    };
    request.method = method.to_vec();
    if method.is_empty() || !method.iter().all(|byte| is_tchar(*byte)) {
        broken.insert(400);
    }
    for known in ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"] {
        if same(method, known.as_bytes()) && *method != known.as_bytes() {
            broken.insert(501);
        }
    }
    match version {
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
            if *major != b'1' {
                broken.insert(505);
            }
            request.http11 = *minor != b'0';
        }
        _ => drop(broken.insert(400)),
    }
    read_target(method, target, request, broken)
}

fn read_target(method: &[u8], target: &[u8], request: &mut Request, broken: &mut BTreeSet<u16>) -> Option<Vec<u8>> {
    if target.is_empty() || target.iter().any(|byte| *byte <= b' ' || *byte > b'~' || *byte == b'#') {
        broken.insert(400);
        return None;
    }
    if method == b"CONNECT" {
        let port = target.rsplit(|byte| *byte == b':').next().filter(|port| port.len() < target.len());
        let authority = is_host(target) && port.is_some_and(|port| !port.is_empty() && port.iter().all(u8::is_ascii_digit));
        broken.insert(if authority { 405 } else { 400 });
        return None;
    }
    let (before, query) = match find(target, b"?") {
        Some(at) => (&target[..at], Some(target[at + 1..].to_vec())),
        None => (target, None),
    };
    request.query = query;
    // `path-absolute` does not begin with two slashes (RFC 3986 section 3.3).
    if before.starts_with(b"//") {
        broken.insert(400);
    }
    if target[0] == b'/' || (target == b"*" && method == b"OPTIONS") {
        request.path = before.to_vec();
        return None;
    }
    let lower = before.to_ascii_lowercase();
    let start = [&b"http://"[..], b"https://"].iter().find(|scheme| lower.starts_with(scheme)).map(|scheme| scheme.len());
    let Some(start) = start else {
        broken.insert(400);
        return None;
    };
    if lower.starts_with(b"https") {
        broken.insert(421);
    }
    let end = find(&before[start..], b"/").map_or(before.len(), |at| start + at);
    request.path = if end == before.len() { b"/".to_vec() } else { before[end..].to_vec() };
    if before[end..].starts_with(b"//") {
        broken.insert(400);
    }
    let authority = before[start..end].to_vec();
    if !is_host(&authority) {
        broken.insert(400);
    }
    Some(authority)
}

/// `field-line = field-name ":" OWS field-value OWS`
fn read_fields(lines: &[Vec<u8>], bounds: &Bounds, fields: &mut Vec<(Vec<u8>, Vec<u8>)>, broken: &mut BTreeSet<u16>) {
    if lines.len() > bounds.fields {
        broken.insert(431);
    }
    for line in lines {
        if line.len() > bounds.field {
            broken.insert(431);
        }
        let Some(colon) = find(line, b":") else {
            broken.insert(400);
            continue;
        };
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        if name.is_empty() || !name.iter().all(|byte| is_tchar(*byte)) {
            broken.insert(400);
        }
        if value.iter().any(|byte| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f) {
            broken.insert(400);
        }
        fields.push((name.to_vec(), trim(value)));
    }
}

/// `chunked-body = *chunk last-chunk trailer-section CRLF`; returns the data and how long it all was.
fn read_chunked(bytes: &[u8], bounds: &Bounds) -> Result<(Vec<u8>, usize), End> {
    let mut data = Vec::new();
    let mut at = 0;
    loop {
        let Some(length) = find(&bytes[at..], b"\r\n") else {
            return Err(End::Incomplete);
        };
        let line = &bytes[at..at + length];
        at += length + 2;
        let mut broken = BTreeSet::new();
        let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        if digits == 0 || digits > 16 || line.len() > bounds.chunk_line || !is_chunk_extensions(&line[digits..]) {
            broken.insert(400);
        }
        let text = String::from_utf8_lossy(&line[..digits.min(16)]).into_owned();
        let size = u64::from_str_radix(&text, 16).unwrap_or(0);
        if size > bounds.body || data.len() as u64 + size > bounds.body {
            broken.insert(413);
        }
        // Not in the RFC: framing must stay in proportion to the data, this chunk's included.
        if (at - data.len()) as u64 > 65536 + 2 * (data.len() as u64).saturating_add(size).min(1 << 60) {
            broken.insert(400);
        }
        if !broken.is_empty() {
            return Err(End::Wrong(broken));
        }
        if size == 0 {
            break;
        }
        let size = size as usize;
        if bytes.len() < at + size + 2 {
            return Err(End::Incomplete);
        }
        data.extend_from_slice(&bytes[at..at + size]);
        if &bytes[at + size..at + size + 2] != b"\r\n" {
            return Err(wrong(400));
        }
        at += size + 2;
    }
    if bytes[at..].starts_with(b"\r\n") {
        return Ok((data, at + 2));
    }
    let Some(length) = find(&bytes[at..], b"\r\n\r\n") else {
        return Err(End::Incomplete);
    };
    let mut broken = BTreeSet::new();
    if length + 4 > bounds.head {
        broken.insert(431);
    }
    read_fields(&split_lines(&bytes[at..at + length]), bounds, &mut Vec::new(), &mut broken);
    if broken.is_empty() { Ok((data, at + length + 4)) } else { Err(End::Wrong(broken)) }
}

/// `chunk-ext = *( BWS ";" BWS chunk-ext-name [ BWS "=" BWS chunk-ext-val ] )`
fn is_chunk_extensions(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while !rest.is_empty() {
        let Some(after) = skip_bws(rest).strip_prefix(b";") else {
            return false;
        };
        let Some(after_name) = skip_token(skip_bws(after)) else {
            return false;
        };
        rest = match skip_bws(after_name).strip_prefix(b"=") {
            None => after_name,
            Some(value) => {
                let value = skip_bws(value);
                match skip_token(value).or_else(|| skip_quoted(value)) {
                    Some(after_value) => after_value,
                    None => return false,
                }
            }
        };
    }
    true
}

fn skip_bws(bytes: &[u8]) -> &[u8] {
    let count = bytes.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    &bytes[count..]
}

fn skip_token(bytes: &[u8]) -> Option<&[u8]> {
    let count = bytes.iter().take_while(|byte| is_tchar(**byte)).count();
    (count > 0).then(|| &bytes[count..])
}

/// `quoted-string = DQUOTE *( qdtext / quoted-pair ) DQUOTE`
fn skip_quoted(bytes: &[u8]) -> Option<&[u8]> {
    let mut rest = bytes.strip_prefix(b"\"")?;
    loop {
        rest = match rest {
            [b'"', rest @ ..] => return Some(rest),
            [b'\\', b'\t' | b' '..=b'~' | 0x80.., rest @ ..] => rest,
            [b'\t' | b' ' | b'!' | b'#'..=b'[' | b']'..=b'~' | 0x80.., rest @ ..] => rest,
            _ => return None,
        };
    }
}

/// `Host = uri-host [ ":" port ]`, uri-host not empty and without empty labels.
fn is_host(bytes: &[u8]) -> bool {
    let (host, port) = match bytes.first() {
        Some(b'[') => match find(bytes, b"]") {
            Some(end) => (&bytes[..end + 1], &bytes[end + 1..]),
            None => return false,
        },
        _ => bytes.split_at(find(bytes, b":").unwrap_or(bytes.len())),
    };
    if !port.is_empty() {
        let digits = &port[1..];
        let number = String::from_utf8_lossy(digits).parse::<u32>().unwrap_or(0);
        if port[0] != b':' || digits.len() > 5 || !digits.iter().all(u8::is_ascii_digit) || number > 65535 {
            return false;
        }
    }
    if host.first() == Some(&b'[') {
        return is_ipv6(&String::from_utf8_lossy(&host[1..host.len() - 1]));
    }
    let name = host.strip_suffix(b".").unwrap_or(host);
    name.split(|byte| *byte == b'.').all(|label| !label.is_empty() && is_label(label))
}

/// `*( unreserved / pct-encoded / sub-delims )` without dots and commas.
fn is_label(mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        bytes = match bytes {
            [b'%', high, low, rest @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => rest,
            [byte, rest @ ..] if byte.is_ascii_alphanumeric() || b"-_~!$&'()*+;=".contains(byte) => rest,
            _ => return false,
        };
    }
    true
}

/// `IPv6address` (RFC 3986 section 3.2.2): eight groups, or fewer with one `::` that stands for the others.
fn is_ipv6(text: &str) -> bool {
    match text.split_once("::") {
        None => groups(text, true) == Some(8),
        Some((before, after)) => match (groups(before, false), groups(after, true)) {
            (Some(before), Some(after)) => before + after <= 7,
            _ => false,
        },
    }
}

/// How many 16-bit groups a list has; `None` when it is not one. An IPv4 address at the end counts two.
fn groups(text: &str, ipv4_allowed: bool) -> Option<usize> {
    if text.is_empty() {
        return Some(0);
    }
    let parts: Vec<&str> = text.split(':').collect();
    let mut count = 0;
    for (index, part) in parts.iter().enumerate() {
        let last = index + 1 == parts.len();
        if (1..=4).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            count += 1;
        } else if last && ipv4_allowed && is_ipv4(part) {
            count += 2;
        } else {
            return None;
        }
    }
    Some(count)
}

fn is_ipv4(text: &str) -> bool {
    let octets: Vec<&str> = text.split('.').collect();
    octets.len() == 4
        && octets.iter().all(|octet| {
            (1..=3).contains(&octet.len())
                && octet.bytes().all(|byte| byte.is_ascii_digit())
                && (octet.len() == 1 || !octet.starts_with('0'))
                && octet.parse::<u32>().is_ok_and(|value| value <= 255)
        })
}

fn is_tchar(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Without spaces and tabs on either side.
fn trim(bytes: &[u8]) -> Vec<u8> {
    let ows = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = bytes.iter().position(|byte| !ows(byte)).unwrap_or(bytes.len());
    let end = bytes.iter().rposition(|byte| !ows(byte)).map_or(start, |last| last + 1);
    bytes[start..end].to_vec()
}

fn same(left: &[u8], right: &[u8]) -> bool {
    left.eq_ignore_ascii_case(right)
}

fn values(fields: &[(Vec<u8>, Vec<u8>)], name: &str) -> Vec<Vec<u8>> {
    fields.iter().filter(|(field, _)| same(field, name.as_bytes())).map(|(_, value)| value.clone()).collect()
}

//! The request target, and hosts as they are written there and in the Host field.
//!
//! ```text
//! request-target = origin-form      /path?query             every method but CONNECT
//!                / absolute-form    http://host/path?query  every method but CONNECT
//!                / authority-form   host:port               CONNECT only
//!                / asterisk-form    *                       OPTIONS only      (RFC 9112 section 3.2)
//! ```
//!
//! Bytes that RFC 3986 does not allow in paths and queries, but that browsers send (`|`, `[`, `{` and such), pass;
//! whitespace, control characters, `#` and whatever is not ASCII do not. Nothing is decoded here.

use std::{net::Ipv6Addr, str};

use super::{error::Refusal, request::Span};
use crate::config::Permit;

/// A target, taken apart. Offsets are relative to the target.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) path: Span,
    /// Without the question mark.
    pub(super) query: Option<Span>,
    /// Of an absolute-form.
    pub(super) authority: Option<Span>,
}

impl Target {
    /// A path that begins with `//` is refused, unless permitted: `path-absolute` "begins with "/" but not "//""
    /// (RFC 3986 section 3.3), although `absolute-path` of RFC 9110 section 4.1 lets it. An application that redirects
    /// to the path it was asked for, with a slash added or a name changed, would send the client to the host named
    /// there: `Location: //evil.example/` is a network-path reference. An absolute-form's path is under the same rule,
    /// since handlers see it the same way.
    #[inline(always)]
    pub(super) fn parse(method: &[u8], target: &[u8], permit: Permit) -> Result<Target, Refusal> {
        // One look for both, without a branch per byte; there is neither in a good target.
        if target.iter().fold(false, |seen, byte| seen | !byte.is_ascii() | (*byte == b'#')) {
            return Err(if target.is_ascii() { Refusal::TargetFragment } else { Refusal::TargetBad });
        }
        let question = memchr::memchr(b'?', target);
        match (method, target) {
            (b"CONNECT", _) if is_authority_form(target) => Err(Refusal::ConnectUnsupported),
            (b"CONNECT", _) => Err(Refusal::TargetForm),
            (_, [b'/', b'/', ..]) if !permit.double_slash => Err(Refusal::TargetDoubleSlash),
            (_, [b'/', ..]) => Ok(Target::from_path(target, 0, question, None)),
            (b"OPTIONS", b"*") => Ok(Target::from_path(target, 0, question, None)),
            _ => Target::absolute(target, question, permit),
        }
    }

    #[inline(always)]
    fn from_path(target: &[u8], start: usize, question: Option<usize>, authority: Option<Span>) -> Target {
        let end = target.len();
        Target { path: Span::new(start, question.unwrap_or(end)), query: question.map(|question| Span::new(question + 1, end)), authority }
    }

    /// "a server MUST accept the absolute-form in requests even though most HTTP/1.1 clients will only send the
    /// absolute-form to a proxy" (RFC 9112 section 3.2.2).
    fn absolute(target: &[u8], question: Option<usize>, permit: Permit) -> Result<Target, Refusal> {
        let Some(colon) = memchr::memmem::find(target, b"://") else {
            return Err(Refusal::TargetForm);
        };
        match &target[..colon] {
            scheme if scheme.eq_ignore_ascii_case(b"http") => {}
            // "a request for an "https" resource MUST be rejected unless it has been received over a connection that has
            // been secured", or comes from a gateway that is trusted (RFC 9110 section 7.4).
            scheme if scheme.eq_ignore_ascii_case(b"https") && permit.https_target => {}
            scheme if scheme.eq_ignore_ascii_case(b"https") => return Err(Refusal::TargetHttps),
            scheme => return Err(if is_scheme(scheme) { Refusal::TargetScheme } else { Refusal::TargetForm }),
        }
        let start = colon + 3;
        let rest = &target[start..];
        let end = start + memchr::memchr2(b'/', b'?', rest).unwrap_or(rest.len());
        let authority = &target[start..end];
        if authority.contains(&b'@') {
            return Err(Refusal::TargetUserinfo);
        }
        if !is_host(authority) {
            return Err(Refusal::HostBad);
        }
        if target[end..].starts_with(b"//") && !permit.double_slash {
            return Err(Refusal::TargetDoubleSlash);
        }
        let mut parsed = Target::from_path(target, end, question, Some(Span::new(start, end)));
        if parsed.path.is_empty() {
            // An empty path means "/" (RFC 9110 section 4.2.3). A span has to point at one: the scheme's second slash.
            parsed.path = Span::new(start - 1, start);
        }
        Ok(parsed)
    }
}

/// `scheme = ALPHA *( ALPHA / DIGIT / "+" / "-" / "." )` (RFC 3986 section 3.1).
fn is_scheme(bytes: &[u8]) -> bool {
    matches!(bytes, [first, rest @ ..] if first.is_ascii_alphabetic()
        && rest.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte)))
}

/// `authority-form = uri-host ":" port` (RFC 9112 section 3.2.3); a tunnel needs its port.
fn is_authority_form(bytes: &[u8]) -> bool {
    is_host(bytes) && bytes.last().is_some_and(u8::is_ascii_digit) && bytes.contains(&b':') && !bytes.ends_with(b"]")
}

/// `Host = uri-host [ ":" port ]` (RFC 9110 section 7.2), uri-host not empty: "If the authority component is missing
/// or undefined for the target URI, then a client MUST send a Host header field with an empty field-value", which is
/// never so for http and https.
pub(crate) fn is_host(bytes: &[u8]) -> bool {
    is_plain_name(bytes) || is_any_host(bytes)
}

/// True for what nearly every client sends: letters, digits and hyphens, with single dots between. Eight bytes at a time.
#[inline(always)]
fn is_plain_name(bytes: &[u8]) -> bool {
    let Some(last) = bytes.last_chunk::<8>() else {
        return false;
    };
    // Each piece begins with the byte that ended the one before, so that no two dots are missed.
    let mut plain = bytes[0] != b'.' && is_plain_piece(*last);
    let mut rest = bytes;
    while let (true, Some(piece), true) = (plain, rest.first_chunk::<8>(), rest.len() > 8) {
        plain = is_plain_piece(*piece);
        rest = &rest[7..];
    }
    plain
}

/// Eight comparisons in one: `within` sets the high bit of each byte that is in a range, which no carry leaves as long as
/// all bytes are ASCII.
#[inline(always)]
fn is_plain_piece(piece: [u8; 8]) -> bool {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGH: u64 = ONES << 7;
    let within = |bytes: u64, first: u8, last: u8| (bytes + ONES * u64::from(0x80 - first)) & !(bytes + ONES * u64::from(0x7f - last));
    let bytes = u64::from_le_bytes(piece);
    if bytes & HIGH != 0 {
        return false;
    }
    let marks = within(bytes, b'-', b'.') & HIGH;
    // Of a hyphen and a dot, the dot has bit 1.
    let dots = marks & bytes << 6;
    let others = within(bytes | ONES << 5, b'a', b'z') | within(bytes, b'0', b'9');
    (marks | others) & HIGH == HIGH && dots & dots << 8 == 0
}

// Not inlined: plain names, which nearly all hosts are, need no stack.
#[inline(never)]
fn is_any_host(bytes: &[u8]) -> bool {
    match bytes {
        [b'[', rest @ ..] => match memchr::memchr(b']', rest) {
            Some(end) => is_ipv6(&rest[..end]) && is_port_or_nothing(&rest[end + 1..]),
            None => false,
        },
        _ => {
            let end = name_length(bytes);
            end > 0 && is_port_or_nothing(&bytes[end..])
        }
    }
}

/// `IP-literal` without its brackets. IPvFuture is left out: no such addresses exist.
fn is_ipv6(bytes: &[u8]) -> bool {
    str::from_utf8(bytes).is_ok_and(|text| text.parse::<Ipv6Addr>().is_ok())
}

/// How many bytes at the beginning are a name; 0 when what is there is not one.
///
/// `reg-name = *( unreserved / pct-encoded / sub-delims )` (RFC 3986 section 3.2.2), made of labels that are not empty,
/// as in the DNS; one dot may end it. An IPv4 address is such a name, too. Of `sub-delims` the comma is left out: what it
/// separates are two Host fields that somebody in between made one (RFC 9110 section 5.3).
fn name_length(bytes: &[u8]) -> usize {
    // As if a dot stood before the first byte: a label must not be empty.
    let mut before = DOT;
    let (mut seen, mut twice) = (0, 0);
    let mut length = 0;
    for &byte in bytes {
        let kind = KINDS[byte as usize];
        if kind == 0 {
            break;
        }
        seen |= kind;
        twice |= before & kind;
        before = kind;
        length += 1;
    }
    let wrong = twice & DOT != 0 || seen & PERCENT != 0 && has_bad_escape(&bytes[..length]);
    if wrong { 0 } else { length }
}

/// True when a percent sign is not followed by two hexadecimal digits.
fn has_bad_escape(bytes: &[u8]) -> bool {
    let mut escapes = bytes.split(|byte| *byte == b'%').skip(1);
    escapes.any(|rest| !matches!(rest, [high, low, ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit()))
}

/// Kinds of bytes that a name may have, as bits.
const LETTER: u8 = 1;
const PERCENT: u8 = 2;
const DOT: u8 = 4;

/// `unreserved`, `sub-delims` but the comma, and the percent sign; 0 for what no name has.
static KINDS: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        if (byte as u8).is_ascii_alphanumeric() {
            table[byte] = LETTER;
        }
        byte += 1;
    }
    let others = b"-_~!$&'()*+;=";
    let mut index = 0;
    while index < others.len() {
        table[others[index] as usize] = LETTER;
        index += 1;
    }
    table[b'.' as usize] = DOT;
    table[b'%' as usize] = PERCENT;
    table
};

/// Nothing, or a colon and a port, which may be empty (RFC 3986 section 3.2.3).
fn is_port_or_nothing(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [b':', digits @ ..] if digits.len() <= 5 && digits.iter().all(u8::is_ascii_digit) => {
            digits.iter().fold(0, |port, digit| port * 10 + u32::from(digit - b'0')) <= 65535
        }
        _ => false,
    }
}

//! The grammar of heads and trailer sections, one byte at a time.
//!
//! This is the road for heads that come in pieces and for heads that are wrong; a good head that is
//! there at once never takes it (`connection.rs`). Every byte is looked at once, so a trickled head
//! costs no more than its length, and a refusal depends on the bytes before it and on nothing else:
//! not on how they were split, not on what follows. It must accept exactly what `request.rs` accepts
//! in syntax and in length; what the fields mean is decided there.

use super::error::Refusal;
use crate::config::Limits;

/// Longest method, in bytes; beyond it: 501, as RFC 9112 section 3 suggests. The longest registered one,
/// UPDATEREDIRECTREF, has 17.
pub(super) const METHOD_BYTES_MAX: usize = 32;

/// How far a head has been looked at.
#[derive(Debug, Default)]
pub(super) struct HeadScan {
    state: HeadState,
    /// Bytes looked at, from the beginning of the request, a leading empty line included.
    at: u32,
    /// Where the request line begins: 0, or 2 after an empty line.
    line_start: u32,
    /// Where the digit of a minor version above 1 is; 0 when there is none.
    newer_minor_at: u32,
    fields: FieldLines,
}

/// What is expected next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum HeadState {
    #[default]
    Start,
    EmptyLineLf,
    MethodFirst,
    Method,
    TargetFirst,
    Target,
    /// The byte of `HTTP/1.1` with this index, or the CR after it.
    Version(u8),
    VersionLf,
    /// The line ended before its version.
    ShortLineLf,
    Fields,
}

impl HeadScan {
    /// Bytes of the request seen so far.
    pub(super) fn scanned(&self) -> usize {
        self.at as usize
    }

    /// True when nothing of a request is there but at most one empty line, which some clients send after a body
    /// (RFC 9112 section 2.2).
    pub(super) fn between_requests(&self) -> bool {
        matches!(self.state, HeadState::Start | HeadState::MethodFirst)
    }

    /// Where the minor version's digit is, when it is above 1. Such a request is read as HTTP/1.1: "a server SHOULD
    /// send a response version equal to the highest version to which the server is conformant that has a major
    /// version less than or equal to the one received" (RFC 9110 section 2.5).
    pub(super) fn newer_minor_at(&self) -> Option<usize> {
        (self.newer_minor_at > 0).then_some(self.newer_minor_at as usize)
    }

    /// Looks at the bytes of `input` that were not there the last time; returns the head's length once it is complete.
    pub(super) fn run(&mut self, input: &[u8], limits: &Limits) -> Result<Option<usize>, Refusal> {
        let bytes_max = limits.head_bytes_max.min(u32::MAX as usize);
        while let Some(&byte) = input.get(self.scanned()) {
            if self.scanned() >= bytes_max {
                return Err(Refusal::HeadTooLarge);
            }
            if self.state == HeadState::Fields {
                let within_limit = &input[self.scanned()..input.len().min(bytes_max)];
                let skipped = self.fields.skip_value(within_limit, limits);
                if skipped > 0 {
                    self.at += skipped;
                    continue;
                }
            }
            let end = match self.state {
                HeadState::Fields => self.fields.push(byte, limits)?,
                _ => {
                    self.state = self.request_line(byte, input, limits)?;
                    false
                }
            };
            self.at += 1;
            if end {
                return Ok(Some(self.scanned()));
            }
        }
        Ok(None)
    }

    fn request_line(&mut self, byte: u8, input: &[u8], limits: &Limits) -> Result<HeadState, Refusal> {
        let length = (self.at - self.line_start) as usize;
        let ending = matches!(self.state, HeadState::EmptyLineLf | HeadState::VersionLf | HeadState::ShortLineLf);
        if length >= limits.request_line_bytes_max && byte != b'\r' && !ending {
            return Err(Refusal::RequestLineTooLong);
        }
        Ok(match (self.state, byte) {
            (HeadState::VersionLf, b'\n') => self.version_end(input)?,
            (HeadState::ShortLineLf, b'\n') => return Err(Refusal::RequestLineBad),
            (HeadState::EmptyLineLf, b'\n') => {
                self.line_start = self.at + 1;
                HeadState::MethodFirst
            }
            (HeadState::VersionLf | HeadState::ShortLineLf | HeadState::EmptyLineLf, _) => return Err(Refusal::BareCr),
            (_, b'\n') => return Err(Refusal::BareLf),

            // "a server that is expecting to receive and parse a request-line SHOULD ignore at least one empty line"
            // (RFC 9112 section 2.2). One is what broken clients send; more is work for nothing.
            (HeadState::Start, b'\r') => HeadState::EmptyLineLf,
            (HeadState::MethodFirst, b'\r') => return Err(Refusal::EmptyLines),
            (HeadState::Start | HeadState::MethodFirst, b' ') => return Err(Refusal::RequestLineBad),
            (HeadState::Start | HeadState::MethodFirst, _) if is_tchar(byte) => HeadState::Method,

            (HeadState::Method, b' ') => HeadState::TargetFirst,
            (HeadState::Method | HeadState::Target, b'\r') => HeadState::ShortLineLf,
            (HeadState::Method, _) if is_tchar(byte) && length >= METHOD_BYTES_MAX => return Err(Refusal::MethodTooLong),
            (HeadState::Method, _) if is_tchar(byte) => HeadState::Method,
            (HeadState::Start | HeadState::MethodFirst | HeadState::Method, _) => return Err(Refusal::MethodBad),

            (HeadState::TargetFirst, b' ' | b'\r') => return Err(Refusal::RequestLineBad),
            (HeadState::Target, b' ') => HeadState::Version(0),
            (HeadState::TargetFirst | HeadState::Target, b'#') => return Err(Refusal::TargetFragment),
            (HeadState::TargetFirst | HeadState::Target, b'!'..=b'~') => HeadState::Target,
            (HeadState::TargetFirst | HeadState::Target, _) => return Err(Refusal::TargetBad),

            (HeadState::Version(index), _) => version_byte(index, byte)?,
            (HeadState::Fields, _) => HeadState::Fields,
        })
    }

    /// "A server can send a 505 response if it wishes, for any reason, to refuse service of the client's major
    /// protocol version" (RFC 9110 section 2.5).
    fn version_end(&mut self, input: &[u8]) -> Result<HeadState, Refusal> {
        // The line ends with the major digit, a dot, the minor digit, CR, and the LF that `at` is at.
        let minor_at = self.at.saturating_sub(2);
        let digit = |at: u32| input.get(at as usize).copied().unwrap_or(b'0');
        if digit(minor_at.saturating_sub(2)) != b'1' {
            return Err(Refusal::VersionUnsupported);
        }
        if digit(minor_at) > b'1' {
            self.newer_minor_at = minor_at;
        }
        Ok(HeadState::Fields)
    }
}

/// `HTTP-version = HTTP-name "/" DIGIT "." DIGIT`, and "HTTP-version is case-sensitive" (RFC 9112 section 2.3).
fn version_byte(index: u8, byte: u8) -> Result<HeadState, Refusal> {
    let fits = match index {
        0 => byte == b'H',
        1 | 2 => byte == b'T',
        3 => byte == b'P',
        4 => byte == b'/',
        5 | 7 => byte.is_ascii_digit(),
        6 => byte == b'.',
        _ => byte == b'\r',
    };
    match (fits, index) {
        (false, _) => Err(Refusal::VersionBad),
        (true, 0..=7) => Ok(HeadState::Version(index + 1)),
        (true, _) => Ok(HeadState::VersionLf),
    }
}

/// The lines of a header or trailer section, up to and including the empty one.
///
/// ```text
/// field-line = field-name ":" OWS field-value OWS        (RFC 9112 section 5)
/// ```
#[derive(Debug, Default)]
pub(super) struct FieldLines {
    state: FieldState,
    /// Bytes of the current line.
    line: u32,
    /// Lines begun.
    count: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum FieldState {
    #[default]
    LineFirst,
    Name,
    Value,
    LineLf,
    EndLf,
}

impl FieldLines {
    /// Takes the section's next byte; `true` when it was the last.
    pub(super) fn push(&mut self, byte: u8, limits: &Limits) -> Result<bool, Refusal> {
        let ending = matches!(self.state, FieldState::LineLf | FieldState::EndLf);
        if self.line as usize >= limits.field_bytes_max && byte != b'\r' && !ending {
            return Err(Refusal::FieldTooLong);
        }
        self.line += 1;
        self.state = match (self.state, byte) {
            (FieldState::EndLf, b'\n') => return Ok(true),
            (FieldState::LineLf, b'\n') => {
                self.line = 0;
                FieldState::LineFirst
            }
            (FieldState::EndLf | FieldState::LineLf, _) => return Err(Refusal::BareCr),
            (_, b'\n') => return Err(Refusal::BareLf),

            (FieldState::LineFirst, b'\r') => FieldState::EndLf,
            // "A server that receives an obs-fold in a request message that is not within a message/http container
            // MUST either reject the message [...] or replace" (RFC 9112 section 5.2); and before the first field,
            // "MUST either reject the message as invalid or consume" (section 2.2).
            (FieldState::LineFirst, b' ' | b'\t') => return Err(Refusal::FieldFolded),
            (FieldState::LineFirst, _) if is_tchar(byte) => {
                self.count += 1;
                if self.count as usize > limits.fields_max {
                    return Err(Refusal::FieldsTooMany);
                }
                FieldState::Name
            }
            (FieldState::LineFirst, _) => return Err(Refusal::FieldNameBad),

            (FieldState::Name, b':') => FieldState::Value,
            // "A server MUST reject, with a response status code of 400 (Bad Request), any received request message
            // that contains whitespace between a header field name and colon" (RFC 9112 section 5.1).
            (FieldState::Name, b' ' | b'\t') => return Err(Refusal::FieldNameSpace),
            (FieldState::Name, b'\r') => return Err(Refusal::FieldWithoutColon),
            (FieldState::Name, _) if is_tchar(byte) => FieldState::Name,
            (FieldState::Name, _) => return Err(Refusal::FieldNameBad),

            (FieldState::Value, b'\r') => FieldState::LineLf,
            (FieldState::Value, _) if is_field_byte(byte) => FieldState::Value,
            (FieldState::Value, _) => return Err(Refusal::FieldValueControl),
        };
        Ok(false)
    }

    /// Takes as many bytes as are plainly part of a value, which is what most of a large head is made of; the same as
    /// to `push` each of them.
    fn skip_value(&mut self, bytes: &[u8], limits: &Limits) -> u32 {
        if self.state != FieldState::Value {
            return 0;
        }
        let room = limits.field_bytes_max.saturating_sub(self.line as usize).min(bytes.len());
        let count = bytes[..room].iter().take_while(|byte| is_field_byte(**byte)).count() as u32;
        self.line += count;
        count
    }
}

/// `tchar`: what methods, field names and chunk extensions are made of (RFC 9110 section 5.6.2).
pub(super) const fn is_tchar(byte: u8) -> bool {
    matches!(byte,
        b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
        | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z')
}

/// `field-vchar`, SP and HTAB. Of other control characters a recipient may "retain" some (RFC 9110 section 5.5);
/// no client needs them, so none passes.
pub(super) const fn is_field_byte(byte: u8) -> bool {
    matches!(byte, b'\t' | b' '..=b'~' | 0x80..)
}

//! Where a body ends, and what its bytes are.
//!
//! Nothing is held back here: every byte given is consumed, framing is checked and dropped, and data
//! are handed on as slices of the input. Trailers are read as strictly as header fields and then
//! dropped; they are never merged into the head (RFC 9110 section 6.5.1), whatever they are named.
//!
//! ```text
//! chunk        = 1*HEXDIG *( BWS ";" BWS name [ BWS "=" BWS value ] ) CRLF data CRLF
//! chunked-body = *chunk last-chunk trailer-section CRLF             (RFC 9112 section 7.1)
//! ```

use super::{
    connection::Event,
    error::Refusal,
    scan::{FieldLines, is_field_byte, is_tchar},
};
use crate::config::Limits;

/// How the end of a request's body is found (RFC 9112 section 6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    #[default]
    None,
    /// `Content-Length`, in bytes; may be 0.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
}

/// What of a body is still to come.
#[derive(Debug)]
pub(super) enum Body {
    Length(u64),
    Chunked(Chunked),
}

impl Body {
    pub(super) fn new(framing: Framing) -> Body {
        match framing {
            Framing::None => Body::Length(0),
            Framing::Length(length) => Body::Length(length),
            Framing::Chunked => Body::Chunked(Chunked::default()),
        }
    }

    /// True when nothing more has to arrive.
    pub(super) fn is_complete(&self) -> bool {
        matches!(self, Body::Length(0))
    }

    pub(super) fn next_event<'a>(&mut self, input: &'a [u8], limits: &Limits) -> Result<(usize, Event<'a>), Refusal> {
        match self {
            Body::Length(0) => Ok((0, Event::End)),
            Body::Length(remaining) => Ok(match take(remaining, input) {
                [] => (0, Event::NeedData),
                data => (data.len(), Event::Body(data)),
            }),
            Body::Chunked(chunked) => chunked.next_event(input, limits),
        }
    }
}

/// As much of `input` as belongs to the `remaining` bytes.
fn take<'a>(remaining: &mut u64, input: &'a [u8]) -> &'a [u8] {
    let length = usize::try_from(*remaining).unwrap_or(usize::MAX).min(input.len());
    *remaining -= length as u64;
    &input[..length]
}

/// The chunked coding, undone.
#[derive(Debug, Default)]
pub(super) struct Chunked {
    state: ChunkState,
    /// Hexadecimal digits of the current size.
    digits: u8,
    /// Bytes of the current size line, then of the trailer section.
    line: u32,
    /// The size as far as it was read, then what of the chunk's data is still to come.
    remaining: u64,
    /// Data announced by all chunks so far.
    decoded: u64,
    /// Bytes that were not data.
    framing: u64,
    trailers: FieldLines,
}

/// What is expected next. `Bws` is whitespace that may stand there but should not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ChunkState {
    #[default]
    SizeFirst,
    Size,
    /// BWS, then a semicolon.
    Semicolon,
    /// BWS, then the first byte of an extension's name.
    NameFirst,
    Name,
    /// BWS, then an equals sign or a semicolon.
    NameEnd,
    /// BWS, then the first byte of an extension's value.
    ValueFirst,
    Value,
    Quoted,
    QuotedPair,
    QuotedEnd,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    Trailers,
}

impl Chunked {
    fn next_event<'a>(&mut self, input: &'a [u8], limits: &Limits) -> Result<(usize, Event<'a>), Refusal> {
        let mut at = 0;
        loop {
            if self.state == ChunkState::Data {
                let data = take(&mut self.remaining, &input[at..]);
                if self.remaining == 0 {
                    self.state = ChunkState::DataCr;
                }
                return Ok(match data {
                    [] => (at, Event::NeedData),
                    data => (at + data.len(), Event::Body(data)),
                });
            }
            let Some(&byte) = input.get(at) else {
                return Ok((at, Event::NeedData));
            };
            at += 1;
            if self.framing_byte(byte, limits)? {
                return Ok((at, Event::End));
            }
        }
    }

    /// Takes a byte that is not data; `true` when it was the body's last.
    fn framing_byte(&mut self, byte: u8, limits: &Limits) -> Result<bool, Refusal> {
        self.framing += 1;
        self.state = match (self.state, byte) {
            (ChunkState::Trailers, _) => {
                self.line += 1;
                if self.line as usize > limits.head_bytes_max.min(u32::MAX as usize) {
                    return Err(Refusal::TrailersTooLarge);
                }
                if self.trailers.push(byte, limits)? {
                    return Ok(true);
                }
                ChunkState::Trailers
            }
            (ChunkState::SizeLf, b'\n') => self.size_end(limits)?,
            (ChunkState::SizeLf, _) => return Err(Refusal::BareCr),
            (ChunkState::DataCr, b'\r') => ChunkState::DataLf,
            (ChunkState::DataLf, b'\n') => ChunkState::SizeFirst,
            (ChunkState::DataCr | ChunkState::DataLf, _) => return Err(Refusal::ChunkDataUnterminated),
            (state, _) => {
                if self.line as usize >= limits.chunk_line_bytes_max && byte != b'\r' {
                    return Err(Refusal::ChunkLineTooLong);
                }
                self.line += 1;
                self.size_line(state, byte)?
            }
        };
        Ok(false)
    }

    /// "A recipient MUST ignore unrecognized chunk extensions" and "ought to limit the total length of chunk
    /// extensions" (RFC 9112 section 7.1.1). Ours recognizes none, but looks at each byte: what it skips unread,
    /// somebody else may take for the end of the line.
    fn size_line(&mut self, state: ChunkState, byte: u8) -> Result<ChunkState, Refusal> {
        Ok(match (state, byte) {
            (_, b'\n') => return Err(Refusal::BareLf),
            (ChunkState::SizeFirst | ChunkState::Size, _) if byte.is_ascii_hexdigit() => self.size_digit(byte)?,
            (ChunkState::SizeFirst, _) => return Err(Refusal::ChunkSizeBad),

            (ChunkState::Size | ChunkState::Name | ChunkState::Value | ChunkState::QuotedEnd, b'\r') => ChunkState::SizeLf,
            (
                ChunkState::Size
                | ChunkState::Semicolon
                | ChunkState::Name
                | ChunkState::NameEnd
                | ChunkState::Value
                | ChunkState::QuotedEnd,
                b';',
            ) => ChunkState::NameFirst,
            (ChunkState::Size | ChunkState::Semicolon | ChunkState::Value | ChunkState::QuotedEnd, b' ' | b'\t') => ChunkState::Semicolon,
            (ChunkState::Size, _) => return Err(Refusal::ChunkSizeBad),

            (ChunkState::NameFirst, b' ' | b'\t') => ChunkState::NameFirst,
            (ChunkState::NameFirst | ChunkState::Name, _) if is_tchar(byte) => ChunkState::Name,
            (ChunkState::Name | ChunkState::NameEnd, b' ' | b'\t') => ChunkState::NameEnd,
            (ChunkState::Name | ChunkState::NameEnd, b'=') => ChunkState::ValueFirst,
            (ChunkState::ValueFirst, b' ' | b'\t') => ChunkState::ValueFirst,
            (ChunkState::ValueFirst, b'"') => ChunkState::Quoted,
            (ChunkState::ValueFirst | ChunkState::Value, _) if is_tchar(byte) => ChunkState::Value,
            (ChunkState::Quoted, b'"') => ChunkState::QuotedEnd,
            (ChunkState::Quoted, b'\\') => ChunkState::QuotedPair,
            (ChunkState::Quoted | ChunkState::QuotedPair, _) if is_field_byte(byte) => ChunkState::Quoted,
            _ => return Err(Refusal::ChunkExtensionBad),
        })
    }

    /// "Recipients MUST anticipate potentially large hexadecimal numerals and prevent parsing errors due to integer
    /// conversion overflows" (RFC 9112 section 7.1). Leading zeros count, else a size could be endless.
    fn size_digit(&mut self, byte: u8) -> Result<ChunkState, Refusal> {
        if self.digits == 16 {
            return Err(Refusal::ChunkSizeOverflow);
        }
        self.digits += 1;
        let digit = (byte as char).to_digit(16).unwrap_or(0);
        self.remaining = self.remaining << 4 | u64::from(digit);
        Ok(ChunkState::Size)
    }

    fn size_end(&mut self, limits: &Limits) -> Result<ChunkState, Refusal> {
        self.decoded = self.decoded.saturating_add(self.remaining);
        if self.decoded > limits.body_bytes_max {
            return Err(Refusal::BodyTooLarge);
        }
        if self.framing > FRAMING_BYTES_FREE.saturating_add(self.decoded.saturating_mul(FRAMING_BYTES_PER_BYTE)) {
            return Err(Refusal::ChunkOverhead);
        }
        self.digits = 0;
        self.line = 0;
        Ok(if self.remaining == 0 { ChunkState::Trailers } else { ChunkState::Data })
    }
}

/// Framing that a body may have in excess of [`FRAMING_BYTES_PER_BYTE`], in bytes. Enough for some 20,000 chunks of
/// one byte, as a client may send that forwards what somebody types.
const FRAMING_BYTES_FREE: u64 = 64 << 10;

/// Bytes of framing that each byte of data pays for. A chunk of one byte has five bytes of framing, one of ten bytes
/// has half a byte of framing for each; so bodies of chunks of three bytes and more never meet this limit unless
/// they have extensions. Without it, reading a body could be made to cost a hundred times its size
/// (Go CVE-2023-39326).
const FRAMING_BYTES_PER_BYTE: u64 = 2;

//! What a peer can do wrong, one variant per misdeed, and what it is told about it.
//!
//! A [`Refusal`] is always the peer's fault; the server's own troubles (a full queue, a handler that
//! failed) are not here. Each is answered once with its status, and then the connection closes: after
//! a broken rule nobody can say where the next request begins (RFC 9112 section 9.6).
//!
//! The reasons are names that operators count and search by, so a released one never changes its
//! meaning. `docs/refusals.md` explains them; a test keeps the two together.

use std::{error, fmt};

/// Writes the enum, its list and its table in one place, so that none can lack a variant.
macro_rules! refusals {
    ($($variant:ident $status:literal $reason:literal $explain:literal)*) => {
        /// The peer broke HTTP/1.1 or passed a limit. See the module's documentation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Refusal { $(#[doc = $explain] $variant,)* }

        impl Refusal {
            /// Every variant, in alphabetical order, for tables and counters; a variant's place is `self as usize`.
            pub const ALL: &'static [Refusal] = &[$(Refusal::$variant,)*];

            /// Status code of the answer.
            pub const fn status(self) -> u16 {
                match self { $(Refusal::$variant => $status,)* }
            }

            /// Name in logs and in the counter `uringd_refused_total{reason}`.
            pub const fn reason(self) -> &'static str {
                match self { $(Refusal::$variant => $reason,)* }
            }

            /// One sentence for whoever has to mend the client: what was wrong, and which rule says so.
            pub const fn explain(self) -> &'static str {
                match self { $(Refusal::$variant => $explain,)* }
            }
        }
    };
}

refusals! {
    AuthorityMismatch 400 "authority-mismatch"
        "The Host field and the authority of the request target are not the same (RFC 9112 section 3.2)."
    BareCr 400 "bare-cr"
        "A carriage return is not followed by a line feed (RFC 9112 section 2.2)."
    BareLf 400 "bare-lf"
        "A line ends with a line feed alone instead of CRLF (RFC 9112 section 2.2)."
    BodyTimeout 408 "body-timeout"
        "The rest of the request's body did not arrive in time (RFC 9110 section 15.5.9)."
    BodyTooLarge 413 "body-too-large"
        "The body is larger than this server accepts (RFC 9110 section 15.5.14)."
    BodyTooSlow 408 "body-too-slow"
        "The body arrives more slowly than this server accepts (RFC 9110 section 15.5.9)."
    ChunkDataUnterminated 400 "chunk-data-unterminated"
        "The data of a chunk are not followed by CRLF, so its size is wrong (RFC 9112 section 7.1)."
    ChunkExtensionBad 400 "chunk-extension-bad"
        "A chunk extension is not ;name or ;name=value (RFC 9112 section 7.1.1)."
    ChunkLineTooLong 400 "chunk-line-too-long"
        "The line before a chunk, size and extensions, is longer than this server accepts (RFC 9112 section 7.1.1)."
    ChunkOverhead 400 "chunk-overhead"
        "The body is cut into chunks so small that most of it is framing (RFC 9112 section 7.1)."
    ChunkSizeBad 400 "chunk-size-bad"
        "The size of a chunk is not made of hexadecimal digits only (RFC 9112 section 7.1)."
    ChunkSizeOverflow 400 "chunk-size-overflow"
        "The size of a chunk has more than 16 hexadecimal digits (RFC 9112 section 7.1)."
    CodingUnsupported 501 "coding-unsupported"
        "Transfer-Encoding names a coding other than chunked (RFC 9112 section 6.1)."
    ConnectUnsupported 405 "connect-unsupported"
        "This server is not a proxy and opens no tunnels (RFC 9110 section 9.3.6)."
    ContentLengthBad 400 "content-length-bad"
        "Content-Length is not one number made of decimal digits (RFC 9110 section 8.6)."
    ContentLengthOverflow 400 "content-length-overflow"
        "Content-Length is larger than any file can be, 2^63 - 1 (RFC 9110 section 8.6)."
    ContentLengthRepeated 400 "content-length-repeated"
        "There is more than one Content-Length field (RFC 9112 section 6.3)."
    ContentLengthWithCoding 400 "content-length-with-coding"
        "Both Content-Length and Transfer-Encoding are there, so the body's end is in doubt (RFC 9112 section 6.1)."
    EmptyLines 400 "empty-lines"
        "More than one empty line stands before the request line (RFC 9112 section 2.2)."
    ExpectationUnknown 417 "expectation-unknown"
        "Expect asks for something other than 100-continue (RFC 9110 section 10.1.1)."
    FieldFolded 400 "field-folded"
        "A line of the header or trailer section begins with whitespace (RFC 9112 sections 2.2 and 5.2)."
    FieldNameBad 400 "field-name-bad"
        "A field's name is empty or has a byte that names must not have (RFC 9110 section 5.1)."
    FieldNameSpace 400 "field-name-space"
        "There is whitespace in a field's name or between it and its colon (RFC 9112 section 5.1)."
    FieldRepeated 400 "field-repeated"
        "A field that has a single value is there more than once (RFC 9110 section 5.3)."
    FieldTooLong 431 "field-too-long"
        "A header or trailer field is longer than this server accepts (RFC 6585 section 5)."
    FieldValueControl 400 "field-value-control"
        "A field's value has a control character (RFC 9110 section 5.5)."
    FieldWithoutColon 400 "field-without-colon"
        "A line of the header or trailer section has no colon (RFC 9112 section 5)."
    FieldsTooMany 431 "fields-too-many"
        "There are more header or trailer fields than this server accepts (RFC 6585 section 5)."
    HeadTimeout 408 "head-timeout"
        "The request's head did not arrive in time (RFC 9110 section 15.5.9)."
    HeadTooLarge 431 "head-too-large"
        "The request line and the header fields together are larger than this server accepts (RFC 6585 section 5)."
    HostBad 400 "host-bad"
        "The host in the Host field or the request target is not host or host:port (RFC 9112 section 3.2)."
    HostMissing 400 "host-missing"
        "An HTTP/1.1 request has no Host field (RFC 9112 section 3.2)."
    HostRepeated 400 "host-repeated"
        "There is more than one Host field (RFC 9112 section 3.2)."
    MethodBad 400 "method-bad"
        "The request does not begin with a method; is this HTTP? (RFC 9110 section 9.1)."
    MethodCase 501 "method-case"
        "The method is a standard one but not in capital letters, and methods are case-sensitive (RFC 9110 section 9.1)."
    MethodTooLong 501 "method-too-long"
        "The method is longer than any that this server implements (RFC 9112 section 3)."
    RequestLineBad 400 "request-line-bad"
        "The request line is not method, target and version with one space between each (RFC 9112 section 3)."
    RequestLineTooLong 414 "request-line-too-long"
        "The request line is longer than this server accepts (RFC 9112 section 3)."
    TargetBad 400 "target-bad"
        "The request target has a byte that must be percent-encoded (RFC 3986 section 2)."
    TargetDoubleSlash 400 "target-double-slash"
        "The request target begins with two slashes, as only an authority would (RFC 3986 section 3.3)."
    TargetForm 400 "target-form"
        "The request target does not have a form that its method may have (RFC 9112 section 3.2)."
    TargetFragment 400 "target-fragment"
        "The request target has a fragment, which is never sent (RFC 9112 section 3.2.1)."
    TargetHttps 421 "target-https"
        "The request target is an https resource, but the connection is not secured (RFC 9110 section 7.4)."
    TargetScheme 400 "target-scheme"
        "The request target is a URI that is neither http nor https (RFC 9110 section 7.4)."
    TargetUserinfo 400 "target-userinfo"
        "The request target has a user name before its host (RFC 9110 section 4.2.4)."
    TraceContent 400 "trace-content"
        "A TRACE request has a body, which it must not have (RFC 9110 section 9.3.8)."
    TrailersTooLarge 431 "trailers-too-large"
        "The trailer fields together are larger than this server accepts (RFC 6585 section 5)."
    TransferEncodingBad 400 "transfer-encoding-bad"
        "Transfer-Encoding is malformed, or its last coding is not chunked, once (RFC 9112 section 6.3)."
    TransferEncodingHttp10 400 "transfer-encoding-http10"
        "Transfer-Encoding is there although the request is HTTP/1.0 (RFC 9112 section 6.1)."
    TransferEncodingRepeated 400 "transfer-encoding-repeated"
        "There is more than one Transfer-Encoding field (RFC 9112 section 6.1)."
    Truncated 400 "truncated"
        "The connection was closed in the middle of a request (RFC 9112 section 8)."
    VersionBad 400 "version-bad"
        "The request line does not end with HTTP/, a digit, a dot and a digit (RFC 9112 section 2.3)."
    VersionUnsupported 505 "version-unsupported"
        "The version of HTTP is not 1.x (RFC 9110 section 15.6.6)."
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.explain())
    }
}

impl error::Error for Refusal {}

//! The PROXY protocol, versions 1 and 2: a line or a block, before the first request, in which a load balancer that only
//! forwards bytes says who is at its other end.
//!
//! haproxy's `doc/proxy-protocol.txt` defines it. [`parse`] looks at all bytes so far; what comes of them never depends on
//! how they were split. Pure: no I/O, no clock. Where it is switched on it is required, since a server that takes
//! connections with and without it lets every client say who it is.
//!
//! ```text
//! version 1:  PROXY TCP4 192.0.2.1 198.51.100.1 56324 443 CRLF
//! version 2:  12 bytes of signature | 2, command | family, transport | length | addresses | TLVs
//! ```

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::driver::Peer;

/// What the bytes so far are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The beginning of a header.
    NeedData,
    Done {
        /// How many bytes the header has.
        length: usize,
        /// Who is at the balancer's other end. `None`: the balancer speaks for itself (version 2's LOCAL, a health
        /// check) or does not know.
        source: Option<Peer>,
    },
}

/// The bytes are no header. The connection has to be closed: "the receiver MUST abort the connection" (section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// They begin like neither version.
    Missing,
    Malformed,
    /// Longer than any header, or than the caller has room for.
    TooLong,
}

impl Fault {
    /// What to try when it is not the peer who is wrong.
    pub fn remedy(self) -> &'static str {
        match self {
            Fault::Missing | Fault::Malformed => "send-proxy at the proxy, or --proxy-protocol off",
            Fault::TooLong => "fewer TLVs at the proxy, or a larger --limit-head",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::Missing => "it does not begin with a PROXY protocol header",
            Fault::Malformed => "its PROXY protocol header is malformed",
            Fault::TooLong => "its PROXY protocol header is too long",
        })
    }
}

/// "a 108-byte buffer is always enough to store all the line and a trailing zero" (section 2.1).
const V1_BYTES_MAX: usize = 107;
const V1_START: &[u8] = b"PROXY ";
const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, command, family and length.
const V2_FIXED_BYTES: usize = 16;
/// Addresses and TLVs. The addresses of unix sockets, the longest, take 216; TLVs may carry a client's certificate.
const V2_LENGTH_MAX: usize = 4096;

/// Looks for a header at the beginning of `bytes`. One of more than `bytes_max` bytes is too long, and found to be so as
/// soon as its length shows, since its end would be waited for in vain.
///
/// # Errors
/// [`Fault`].
pub fn parse(bytes: &[u8], bytes_max: usize) -> Result<Step, Fault> {
    let starts_like = |start: &[u8]| bytes.iter().zip(start).all(|(byte, wanted)| byte == wanted);
    if starts_like(V2_SIGNATURE) {
        return parse_v2(bytes, bytes_max);
    }
    if !starts_like(V1_START) {
        return Err(Fault::Missing);
    }
    parse_v1(bytes, bytes_max.min(V1_BYTES_MAX))
}

fn parse_v1(bytes: &[u8], bytes_max: usize) -> Result<Step, Fault> {
    let window = &bytes[..bytes.len().min(bytes_max)];
    let Some(end) = window.iter().position(|byte| matches!(byte, b'\r' | b'\n' | 0)) else {
        return if window.len() == bytes_max { Err(Fault::TooLong) } else { Ok(Step::NeedData) };
    };
    match (window[end], window.get(end + 1)) {
        (b'\r', Some(b'\n')) => {}
        (b'\r', None) if window.len() == bytes_max => return Err(Fault::TooLong),
        (b'\r', None) => return Ok(Step::NeedData),
        _ => return Err(Fault::Malformed),
    }
    let line = window.get(V1_START.len()..end).and_then(|line| std::str::from_utf8(line).ok());
    let source = line.and_then(v1_source).ok_or(Fault::Malformed)?;
    Ok(Step::Done { length: end + 2, source })
}

/// What follows `PROXY `. "the receiver MUST ignore anything presented before the CRLF" after UNKNOWN.
fn v1_source(line: &str) -> Option<Option<Peer>> {
    if line == "UNKNOWN" || line.starts_with("UNKNOWN ") {
        return Some(None);
    }
    let parts: Vec<&str> = line.split(' ').collect();
    let [family, source, destination, source_port, destination_port] = parts.as_slice() else { return None };
    let address = |text: &str| -> Option<IpAddr> {
        match *family {
            "TCP4" => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
            "TCP6" => text.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            _ => None,
        }
    };
    // "represented as a decimal number in the range [0..65535] inclusive, without heading zeroes"
    let port = |text: &str| -> Option<u16> {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        text.parse().ok().filter(|_| plain)
    };
    let (source, _) = (address(source)?, address(destination)?);
    let (source_port, _) = (port(source_port)?, port(destination_port)?);
    Some(Some(Peer::Inet(SocketAddr::new(source, source_port))))
}

fn parse_v2(bytes: &[u8], bytes_max: usize) -> Result<Step, Fault> {
    // Each byte is judged as soon as it is there.
    let (Some(command), family) = (bytes.get(12), bytes.get(13)) else { return Ok(Step::NeedData) };
    // The version is 2, the command LOCAL or PROXY: "Receivers must drop connections presenting unexpected values here".
    if !matches!(command, 0x20 | 0x21) {
        return Err(Fault::Malformed);
    }
    let Some(family) = family else { return Ok(Step::NeedData) };
    let addresses_bytes = match (command, family) {
        // LOCAL: "The receiver must [...] use the real connection endpoints and discard the protocol block including the
        // family which is ignored".
        (0x20, _) | (_, 0x00) => 0,
        (_, 0x11) => 12,
        (_, 0x21) => 36,
        (_, 0x31) => 216,
        // Datagrams do not come through a stream, and other families are unassigned.
        _ => return Err(Fault::Malformed),
    };
    let Some(fixed) = bytes.first_chunk::<V2_FIXED_BYTES>() else { return Ok(Step::NeedData) };
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if length > V2_LENGTH_MAX || V2_FIXED_BYTES + length > bytes_max {
        return Err(Fault::TooLong);
    }
    if length < addresses_bytes {
        return Err(Fault::Malformed);
    }
    let Some(block) = bytes.get(V2_FIXED_BYTES..V2_FIXED_BYTES + length) else { return Ok(Step::NeedData) };
    Ok(Step::Done { length: V2_FIXED_BYTES + length, source: v2_source(addresses_bytes, block) })
}

/// The first of the addresses; the TLVs behind them are skipped.
fn v2_source(addresses_bytes: usize, block: &[u8]) -> Option<Peer> {
    let port = |at: usize| block.get(at..at + 2).map_or(0, |port| u16::from_be_bytes([port[0], port[1]]));
    let address = match addresses_bytes {
        12 => (IpAddr::from(*block.first_chunk::<4>()?), port(8)),
        36 => (IpAddr::from(*block.first_chunk::<16>()?), port(32)),
        216 => return Some(Peer::Unix),
        _ => return None,
    };
    Some(Peer::Inet(SocketAddr::from(address)))
}

/// For a fuzzer: no bytes make it panic, no split changes what comes of them, and nobody waits for more than there is
/// room for.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    for bytes_max in [usize::MAX, 64] {
        fuzz_within(data, bytes_max);
    }
}

fn fuzz_within(data: &[u8], bytes_max: usize) {
    let whole = parse(data, bytes_max);
    match whole {
        Ok(Step::Done { length, .. }) => assert!(length <= data.len().min(bytes_max).min(V2_FIXED_BYTES + V2_LENGTH_MAX)),
        Ok(Step::NeedData) => assert!(data.len() < bytes_max),
        Err(_) => {}
    }
    for end in 0..data.len() {
        match parse(&data[..end], bytes_max) {
            Ok(Step::NeedData) => {}
            early => return assert_eq!(early, whole, "the first {end} bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        [V2_SIGNATURE, &[command, family][..], &(block.len() as u16).to_be_bytes(), block].concat()
    }

    fn done(bytes: &[u8]) -> Option<String> {
        fuzz(bytes);
        match parse(bytes, usize::MAX) {
            Ok(Step::Done { source, .. }) => Some(source.map_or("nobody".to_owned(), |peer| peer.to_string())),
            _ => None,
        }
    }

    fn fault(bytes: &[u8]) -> Option<Fault> {
        fuzz(bytes);
        parse(bytes, usize::MAX).err()
    }

    #[test]
    fn version_1_names_the_client() {
        assert_eq!(done(b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\nGET /").as_deref(), Some("192.0.2.1:56324"));
        assert_eq!(done(b"PROXY TCP6 2001:db8::1 ::1 0 65535\r\n").as_deref(), Some("[2001:db8::1]:0"));
        assert_eq!(done(b"PROXY UNKNOWN\r\n").as_deref(), Some("nobody"));
        assert_eq!(done(b"PROXY UNKNOWN ffff::1 anything at all\r\n").as_deref(), Some("nobody"));
        let longest = "PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n";
        assert_eq!(parse(longest.as_bytes(), usize::MAX), Ok(Step::Done { length: longest.len(), source: None }));
    }

    #[test]
    fn version_1_is_read_to_the_letter() {
        for line in [
            "PROXY TCP4 192.0.2.1 198.51.100.1 56324\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443 \r\n",
            "PROXY  TCP4 192.0.2.1 198.51.100.1 56324 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 056324 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 +1 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 1 65536\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.256 1 1\r\n",
            "PROXY TCP4 ::1 ::1 1 1\r\n",
            "PROXY TCP6 192.0.2.1 192.0.2.1 1 1\r\n",
            "PROXY UDP4 192.0.2.1 192.0.2.1 1 1\r\n",
            "PROXY UNKNOWNS\r\n",
            "PROXY tcp4 192.0.2.1 198.51.100.1 1 1\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 1 1\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 1 1\rX",
            "PROXY \r\n",
            "PROXY UNKNOWN \u{e9}\0\r\n",
        ] {
            assert_eq!(fault(line.as_bytes()), Some(Fault::Malformed), "{line:?}");
        }
        for other in ["GET / HTTP/1.1\r\n", "PROXX", "P\r\n", "proxy TCP4 ", "\r\n\r\nGET"] {
            assert_eq!(fault(other.as_bytes()), Some(Fault::Missing), "{other:?}");
        }
    }

    #[test]
    fn version_1_is_not_longer_than_it_can_be() {
        let line = |bytes: usize| format!("PROXY UNKNOWN {}\r\n", "x".repeat(bytes - 16));
        assert_eq!(done(line(107).as_bytes()).as_deref(), Some("nobody"));
        assert_eq!(fault(line(108).as_bytes()), Some(Fault::TooLong));
        assert_eq!(fault(line(109).as_bytes()), Some(Fault::TooLong));
    }

    #[test]
    fn version_2_names_the_client() {
        let v4 = [192, 0, 2, 1, 198, 51, 100, 1, 0xdc, 0x04, 1, 187];
        assert_eq!(done(&v2(0x21, 0x11, &v4)).as_deref(), Some("192.0.2.1:56324"));
        let tlv = [&v4[..], &[4, 0, 1, 0, 0xff, 0xff, 0xff]].concat();
        let with_request = [v2(0x21, 0x11, &tlv), b"GET / HTTP/1.1\r\n".to_vec()].concat();
        assert_eq!(done(&with_request).as_deref(), Some("192.0.2.1:56324"));
        let mut v6 = [0; 36];
        (v6[15], v6[33]) = (1, 9);
        assert_eq!(done(&v2(0x21, 0x21, &v6)).as_deref(), Some("[::1]:9"));
        assert_eq!(done(&v2(0x21, 0x31, &[0; 216])).as_deref(), Some("unix"));
    }

    #[test]
    fn a_balancer_that_speaks_for_itself_names_nobody() {
        for (command, family, bytes) in [(0x20, 0x00, 0), (0x20, 0x11, 12), (0x20, 0xff, 3), (0x21, 0x00, 0), (0x21, 0x00, 40)] {
            assert_eq!(done(&v2(command, family, &vec![1; bytes])).as_deref(), Some("nobody"), "{command:x} {family:x}");
        }
    }

    #[test]
    fn version_2_is_refused_when_it_is_not_what_it_should_be() {
        for (command, family, bytes) in [
            (0x11, 0x11, 12),
            (0x22, 0x11, 12),
            (0x31, 0x11, 12),
            (0x21, 0x12, 12),
            (0x21, 0x41, 12),
            (0x21, 0x11, 11),
            (0x21, 0x21, 35),
            (0x21, 0x31, 215),
        ] {
            assert_eq!(fault(&v2(command, family, &vec![0; bytes])), Some(Fault::Malformed), "{command:x} {family:x}");
        }
        assert_eq!(done(&v2(0x20, 0, &[0; 4096])).as_deref(), Some("nobody"));
        assert_eq!(fault(&v2(0x20, 0, &[0; 4097])), Some(Fault::TooLong));
    }

    #[test]
    fn a_header_that_there_is_no_room_for_is_too_long_as_soon_as_it_shows() {
        let block = v2(0x21, 0x31, &[0; 216]);
        assert!(matches!(parse(&block, block.len()), Ok(Step::Done { .. })));
        assert_eq!(parse(&block[..16], block.len()), Ok(Step::NeedData));
        assert_eq!(parse(&block[..15], block.len() - 1), Ok(Step::NeedData));
        assert_eq!(parse(&block[..16], block.len() - 1), Err(Fault::TooLong));

        let line = b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n";
        assert!(matches!(parse(line, line.len()), Ok(Step::Done { .. })));
        assert_eq!(parse(&line[..line.len() - 1], line.len() - 1), Err(Fault::TooLong));
        assert_eq!(parse(line, line.len() - 1), Err(Fault::TooLong));
        assert_eq!(parse(line, line.len() - 2), Err(Fault::TooLong));
    }

    #[test]
    fn changed_bytes_break_nothing() {
        let v4 = [192, 0, 2, 1, 198, 51, 100, 1, 0xdc, 0x04, 1, 187];
        for start in [v2(0x21, 0x11, &v4), b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n".to_vec()] {
            for at in 0..start.len() {
                for byte in 0..=255 {
                    let mut bytes = start.clone();
                    bytes[at] = byte;
                    fuzz(&bytes);
                }
            }
        }
    }
}

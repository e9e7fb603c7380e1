//! The PROXY protocol headers of simulated clients: whole ones of every form, beginnings of them, and what is none.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::random::Random;
use crate::driver::Peer;

/// What a connection begins with.
pub struct Header {
    pub bytes: Vec<u8>,
    /// With so many bytes it is whole; `None`: it never is.
    pub whole_at: Option<usize>,
    /// With so many bytes it shows to be none.
    pub fault_at: Option<usize>,
    /// Whom it names as the client.
    pub source: Option<Peer>,
}

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

impl Header {
    /// Of a connection that needs none.
    pub fn none() -> Header {
        Header { bytes: Vec::new(), whole_at: Some(0), fault_at: None, source: None }
    }

    pub fn whole(host: u8, port: u16, random: &mut Random) -> Header {
        let v4 = Ipv4Addr::new(10, 0, 0, host);
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host.into());
        let inet = |address: IpAddr| Some(Peer::Inet(SocketAddr::new(address, port)));
        let ports = [port.to_be_bytes(), 443_u16.to_be_bytes()].concat();
        let tlv = b"\x04\0\x05\0\0\0\0\0";
        let (bytes, source) = match random.below(7) {
            0 => (format!("PROXY TCP4 {v4} 198.51.100.1 {port} 443\r\n").into_bytes(), inet(v4.into())),
            1 => (format!("PROXY TCP6 {v6} 2001:db8::ffff {port} 443\r\n").into_bytes(), inet(v6.into())),
            2 => (b"PROXY UNKNOWN\r\n".to_vec(), None),
            3 => (v2(0x21, 0x11, &[&v4.octets(), &[198, 51, 100, 1], &*ports, tlv].concat()), inet(v4.into())),
            4 => (v2(0x21, 0x21, &[&v6.octets(), &[7; 16], &*ports].concat()), inet(v6.into())),
            5 => (v2(0x21, 0x31, &[0; 216]), Some(Peer::Unix)),
            // A health check of the balancer's own.
            _ => (v2(0x20, 0, &[]), None),
        };
        Header { whole_at: Some(bytes.len()), bytes, fault_at: None, source }
    }

    /// Its end never comes.
    pub fn incomplete(host: u8, port: u16, random: &mut Random) -> Header {
        let mut header = Header::whole(host, port, random);
        header.bytes.truncate(random.below(header.bytes.len()));
        Header { whole_at: None, ..header }
    }

    /// With a request behind it that must not be served.
    pub fn broken(random: &mut Random) -> Header {
        let long = format!("PROXY UNKNOWN {}", "x".repeat(100)).into_bytes();
        let (mut bytes, fault_at) = match random.below(9) {
            0 => (Vec::new(), Some(1)),
            1 => (b"PROXY TCP4 10.0.0.256 198.51.100.1 1 443\r\n".to_vec(), None),
            2 => (b"PROXY TCP4 10.0.0.1 198.51.100.1 1 443\n".to_vec(), None),
            // "a 108-byte buffer is always enough to store all the line and a trailing zero" (section 2.1).
            3 => (long, Some(107)),
            4 => (b"\r\n\r\n\0\r\nQUIT ".to_vec(), None),
            5 => (v2(0x11, 0x11, &[0; 12]), Some(13)),
            6 => (v2(0x21, 0x12, &[0; 12]), Some(14)),
            7 => (v2(0x21, 0x11, &[0; 11]), Some(16)),
            _ => (v2(0x21, 0x11, &[0; 5_000]), Some(16)),
        };
        let fault_at = fault_at.or(Some(bytes.len()));
        bytes.extend_from_slice(b"GET /0/0/T/10 HTTP/1.1\r\nHost: a\r\n\r\n");
        Header { bytes, whole_at: None, fault_at, source: None }
    }
}

fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    [SIGNATURE, &[command, family], &(block.len() as u16).to_be_bytes(), block].concat()
}

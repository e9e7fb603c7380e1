//! Who asks, and for which site: the client behind the proxies in front, as far as they are to be believed.
//!
//! Anybody can write `X-Forwarded-For`. What it says is believed only when the other end of the connection is a trusted
//! proxy ([`Networks`], by CIDR), and of the addresses in it only as many as there are proxies ([`Trust::hops`]), from the
//! right, each one being believed because the one who added it is trusted:
//!
//! ```text
//!   X-Forwarded-For: 10.9.9.9, 203.0.113.7, 10.0.0.2        from 10.0.0.1, 10.0.0.0/8 trusted, two hops
//!                    (anybody) (client)     (proxy)               (proxy)
//! ```
//!
//! From anybody else such fields are removed, so that no handler can fall for them. What comes of it is one answer for
//! address, scheme, host and port ([`Origin`]), whatever form the target has. A request without such fields costs one
//! branch: parsing its head has noted that there are none (`http1/request.rs`).
//!
//! No I/O, no clock.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use crate::{
    driver::Peer,
    http1::{self, Head, Span},
};

/// Addresses and networks. A unix socket's peer belongs to them unless they are empty: whoever may open the socket's path
/// was let in by the file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Networks {
    everyone: bool,
    list: Vec<IpNet>,
}

impl Networks {
    pub fn loopback() -> Networks {
        let list = vec![IpNet::from(IpAddr::from([127, 0, 0, 0])), IpNet::from(IpAddr::V6(Ipv6Addr::LOCALHOST))];
        let wide = |net: IpNet| if net.addr().is_ipv4() { IpNet::new(net.addr(), 8).unwrap_or(net) } else { net };
        Networks { everyone: false, list: list.into_iter().map(wide).collect() }
    }

    /// Reads `127.0.0.1,10.0.0.0/8,::1`; `*` is everyone, nothing is nobody. As gunicorn reads FORWARDED_ALLOW_IPS.
    ///
    /// # Errors
    /// The part that is no address and no network.
    pub fn from_list(text: &str) -> Result<Networks, String> {
        let mut networks = Networks { everyone: false, list: Vec::new() };
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            if part == "*" {
                networks.everyone = true;
            } else {
                let address = part.parse::<IpAddr>().map(IpNet::from);
                networks.list.push(address.or_else(|_| part.parse()).map_err(|_| part.to_owned())?);
            }
        }
        Ok(networks)
    }

    pub fn contain(&self, peer: Peer) -> bool {
        match peer {
            _ if self.everyone => true,
            // An IPv4 client of an IPv6 listener is `::ffff:192.0.2.1`, and still the same client.
            Peer::Inet(address) => {
                let address = address.ip().to_canonical();
                self.list.iter().any(|network| network.contains(&address))
            }
            Peer::Unix => !self.list.is_empty(),
        }
    }
}

/// As [`Networks::from_list`] reads it.
impl std::fmt::Display for Networks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let everyone = self.everyone.then(|| "*".to_owned());
        let list: Vec<String> = everyone.into_iter().chain(self.list.iter().map(IpNet::to_string)).collect();
        f.write_str(&list.join(","))
    }
}

/// Which proxies may name the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    pub proxies: Networks,
    /// Proxies between the client and this server, at most. One, because with more than there are a client could name
    /// itself: waitress has the same default.
    pub hops: usize,
    pub fields: Fields,
}

impl Default for Trust {
    fn default() -> Trust {
        Trust { proxies: Networks::loopback(), hops: 1, fields: Fields::Auto }
    }
}

/// Which fields the proxies write. They pass on those that they do not know, so only one kind can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fields {
    /// `X-Forwarded-For`, `-Proto`, `-Host` and `-Port` when there is any of them, else `Forwarded`. Danger: where the
    /// proxies write `Forwarded` only, clients can write the others.
    Auto,
    XForwarded,
    Forwarded,
}

/// What proxies said about a request, where they were believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The client. Its port is 0 where none was said.
    pub remote: Peer,
    pub https: Option<bool>,
    /// `host` or `host:port`, in the head's bytes.
    pub host: Option<Span>,
    pub port: Option<u16>,
}

/// What became of a request's forwarding fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `None`: nothing was believed; the other end of the connection is the client.
    pub origin: Option<Origin>,
    /// Fields taken from the head, because nobody trusted wrote them.
    pub removed: usize,
}

/// Decides about the forwarding fields of a head (`head.forwarding`) that came from `peer`, and removes those that are not
/// to be believed.
pub fn settle(head: &mut Head, bytes: &[u8], peer: Peer, trust: &Trust) -> Verdict {
    let before = head.fields.len();
    let believed = trust.proxies.contain(peer) && trust.hops > 0;
    let any_x = head.fields.iter().any(|field| starts_with_x_forwarded(field.name.of(bytes)));
    let kind = match trust.fields {
        Fields::Auto if any_x => Fields::XForwarded,
        Fields::Auto => Fields::Forwarded,
        chosen => chosen,
    };
    head.fields.retain(|field| {
        let name = field.name.of(bytes);
        if !http1::is_forwarding(name) {
            return true;
        }
        // X-Real-IP is never read here, but a trusted proxy may well have written it.
        believed && (kind == Fields::XForwarded || !starts_with_x_forwarded(name)) && (kind == Fields::Forwarded || !is(name, b"forwarded"))
    });
    let origin = match (believed, kind) {
        (false, _) => None,
        (true, Fields::Forwarded) => from_forwarded(head, bytes, peer, trust),
        (true, _) => from_x_forwarded(head, bytes, peer, trust),
    };
    Verdict { origin, removed: before - head.fields.len() }
}

fn is(name: &[u8], known: &[u8]) -> bool {
    name.eq_ignore_ascii_case(known)
}

fn starts_with_x_forwarded(name: &[u8]) -> bool {
    name.first_chunk::<12>().is_some_and(|start| is(start, b"x-forwarded-"))
}

/// The `X-Forwarded-` fields. No standard has them; this is what nginx, haproxy, Apache, Envoy and the clouds write.
fn from_x_forwarded(head: &Head, bytes: &[u8], peer: Peer, trust: &Trust) -> Option<Origin> {
    let last = |name: &'static [u8], depth: usize| elements_from_the_right(head, bytes, name).take(depth).last();
    let mut remote = peer;
    let mut depth = 0;
    for element in elements_from_the_right(head, bytes, b"x-forwarded-for").take(trust.hops) {
        let Some(address) = node(element.of(bytes)).filter(|_| trust.proxies.contain(remote)) else { break };
        remote = Peer::Inet(address);
        depth += 1;
    }
    // A proxy writes the others for the same hop as the address, or once for all.
    let depth = depth.max(1);
    let https = last(b"x-forwarded-proto", depth).and_then(|scheme| is_https(scheme.of(bytes)));
    let host = last(b"x-forwarded-host", depth).filter(|host| http1::is_host(host.of(bytes)));
    let port = last(b"x-forwarded-port", depth).and_then(|port| port_number(port.of(bytes)));
    Some(Origin { remote, https, host, port })
}

/// The elements of all fields of this name, which are one list (RFC 9110 section 5.3), the last one first. Empty ones
/// count for nothing.
fn elements_from_the_right(head: &Head, bytes: &[u8], name: &'static [u8]) -> impl Iterator<Item = Span> {
    let fields = head.fields.iter().rev().filter(move |field| is(field.name.of(bytes), name));
    let elements = fields.flat_map(move |field| {
        let value = field.value.of(bytes);
        let mut end = value.len();
        value.rsplit(|byte| *byte == b',').map(move |part| {
            let start = end - part.len();
            let element = trimmed(field.value, value, start, end);
            end = start.saturating_sub(1);
            element
        })
    });
    elements.filter(|element| !element.is_empty())
}

/// The piece of a field's value without the spaces around it, as a span of the head.
fn trimmed(field: Span, value: &[u8], mut start: usize, mut end: usize) -> Span {
    let blank = |at: usize| matches!(value[at], b' ' | b'\t');
    while start < end && blank(start) {
        start += 1;
    }
    while start < end && blank(end - 1) {
        end -= 1;
    }
    Span { start: field.start + start as u32, end: field.start + end as u32 }
}

/// `Forwarded: for=192.0.2.60;proto=https;host=a.example, for="[2001:db8::1]:4711"` (RFC 7239 section 4). When any of it is
/// malformed, none is believed.
fn from_forwarded(head: &Head, bytes: &[u8], peer: Peer, trust: &Trust) -> Option<Origin> {
    let mut elements = Vec::new();
    for field in head.fields.iter().filter(|field| is(field.name.of(bytes), b"forwarded")) {
        forwarded_elements(field.value, field.value.of(bytes), &mut elements)?;
    }
    let mut origin = Origin { remote: peer, https: None, host: None, port: None };
    for element in elements.iter().rev().take(trust.hops) {
        if !trust.proxies.contain(origin.remote) {
            break;
        }
        origin.https = element.proto.and_then(|scheme| is_https(scheme.of(bytes))).or(origin.https);
        origin.host = element.host.filter(|host| http1::is_host(host.of(bytes))).or(origin.host);
        // `for=unknown` and `for=_hidden` are allowed and name nobody (section 6.2 and 6.3): the chain ends there.
        let Some(address) = element.node.and_then(|address| node(address.of(bytes))) else { break };
        origin.remote = Peer::Inet(address);
    }
    (!elements.is_empty()).then_some(origin)
}

/// What one proxy said.
#[derive(Clone, Copy, Default)]
struct Element {
    node: Option<Span>,
    proto: Option<Span>,
    host: Option<Span>,
}

/// ```text
/// Forwarded         = 1#forwarded-element
/// forwarded-element = [ forwarded-pair ] *( ";" [ forwarded-pair ] )
/// forwarded-pair    = token "=" ( token / quoted-string )
/// ```
/// Each parameter at most once in an element (section 4). `None`: it is not that.
fn forwarded_elements(field: Span, value: &[u8], elements: &mut Vec<Element>) -> Option<()> {
    let mut element = Element::default();
    let mut named = false;
    let mut at = 0;
    let skip = |mut at: usize| {
        while matches!(value.get(at), Some(b' ' | b'\t')) {
            at += 1;
        }
        at
    };
    loop {
        at = skip(at);
        match value.get(at) {
            None | Some(b',') => {
                if named {
                    elements.push(std::mem::take(&mut element));
                }
                named = false;
                if at >= value.len() {
                    return Some(());
                }
                at += 1;
                continue;
            }
            Some(b';') => {
                at += 1;
                continue;
            }
            Some(_) => {}
        }
        let equals = at + value[at..].iter().position(|byte| *byte == b'=')?;
        let name = &value[at..equals];
        let start = equals + 1;
        let (span, end) = match value.get(start)? {
            b'"' => {
                let length = value[start + 1..].iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
                let end = start + 1 + length;
                // Nothing that is looked at here needs a quoted pair.
                if value[end] == b'\\' {
                    return None;
                }
                (trimmed(field, value, start + 1, end), end + 1)
            }
            _ => {
                let length = value[start..].iter().position(|byte| matches!(byte, b',' | b';' | b' ' | b'\t'));
                let end = length.map_or(value.len(), |length| start + length);
                (trimmed(field, value, start, end), end)
            }
        };
        at = skip(end);
        if name.is_empty() || !matches!(value.get(at), None | Some(b',' | b';')) {
            return None;
        }
        named = true;
        let place = match name.to_ascii_lowercase().as_slice() {
            b"for" => &mut element.node,
            b"proto" => &mut element.proto,
            b"host" => &mut element.host,
            _ => continue,
        };
        if place.replace(span).is_some() {
            return None;
        }
    }
}

/// `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`. Without a port it is 0.
fn node(bytes: &[u8]) -> Option<SocketAddr> {
    let text = std::str::from_utf8(bytes).ok()?;
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    let address = text.parse::<IpAddr>().ok().or_else(bracketed);
    address.map(|address| SocketAddr::new(address, 0)).or_else(|| text.parse().ok())
}

fn is_https(scheme: &[u8]) -> Option<bool> {
    if is(scheme, b"https") || is(scheme, b"wss") {
        Some(true)
    } else if is(scheme, b"http") || is(scheme, b"ws") {
        Some(false)
    } else {
        None
    }
}

fn port_number(digits: &[u8]) -> Option<u16> {
    let plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| plain)?.parse().ok().filter(|port| *port > 0)
}

/// Splits `host` or `host:port` (already known to be one). An IPv6 address keeps its brackets, as in a URI.
pub fn split_port(authority: &str) -> (&str, Option<u16>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port_number(port.as_bytes())),
        _ => (authority, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Limits, Permit},
        http1::{Connection, Event},
    };

    const PROXY: &str = "10.0.0.1:1";

    /// Settles a request with these fields from `peer`; returns what was said, and the names that are left.
    fn settled(fields: &str, peer: &str, trust: &Trust) -> (Option<Said>, Vec<String>) {
        let bytes = format!("GET / HTTP/1.1\r\nHost: inner:8000\r\n{fields}\r\n");
        let mut head = Head::default();
        let event = Connection::new().next_event(bytes.as_bytes(), &mut head, &Limits::default(), Permit::default());
        assert_eq!(event, Ok((bytes.len(), Event::Head)));
        let peer = if peer == "unix" { Peer::Unix } else { Peer::Inet(peer.parse().expect("an address")) };
        let count = head.fields.len();
        let verdict = settle(&mut head, bytes.as_bytes(), peer, trust);
        let text = |span: Span| String::from_utf8_lossy(span.of(bytes.as_bytes())).into_owned();
        assert_eq!(verdict.removed, count - head.fields.len());
        let names = head.fields.iter().skip(1).map(|field| text(field.name).to_lowercase()).collect();
        let said = verdict.origin.map(|origin| (origin.remote.to_string(), origin.https, origin.host.map(text), origin.port));
        (said, names)
    }

    type Said = (String, Option<bool>, Option<String>, Option<u16>);

    fn trust(networks: &str, hops: usize) -> Trust {
        Trust { proxies: Networks::from_list(networks).expect("networks"), hops, fields: Fields::Auto }
    }

    fn remote(fields: &str, trust: &Trust) -> String {
        settled(fields, PROXY, trust).0.map_or("nobody".to_owned(), |said| said.0)
    }

    #[test]
    fn what_an_untrusted_peer_writes_is_removed() {
        let fields = "X-Forwarded-For: 1.1.1.1\r\nX: y\r\nx-forwarded-proto: https\r\nForwarded: for=1.1.1.1\r\n\
            X-Forwarded-Anything: z\r\nX-REAL-IP: 1.1.1.1\r\nX-Forwarded: z\r\n";
        let (said, names) = settled(fields, "192.0.2.1:1", &trust("10.0.0.0/8", 1));
        assert_eq!((said, names), (None, vec!["x".to_owned(), "x-forwarded".to_owned()]));
        assert_eq!(settled(fields, PROXY, &trust("10.0.0.0/8", 0)).1.len(), 2, "no hops, no trust");
        assert_eq!(settled(fields, PROXY, &trust("", 1)).1.len(), 2);
        assert_eq!(settled(fields, "unix", &trust("", 1)).1.len(), 2);
    }

    #[test]
    fn a_trusted_proxy_names_client_scheme_host_and_port() {
        let fields =
            "X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: HTTPS\r\nX-Forwarded-Host: a.example:444\r\nX-Forwarded-Port: 443\r\n";
        let wanted = ("203.0.113.7:0".to_owned(), Some(true), Some("a.example:444".to_owned()), Some(443));
        for peer in [PROXY, "[::ffff:10.0.0.1]:1", "unix"] {
            let (said, names) = settled(fields, peer, &trust("10.0.0.1", 1));
            assert_eq!((said, names.len()), (Some(wanted.clone()), 4), "{peer}");
        }
        assert_eq!(settled(fields, "198.51.100.1:1", &trust("*", 1)).0, Some(wanted));
        let (said, _) = settled("X-Forwarded-Proto: https\r\n", PROXY, &trust("10.0.0.1", 1));
        assert_eq!(said, Some((PROXY.to_owned(), Some(true), None, None)));
    }

    #[test]
    fn only_as_many_addresses_are_believed_as_there_are_proxies() {
        let fields = "X-Forwarded-For: 6.6.6.6 ,\t203.0.113.7\r\nX-Forwarded-For: 10.0.0.2,\r\n";
        assert_eq!(remote(fields, &trust("10.0.0.0/8", 1)), "10.0.0.2:0");
        assert_eq!(remote(fields, &trust("10.0.0.0/8", 2)), "203.0.113.7:0");
        assert_eq!(remote(fields, &trust("10.0.0.0/8", 9)), "203.0.113.7:0", "who wrote 6.6.6.6 is not trusted");
        assert_eq!(remote(fields, &trust("*", 2)), "203.0.113.7:0", "hops end what everybody's trust would not");
        assert_eq!(remote("X-Forwarded-For: 1.1.1.1, nonsense\r\n", &trust("*", 9)), PROXY);
    }

    #[test]
    fn the_other_fields_are_read_for_the_same_hop() {
        let fields =
            "X-Forwarded-For: 6.6.6.6, 203.0.113.7, 10.0.0.2\r\nX-Forwarded-Proto: https, http\r\nX-Forwarded-Host: evil, a, b\r\n";
        let (said, _) = settled(fields, PROXY, &trust("10.0.0.0/8", 2));
        assert_eq!(said, Some(("203.0.113.7:0".to_owned(), Some(true), Some("a".to_owned()), None)));
    }

    #[test]
    fn addresses_have_the_forms_that_proxies_write() {
        for (text, wanted) in [
            ("192.0.2.1", "192.0.2.1:0"),
            ("192.0.2.1:80", "192.0.2.1:80"),
            ("2001:db8::1", "[2001:db8::1]:0"),
            ("[2001:db8::1]", "[2001:db8::1]:0"),
            ("[2001:db8::1]:80", "[2001:db8::1]:80"),
        ] {
            assert_eq!(node(text.as_bytes()).map(|address| address.to_string()).as_deref(), Some(wanted));
        }
        for text in ["", "localhost", "192.0.2.1:", "192.0.2", "[192.0.2.1]", "1.2.3.4:99999", "::1]", "\u{e9}"] {
            assert_eq!(node(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn what_is_malformed_says_nothing() {
        let fields = "X-Forwarded-For: x\r\nX-Forwarded-Proto: gopher\r\nX-Forwarded-Host: a b\r\nX-Forwarded-Port: 0\r\n";
        assert_eq!(settled(fields, PROXY, &trust("*", 1)).0, Some((PROXY.to_owned(), None, None, None)));
        for port in ["+1", "65536", "", "1a", "-1"] {
            assert_eq!(port_number(port.as_bytes()), None, "{port:?}");
        }
    }

    #[test]
    fn forwarded_is_read_as_rfc_7239_has_it() {
        let two = "Forwarded: for=6.6.6.6;proto=http, For=\"[2001:db8::1]:4711\" ; proto=HTTPS;;by=x;host=\"a.example:1\"\r\nForwarded: for=10.0.0.2\r\n";
        let (said, names) = settled(two, PROXY, &trust("10.0.0.0/8", 2));
        assert_eq!(said, Some(("[2001:db8::1]:4711".to_owned(), Some(true), Some("a.example:1".to_owned()), None)));
        assert_eq!(names.len(), 2);
        let three = "Forwarded: for=6.6.6.6, for=203.0.113.7, for=10.0.0.2\r\n";
        assert_eq!(remote(three, &trust("10.0.0.0/8", 9)), "203.0.113.7:0", "who wrote 6.6.6.6 is not trusted");
        for hidden in ["for=unknown", "for=_x", "proto=http", "for=\"_a,b;c\""] {
            assert_eq!(remote(&format!("Forwarded: {hidden}\r\n"), &trust("*", 5)), PROXY, "{hidden}");
        }
        for bad in
            ["for", "for=", "for=\"1.1.1.1", "for=1.1.1.1 x", "=1.1.1.1", "for=1.1.1.1;for=2.2.2.2", "for=\"1\\.1\"", "for=\"1\"2", ",", ""]
        {
            assert_eq!(remote(&format!("Forwarded: {bad}\r\n"), &trust("*", 5)), "nobody", "{bad}");
        }
    }

    #[test]
    fn of_two_kinds_of_fields_only_one_is_believed() {
        let both = "Forwarded: for=1.1.1.1;proto=https\r\nX-Forwarded-For: 2.2.2.2\r\n";
        for (fields, wanted, left) in [
            (Fields::Auto, "2.2.2.2:0", "x-forwarded-for"),
            (Fields::XForwarded, "2.2.2.2:0", "x-forwarded-for"),
            (Fields::Forwarded, "1.1.1.1:0", "forwarded"),
        ] {
            let (said, names) = settled(both, PROXY, &Trust { fields, ..trust("*", 1) });
            assert_eq!((said.map(|said| said.0), names), (Some(wanted.to_owned()), vec![left.to_owned()]));
        }
        let (said, names) = settled("Forwarded: for=1.1.1.1\r\n", PROXY, &Trust { fields: Fields::XForwarded, ..trust("*", 1) });
        assert_eq!((said.map(|said| said.0), names.len()), (Some(PROXY.to_owned()), 0));
    }

    #[test]
    fn networks_are_read_as_gunicorn_reads_them() {
        let networks = Networks::from_list(" 127.0.0.1, 10.0.0.0/8,,2001:db8::/32 ").expect("valid");
        let contain = |address: &str| networks.contain(Peer::Inet(address.parse().expect("an address")));
        assert!(contain("127.0.0.1:1") && contain("10.255.0.1:1") && contain("[2001:db8::9]:1") && networks.contain(Peer::Unix));
        assert!(!contain("127.0.0.2:1") && !contain("[::1]:1"));
        assert_eq!(networks.to_string(), "127.0.0.1/32,10.0.0.0/8,2001:db8::/32");
        assert!(Networks::from_list("*").expect("valid").contain(Peer::Inet("192.0.2.1:1".parse().expect("an address"))));
        assert_eq!(Networks::from_list("10.0.0.0/8,x"), Err("x".to_owned()));
        assert_eq!(Networks::from_list("10.0.0.0/33"), Err("10.0.0.0/33".to_owned()));
        assert_eq!(Networks::loopback(), Networks::from_list("127.0.0.0/8,::1").expect("valid"));
    }

    #[test]
    fn a_port_is_split_from_its_host() {
        for (text, host, port) in
            [("a", "a", None), ("a:80", "a", Some(80)), ("a:", "a", None), ("[::1]", "[::1]", None), ("[::1]:80", "[::1]", Some(80))]
        {
            assert_eq!(split_port(text), (host, port));
        }
    }
}

//! waitress's settings (3.0): the options of `waitress-serve`, and what `waitress.serve` takes.

use super::{
    Here::{Anyway, Missing, Needless, Option, Words},
    OFF, Program, Section, Setting,
    Takes::{Flag, Switch, Value},
    forwarded_fields, limit_head, unix_socket,
};

pub const SECTIONS: &[Section] = &[("waitress", SETTINGS)];

const SETTINGS: &[Setting] = &[
    row("host", &["--host"], Value, Option("host"), "0.0.0.0 with `--port` alone; without both, uringd listens on 127.0.0.1:8000"),
    row("port", &["--port"], Value, Option("port"), "8080 with `--host` alone"),
    row("ipv4", &["--ipv4", "--no-ipv4"], Switch, Missing(&["true"]), "name the address: --listen='[::]:8080'"),
    row("ipv6", &["--ipv6", "--no-ipv6"], Switch, Missing(&["false"]), "`*` is every IPv4 address; name the others: --listen='[::]:8080'"),
    row("listen", &["--listen"], Value, Option("bind"), "`*:8080` is every IPv4 address"),
    row(
        "threads",
        &["--threads"],
        Value,
        Option("threads"),
        "of each process, and there is one process for each core; 1 when not said, where waitress has 4",
    ),
    row("trusted_proxy", &["--trusted-proxy"], Value, Option("forwarded-allow-ips"), "any number of them, and networks"),
    row(
        "trusted_proxy_count",
        &["--trusted-proxy-count"],
        Value,
        Option("forwarded-hops"),
        "each of them must be in `--forwarded-allow-ips`",
    ),
    row(
        "trusted_proxy_headers",
        &["--trusted-proxy-headers"],
        Value,
        Words(forwarded_fields),
        "`forwarded` is `--forwarded-fields forwarded`; any of the others are all of `--forwarded-fields x-forwarded`",
    ),
    row(
        "log_untrusted_proxy_headers",
        &["--log-untrusted-proxy-headers", "--no-log-untrusted-proxy-headers"],
        Switch,
        Missing(OFF),
        "they are counted, not logged",
    ),
    row(
        "clear_untrusted_proxy_headers",
        &["--clear-untrusted-proxy-headers", "--no-clear-untrusted-proxy-headers"],
        Switch,
        Missing(&["true"]),
        "they are always removed; trust the proxy instead: --forwarded-allow-ips",
    ),
    row("url_scheme", &["--url-scheme"], Value, Option("url-scheme"), ""),
    row(
        "url_prefix",
        &["--url-prefix"],
        Value,
        Option("script-name"),
        "a path outside of it is passed on as it is, with an empty SCRIPT_NAME",
    ),
    row("backlog", &["--backlog"], Value, Option("backlog"), "of each core's socket"),
    row("recv_bytes", &["--recv-bytes"], Value, Needless, "the kernel fills buffers of its own choosing"),
    row("send_bytes", &["--send-bytes"], Value, Needless, "an answer leaves as fast as the client reads"),
    row("outbuf_overflow", &["--outbuf-overflow"], Value, Needless, "an answer has 1 MiB of memory, then a file"),
    row(
        "outbuf_high_watermark",
        &["--outbuf-high-watermark"],
        Value,
        Option("limit-response-spool"),
        "on disk, so that a worker need not wait for a client",
    ),
    row("inbuf_overflow", &["--inbuf-overflow"], Value, Option("body-memory"), ""),
    row(
        "connection_limit",
        &["--connection-limit"],
        Value,
        Option("limit-connections"),
        "for each core; 16,384 when not said, where waitress has 100",
    ),
    row("cleanup_interval", &["--cleanup-interval"], Value, Needless, "each connection has its own deadline"),
    row(
        "channel_timeout",
        &["--channel-timeout"],
        Value,
        Option("keep-alive"),
        "between requests; `--head-timeout` and `--body-timeout` bound the rest",
    ),
    row(
        "log_socket_errors",
        &["--log-socket-errors", "--no-log-socket-errors"],
        Switch,
        Needless,
        "a client that leaves is counted, not logged",
    ),
    row(
        "max_request_header_size",
        &["--max-request-header-size"],
        Value,
        Words(limit_head),
        "`--limit-head`, of which a line or a field may take all",
    ),
    row("max_request_body_size", &["--max-request-body-size"], Value, Option("limit-body"), ""),
    row(
        "expose_tracebacks",
        &["--expose-tracebacks", "--no-expose-tracebacks"],
        Switch,
        Missing(OFF),
        "a traceback is in the log, and never in an answer",
    ),
    row("ident", &["--ident"], Value, Option("server-header"), ""),
    row("asyncore_loop_timeout", &["--asyncore-loop-timeout"], Value, Needless, "there is no such loop"),
    row("asyncore_use_poll", &["--asyncore-use-poll", "--no-asyncore-use-poll"], Switch, Needless, "there is no such loop"),
    row("unix_socket", &["--unix-socket"], Value, Words(unix_socket), "`--bind unix:PATH`"),
    row("unix_socket_perms", &["--unix-socket-perms"], Value, Option("unix-socket-perms"), "666 when not said, where waitress has 600"),
    row("sockets", &["--sockets"], Value, Missing(OFF), "hand over open sockets by number: --bind fd://3"),
    row(
        "channel_request_lookahead",
        &["--channel-request-lookahead"],
        Value,
        Anyway,
        "`environ[\"uringd.client_disconnected\"]()` always knows",
    ),
    row("server_name", &["--server-name"], Value, Option("server-name"), ""),
    row("call", &["--call"], Flag, Option("call"), "or write the target as `module:factory()`"),
];

const fn row(name: &'static str, cli: &'static [&'static str], takes: super::Takes, here: super::Here, note: &'static str) -> Setting {
    Setting { program: Program::Waitress, name, cli, takes, here, note }
}

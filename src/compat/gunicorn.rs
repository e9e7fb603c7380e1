//! gunicorn's settings (27.0), in the order and the sections of its documentation.

use super::{
    Here::{Anyway, Missing, Needless, Option, Words, Worker},
    OFF, Program, Section, Setting,
    Takes::{File, Flag, Value},
    header_map,
};

pub const SECTIONS: &[Section] = &[
    ("Config file", CONFIG_FILE),
    ("Control", CONTROL),
    ("Debugging", DEBUGGING),
    ("Dirty arbiters", DIRTY),
    ("HTTP/2", HTTP2),
    ("Logging", LOGGING),
    ("Process naming", NAMING),
    ("TLS", TLS),
    ("Security", SECURITY),
    ("Server hooks", HOOKS),
    ("Server mechanics", MECHANICS),
    ("Server socket", SOCKET),
    ("Worker processes", WORKERS),
];

const CONFIG_FILE: &[Setting] = &[
    row("config", &["-c", "--config"], Value, Option("config"), "`PATH`, `file:PATH` and `python:MODULE`; `uringd.toml` comes first"),
    row("wsgi_app", &[], File, Option("target"), "the target, when the command line has none"),
];

const CONTROL: &[Setting] = &[
    row("control_socket", &["--control-socket"], Value, Missing(OFF), "there is no control socket; signals say how many workers there are"),
    row("control_socket_mode", &["--control-socket-mode"], Value, Needless, "there is no control socket"),
    row("control_socket_disable", &["--no-control-socket"], Flag, Anyway, "there is no control socket"),
];

const DEBUGGING: &[Setting] = &[
    row("reload", &["--reload"], Flag, Missing(OFF), "source files are not watched; start uringd again after a change"),
    row("reload_engine", &["--reload-engine"], Value, Missing(&["auto"]), "source files are not watched"),
    row("reload_extra_files", &["--reload-extra-file"], Value, Missing(OFF), "source files are not watched"),
    row(
        "spew",
        &["--spew"],
        Flag,
        Missing(OFF),
        "lines are not traced; try python3 -m trace, or SIGUSR1 to a worker, which prints where it is",
    ),
    row("check_config", &["--check-config"], Flag, Option("check"), "loads the application, too"),
    row("print_config", &["--print-config"], Flag, Option("check"), "as a `uringd.toml`"),
];

const DIRTY: &[Setting] = &[
    row("dirty_apps", &["--dirty-app"], Value, Missing(OFF), NO_DIRTY),
    row("dirty_workers", &["--dirty-workers"], Value, Missing(OFF), NO_DIRTY),
    row("dirty_timeout", &["--dirty-timeout"], Value, Needless, NO_DIRTY),
    row("dirty_threads", &["--dirty-threads"], Value, Needless, NO_DIRTY),
    row("dirty_graceful_timeout", &["--dirty-graceful-timeout"], Value, Needless, NO_DIRTY),
    row("on_dirty_starting", &[], File, Missing(OFF), NO_DIRTY),
    row("dirty_post_fork", &[], File, Missing(OFF), NO_DIRTY),
    row("dirty_worker_init", &[], File, Missing(OFF), NO_DIRTY),
    row("dirty_worker_exit", &[], File, Missing(OFF), NO_DIRTY),
];
const NO_DIRTY: &str = "there are no dirty arbiters; run slow work in a task queue";

const HTTP2: &[Setting] = &[
    row("http_protocols", &["--http-protocols"], Value, Missing(&["h1"]), NO_HTTP2),
    row("http2_cleartext", &["--http2-cleartext"], Value, Missing(&["off", "false"]), NO_HTTP2),
    row("http2_max_concurrent_streams", &["--http2-max-concurrent-streams"], Value, Needless, NO_HTTP2),
    row("http2_initial_window_size", &["--http2-initial-window-size"], Value, Needless, NO_HTTP2),
    row("http2_max_frame_size", &["--http2-max-frame-size"], Value, Needless, NO_HTTP2),
    row("http2_max_header_list_size", &["--http2-max-header-list-size"], Value, Needless, NO_HTTP2),
];
const NO_HTTP2: &str = "HTTP/1.1 only; a proxy in front can speak HTTP/2 to the clients";

const LOGGING: &[Setting] = &[
    row("accesslog", &["--access-logfile"], Value, Missing(OFF), "there is no access log yet; the proxy in front can write one"),
    row("disable_redirect_access_to_syslog", &["--disable-redirect-access-to-syslog"], Flag, Anyway, "nothing is sent to syslog"),
    row("access_log_format", &["--access-logformat"], Value, Needless, "there is no access log yet"),
    row(
        "errorlog",
        &["--error-logfile", "--log-file"],
        Value,
        Missing(&["-", ""]),
        "log lines go to standard error; where they are kept is for systemd or a shell (2>>FILE) to say",
    ),
    row("loglevel", &["--log-level"], Value, Option("log-level"), ""),
    row("capture_output", &["--capture-output"], Flag, Anyway, "what the application prints goes where uringd's own output goes"),
    row(
        "logger_class",
        &["--logger-class"],
        Value,
        Missing(&["gunicorn.glogging.Logger", "simple"]),
        "hooks get the logger gunicorn.error, and uringd's own lines have one form; try --log-format json",
    ),
    row("logconfig", &["--log-config"], Value, Worker, LOG_CONFIG),
    row("logconfig_dict", &[], File, Worker, LOG_CONFIG),
    row("logconfig_json", &["--log-config-json"], Value, Worker, LOG_CONFIG),
    row("syslog_addr", &["--log-syslog-to"], Value, Needless, "nothing is sent to syslog"),
    row("syslog", &["--log-syslog"], Flag, Missing(OFF), "log lines go to standard error; systemd keeps them, or: 2>&1 | logger -t NAME"),
    row("syslog_prefix", &["--log-syslog-prefix"], Value, Needless, "nothing is sent to syslog"),
    row("syslog_facility", &["--log-syslog-facility"], Value, Needless, "nothing is sent to syslog"),
    row("enable_stdio_inheritance", &["-R", "--enable-stdio-inheritance"], Flag, Anyway, "workers have uringd's standard output and error"),
    row("statsd_host", &["--statsd-host"], Value, Missing(OFF), "no metrics are sent yet"),
    row("dogstatsd_tags", &["--dogstatsd-tags"], Value, Missing(OFF), "no metrics are sent yet"),
    row("statsd_prefix", &["--statsd-prefix"], Value, Missing(OFF), "no metrics are sent yet"),
    row("enable_backlog_metric", &["--enable-backlog-metric"], Flag, Missing(OFF), "no metrics are sent yet"),
];
const LOG_CONFIG: &str =
    "for what the application and the hooks log with `logging`, over gunicorn's own defaults; uringd's own lines keep their form";

const NAMING: &[Setting] = &[
    row("proc_name", &["-n", "--name"], Value, Missing(OFF), PROCESS_NAMES),
    row("default_proc_name", &[], File, Missing(OFF), PROCESS_NAMES),
];
const PROCESS_NAMES: &str = "processes are called uringd, uringd-zygote and uringd-worker; --pid says which uringd";

const TLS: &[Setting] = &[
    row("keyfile", &["--keyfile"], Value, Missing(OFF), NO_CERTIFICATE),
    row("certfile", &["--certfile"], Value, Missing(OFF), NO_CERTIFICATE),
    row("ssl_version", &["--ssl-version"], Value, Missing(OFF), NO_TLS),
    row("cert_reqs", &["--cert-reqs"], Value, Missing(OFF), NO_TLS),
    row("ca_certs", &["--ca-certs"], Value, Missing(OFF), NO_TLS),
    row("suppress_ragged_eofs", &["--suppress-ragged-eofs"], Flag, Needless, NO_TLS),
    row("do_handshake_on_connect", &["--do-handshake-on-connect"], Flag, Needless, NO_TLS),
    row("ciphers", &["--ciphers"], Value, Missing(OFF), NO_TLS),
];
const NO_CERTIFICATE: &str = "uringd does not start with it, as there is no TLS yet; leave it out and put a proxy that has TLS in front";
const NO_TLS: &str = "there is no TLS yet; put a proxy that has it in front";

const SECURITY: &[Setting] = &[
    row("limit_request_line", &["--limit-request-line"], Value, Option("limit-request-line"), "414; 0: as much as `--limit-head`"),
    row("limit_request_fields", &["--limit-request-fields"], Value, Option("limit-request-fields"), "431"),
    row(
        "limit_request_field_size",
        &["--limit-request-field_size"],
        Value,
        Option("limit-request-field-size"),
        "431; 0: as much as `--limit-head`, which bounds the head in all, and grows with these two when it is not said",
    ),
];

const HOOKS: &[Setting] = &[
    row("on_starting", &[], File, Worker, "before the application is loaded"),
    row("on_reload", &[], File, Missing(OFF), "there is no reload yet"),
    row("when_ready", &[], File, Worker, "the sockets listen, and no worker has been forked"),
    row("pre_fork", &[], File, Worker, ""),
    row("post_fork", &[], File, Worker, ""),
    row("post_worker_init", &[], File, Worker, "the worker has loaded the application"),
    row("worker_int", &[], File, Missing(OFF), "workers do not act on SIGINT and SIGQUIT; worker_exit is called at every orderly end"),
    row("worker_abort", &[], File, Worker, "a request of this worker ran longer than `--timeout`"),
    row("pre_exec", &[], File, Missing(OFF), "there is no upgrade by SIGUSR2 yet"),
    row("pre_request", &[], File, Worker, ""),
    row("post_request", &[], File, Worker, "with two, three or four arguments"),
    row("child_exit", &[], File, Worker, ""),
    row("worker_exit", &[], File, Worker, ""),
    row("nworkers_changed", &[], File, Worker, "at the start, and after TTIN and TTOU"),
    row("on_exit", &[], File, Worker, ""),
    row("ssl_context", &[], File, Missing(OFF), NO_TLS),
];

const MECHANICS: &[Setting] = &[
    row("preload_app", &["--preload"], Flag, Option("preload"), ""),
    row(
        "sendfile",
        &["--no-sendfile"],
        Flag,
        Needless,
        "a file that the application returns is handed over and never copied through Python",
    ),
    row("reuse_port", &["--reuse-port"], Flag, Anyway, "each core has a socket of its own"),
    row("chdir", &["--chdir"], Value, Option("chdir"), ""),
    row("daemon", &["-D", "--daemon"], Flag, Missing(OFF), "uringd stays in the foreground; let systemd run it, or: setsid uringd ... &"),
    row("raw_env", &["-e", "--env"], Value, Option("env"), ""),
    row("pidfile", &["-p", "--pid"], Value, Option("pid"), "empty until uringd is ready"),
    row("worker_tmp_dir", &["--worker-tmp-dir"], Value, Needless, "there is no heartbeat, and so no file of it"),
    row(
        "user",
        &["-u", "--user"],
        Value,
        Option("user"),
        "the whole process changes, once it listens; without `--group`, to the user's own group too",
    ),
    row("group", &["-g", "--group"], Value, Option("group"), ""),
    row(
        "umask",
        &["-m", "--umask"],
        Value,
        Option("umask"),
        "unchanged when not said; unix sockets are open to all users then, as with gunicorn",
    ),
    row("initgroups", &["--initgroups"], Flag, Anyway, "`--user` takes the user's supplementary groups, and drops those of root"),
    row("tmp_upload_dir", &[], File, Option("spool-dir"), ""),
    row(
        "secure_scheme_headers",
        &[],
        File,
        Missing(&[r#"{"X-FORWARDED-PROTO":"https"}"#]),
        "X-Forwarded-Proto and Forwarded say https, when a proxy of --forwarded-allow-ips wrote them; no other field does",
    ),
    row("forwarded_allow_ips", &["--forwarded-allow-ips"], Value, Option("forwarded-allow-ips"), "these name the client's address, too"),
    row("pythonpath", &["--pythonpath"], Value, Option("pythonpath"), ""),
    row("paste", &["--paste", "--paster"], Value, Missing(OFF), NO_PASTE),
    row(
        "proxy_protocol",
        &["--proxy-protocol"],
        Value,
        Option("proxy-protocol"),
        "both versions, and then every connection must begin with it",
    ),
    row("proxy_allow_ips", &["--proxy-allow-from"], Value, Option("proxy-allow-from"), ""),
    row("protocol", &["--protocol"], Value, Missing(&["http"]), "HTTP only; in nginx, proxy_pass instead of uwsgi_pass"),
    row("uwsgi_allow_ips", &["--uwsgi-allow-from"], Value, Needless, "HTTP only"),
    row("raw_paste_global_conf", &["--paste-global"], Value, Missing(OFF), NO_PASTE),
    row("permit_obsolete_folding", &["--permit-obsolete-folding"], Flag, Missing(OFF), STRICT),
    row("strip_header_spaces", &["--strip-header-spaces"], Flag, Missing(OFF), STRICT),
    row("permit_unconventional_http_method", &["--permit-unconventional-http-method"], Flag, Missing(OFF), STRICT),
    row("permit_unconventional_http_version", &["--permit-unconventional-http-version"], Flag, Missing(OFF), STRICT),
    row("casefold_http_method", &["--casefold-http-method"], Flag, Missing(OFF), STRICT),
    row(
        "forwarder_headers",
        &["--forwarder-headers"],
        Value,
        Missing(OFF),
        "fields with an underscore are removed, whoever sends them; --script-name says where the application is mounted",
    ),
    row(
        "header_map",
        &["--header-map"],
        Value,
        Words(header_map),
        "`drop` is so anyway, `dangerous` is `--permit underscore-headers`, `refuse` is not there",
    ),
    row("root_path", &["--root-path"], Value, Missing(OFF), "WSGI applications have SCRIPT_NAME instead: --script-name"),
];
const NO_PASTE: &str =
    "ini files are not read; give a module as the target that has: application = paste.deploy.loadapp('config:/path/to/file.ini')";
const STRICT: &str = "such requests are refused; docs/refusals.md says why";

const SOCKET: &[Setting] = &[
    row("bind", &["-b", "--bind"], Value, Option("bind"), ""),
    row("backlog", &["--backlog"], Value, Option("backlog"), "of each core's socket"),
];

const WORKERS: &[Setting] = &[
    row("workers", &["-w", "--workers"], Value, Option("workers"), "one for each core when not said, where gunicorn has 1"),
    row(
        "worker_class",
        &["-k", "--worker-class"],
        Value,
        Option("worker-class"),
        "`sync` and `gthread` are both `--threads` here; `gevent` runs requests on greenlets; no others",
    ),
    row("threads", &["--threads"], Value, Option("threads"), "64 at most"),
    row(
        "worker_connections",
        &["--worker-connections"],
        Value,
        Option("limit-connections"),
        "for each core, for a connection holds no worker; of gevent, `--greenlets` bounds the requests",
    ),
    row("max_requests", &["--max-requests"], Value, Option("max-requests"), "the successor is ready first, and never two at a time"),
    row("max_requests_jitter", &["--max-requests-jitter"], Value, Option("max-requests-jitter"), ""),
    row("timeout", &["-t", "--timeout"], Value, Option("timeout"), "of each request, with every worker class; 0: none"),
    row("graceful_timeout", &["--graceful-timeout"], Value, Option("graceful-timeout"), ""),
    row("keepalive", &["--keep-alive"], Value, Option("keep-alive"), "with every worker class; 15 when not said, where gunicorn has 2"),
    row("asgi_loop", &["--asgi-loop"], Value, Needless, NO_ASGI),
    row("asgi_lifespan", &["--asgi-lifespan"], Value, Needless, NO_ASGI),
    row("asgi_disconnect_grace_period", &["--asgi-disconnect-grace-period"], Value, Needless, NO_ASGI),
    row("websocket_max_message_size", &["--websocket-max-message-size"], Value, Needless, NO_ASGI),
    row("http_parser", &["--http-parser"], Value, Needless, "requests are parsed before they reach Python"),
];
const NO_ASGI: &str = "WSGI applications only, yet";

const fn row(name: &'static str, cli: &'static [&'static str], takes: super::Takes, here: super::Here, note: &'static str) -> Setting {
    Setting { program: Program::Gunicorn, name, cli, takes, here, note }
}

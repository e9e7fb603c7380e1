//! How the process says that it cannot start (1), or that it was asked wrongly (2).

use crate::support::{for_each_backend, run, uringd};

#[test]
fn version_and_help_are_answered_on_standard_output() {
    let mut command = uringd();
    command.arg("--version");
    let ended = run(command);
    assert_eq!((ended.code(), ended.stdout.trim()), (Some(0), concat!("uringd ", env!("CARGO_PKG_VERSION"))));

    let mut command = uringd();
    command.arg("--help");
    let ended = run(command);
    assert_eq!(ended.code(), Some(0), "{ended}");
    for word in ["Usage:", "TARGET", "--bind", "--cores", "--handlers", "--graceful-timeout", "builtin:welcome"] {
        assert!(ended.stdout.contains(word), "no {word:?} in the help:\n{}", ended.stdout);
    }
    assert!(ended.stderr.is_empty(), "{ended}");
}

#[test]
fn every_option_of_the_interface_that_exists_is_in_the_help() {
    let mut command = uringd();
    command.arg("--help");
    let help = run(command).stdout;
    for option in [
        "--backend",
        "--body-rate",
        "--body-timeout",
        "--check",
        "--config",
        "--group",
        "--head-timeout",
        "--keep-alive",
        "--limit-body",
        "--limit-chunk-line",
        "--limit-connections",
        "--limit-head",
        "--limit-request-field-size",
        "--limit-request-fields",
        "--limit-request-line",
        "--permit",
        "--pid",
        "--queue",
        "--queue-timeout",
        "--send-timeout",
        "--timeout",
        "--umask",
        "--user",
    ] {
        assert!(help.contains(option), "no {option} in the help:\n{help}");
    }
}

#[test]
fn a_wrong_option_is_a_usage_error() {
    for arguments in [
        &["--no-such-option"][..],
        &["--handlers", "many"],
        &["--handlers"],
        &["--backend", "windows"],
        &["--permit", "everything"],
        &["--limit-body", "-1"],
        &["builtin:hello", "builtin:echo"],
    ] {
        let mut command = uringd();
        command.args(arguments);
        let ended = run(command);
        assert_eq!(ended.code(), Some(2), "{arguments:?}: {ended}");
        assert!(ended.stderr.contains(arguments.last().unwrap()), "{arguments:?}: {ended}");
        assert!(ended.stdout.is_empty(), "{ended}");
    }
}

#[test]
fn a_target_that_cannot_be_served_is_an_error_that_ends_in_what_to_try() {
    for_each_backend(|backend| {
        for target in ["nothing:app", "nothing:make_app()", "./nothing", "http://127.0.0.1:1", "unix:/run/nothing"] {
            let ended = run(backend.command(target, &[]));
            assert_eq!(ended.code(), Some(1), "{target}: {ended}");
            // An application that cannot be loaded may have said why before.
            let last = ended.stderr.lines().last().unwrap_or("");
            assert!(last.contains(target) && last.contains("try: "), "{target}: {ended}");
        }
    });
}

#[test]
fn an_unknown_builtin_is_an_error_that_names_the_known_ones() {
    for_each_backend(|backend| {
        let ended = run(backend.command("builtin:nothing", &[]));
        assert!([Some(1), Some(2)].contains(&ended.code()), "{ended}");
        for word in ["builtin:nothing", "hello", "echo", "welcome"] {
            assert!(ended.stderr.contains(word), "no {word:?}: {ended}");
        }
    });
}

#[test]
fn an_option_may_come_from_the_environment() {
    for_each_backend(|backend| {
        let mut command = backend.command("builtin:echo", &[]);
        command.env("URINGD_LIMIT_BODY", "3");
        let server = crate::support::Server::start(command).unwrap_or_else(|end| panic!("{end}"));
        assert_eq!(server.ask(crate::support::post("/", "four")).status, 413);

        let mut command = backend.command("builtin:echo", &["--limit-body", "4"]);
        command.env("URINGD_LIMIT_BODY", "3");
        let server = crate::support::Server::start(command).unwrap_or_else(|end| panic!("{end}"));
        assert_eq!(server.ask(crate::support::post("/", "four")).status, 200, "the command line wins");
    });
}

#[test]
fn permit_relaxes_the_rule_it_names() {
    for_each_backend(|backend| {
        let no_host = "GET / HTTP/1.1\r\n\r\n";
        let strict = backend.serve("builtin:echo", &[]);
        assert_eq!(strict.ask(no_host).status, 400);
        let relaxed = backend.serve("builtin:echo", &["--permit", "host-missing"]);
        assert_eq!(relaxed.ask(no_host).status, 200);
        assert_eq!(relaxed.ask("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n").status, 400, "but no other");
    });
}

//! The compact behaviour suite (`tests/behaviour`) on every tier of io_uring that this machine can play, with each single
//! feature taken away, and on epoll; at the end, a matrix.
//!
//! Each row is a process of its own, because the mask is read from the environment and because a shard that breaks a
//! rule of its own aborts its process. The rings of these processes are restricted by the kernel itself to the
//! operations of their tier, and each submission is checked against the capabilities (debug assertions), so a
//! feature that is used without asking fails loudly.

mod behaviour;

use std::{
    env,
    io::{self, Write},
    process::{Command, Stdio},
};

use uringd::{config::Backend, driver::capabilities::Capabilities};

/// Tells a process of this test that it is to be a row, and of which backend.
const ROW: &str = "URINGD_TEST_TIERS_ROW";
const TIERS: [&str; 6] = ["tier=5.15", "tier=5.19", "tier=6.0", "tier=6.1", "tier=6.6", "tier=6.12"];

#[test]
fn every_tier_and_every_missing_feature_behaves_the_same() {
    let mut rows = vec![("epoll".to_owned(), "epoll", String::new())];
    match Capabilities::probe() {
        Ok(caps) => {
            rows.extend(TIERS.map(|tier| (format!("uring {tier}"), "uring", tier.to_owned())));
            let features = caps.to_string();
            let features = features.split(' ').filter(|feature| !feature.starts_with('-'));
            rows.extend(features.map(|feature| (format!("uring -{feature}"), "uring", format!("-{feature}"))));
        }
        Err(why) => say(&format!("SKIPPED io_uring: {why}\n")),
    }
    let mut matrix = String::new();
    let mut failed = Vec::new();
    for (name, backend, mask) in rows {
        let report = row(backend, &mask);
        let count = |what: &str| report.lines().filter(|line| line.starts_with(what)).count();
        let whole = report.lines().any(|line| line == "row complete");
        let (passed, broken) = (count("ok "), count("FAILED "));
        let verdict = if whole && broken == 0 && passed > 0 { "ok" } else { "FAILED" };
        matrix += &format!("{name:<26} {verdict:<7} {passed} of {} cases\n", passed + broken);
        if verdict == "FAILED" {
            failed.push(format!("--- {name}\n{report}"));
        }
    }
    say(&format!("\n{matrix}"));
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// A row: runs the suite in this process, when it was started as one.
#[test]
fn a_row_of_the_matrix() {
    let Some(backend) = env::var_os(ROW) else { return };
    let backend = if backend == "epoll" { Backend::Epoll } else { Backend::Uring };
    let ended = behaviour::run(backend, &mut |sentence, result| match result {
        Ok(()) => println!("ok {sentence}"),
        Err(why) => println!("FAILED {sentence}: {why}"),
    });
    ended.expect("a server");
    println!("row complete");
}

/// What the process of a row wrote.
fn row(backend: &str, mask: &str) -> String {
    let mut command = Command::new(env::current_exe().expect("this test"));
    command.args(["--exact", "a_row_of_the_matrix", "--nocapture"]).stdin(Stdio::null());
    command.env(ROW, backend).env("URINGD_IO_MASK", mask).env("URINGD_IO_RESTRICT", "1").env("RUST_BACKTRACE", "0");
    let output = command.output().expect("this test can be run");
    // The harness puts the name of the test before the first line.
    let text = String::from_utf8_lossy(&output.stdout).replace("test a_row_of_the_matrix ... ", "");
    format!("{text}{}{}", String::from_utf8_lossy(&output.stderr), output.status)
}

/// Past the capture of the test harness.
fn say(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

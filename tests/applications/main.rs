//! Real applications under the real binary: Flask, Django, Falcon, Bottle, and one for each clause of PEP 3333.
//!
//! The tests are Python's. `run`, beside this file, installs what they need and prints what a test harness prints; without a
//! Python it says SKIPPED. `URINGD_TEST_PYTHON` names the interpreter (`python3` when not set).

use std::{
    env,
    ffi::OsString,
    io,
    path::Path,
    process::{Command, ExitCode},
};

fn main() -> ExitCode {
    let Some(words) = words(env::args().skip(1)) else { return ExitCode::SUCCESS };
    let python = env::var_os("URINGD_TEST_PYTHON").unwrap_or_else(|| OsString::from("python3"));
    let mut command = Command::new(&python);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/applications/run"));
    command.args(["--uringd", env!("CARGO_BIN_EXE_uringd"), "--work", env!("CARGO_TARGET_TMPDIR")]);
    match command.args(words).status() {
        Ok(status) => ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(101)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!("SKIPPED applications: there is no {}; try: URINGD_TEST_PYTHON", python.display());
            println!("\ntest result: ok. 0 passed; 0 failed; 1 ignored");
            ExitCode::SUCCESS
        }
        Err(error) => panic!("{}: {error}", python.display()),
    }
}

/// The words that a test's name must hold, of what cargo passes to every harness. `None`: nothing is to be run.
fn words(mut arguments: impl Iterator<Item = String>) -> Option<Vec<String>> {
    let mut words = Vec::new();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--list" => return None,
            "--skip" | "--test-threads" | "--color" | "--format" => drop(arguments.next()),
            option if option.starts_with('-') => {}
            _ => words.push(argument),
        }
    }
    Some(words)
}

//! Whatever a peer sends, the parser and a slow reading of the RFC's grammar agree about it.
#![no_main]

extern crate uringd;

#[path = "../compare.rs"]
mod compare;
#[path = "../../it/oracle.rs"]
mod oracle;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| compare::fuzz(data));

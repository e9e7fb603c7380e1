//! Whatever a peer sends and however it is cut, the events are the same and no invariant breaks.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| uringd::http1::fuzzing::fuzz_connection(data));

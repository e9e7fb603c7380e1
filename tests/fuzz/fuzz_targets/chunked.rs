//! The chunked coding, both ways: any bytes as a body, and any body as chunks.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| uringd::http1::fuzzing::fuzz_chunked(data));

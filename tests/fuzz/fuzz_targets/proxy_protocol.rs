//! Whatever stands before the first request, and however it is cut: the same client, or the same fault.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| uringd::proxy_protocol::fuzz(data));

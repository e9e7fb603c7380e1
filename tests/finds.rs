//! What the fuzzer once found stays mended: `tests/fuzz/finds/TARGET/` has its inputs. See scripts/fuzz.

extern crate uringd;

#[path = "fuzz/compare.rs"]
mod compare;
#[path = "it/oracle.rs"]
mod oracle;

use std::{fs, path::Path};

use uringd::{http1::fuzzing, proxy_protocol};

/// A fuzz function: takes any bytes, panics when a promise is broken.
type Target = fn(&[u8]);

#[test]
fn every_find_of_the_fuzzer_stays_mended() {
    let targets: [(&str, Target); 4] = [
        ("connection", fuzzing::fuzz_connection),
        ("chunked", fuzzing::fuzz_chunked),
        ("oracle", compare::fuzz),
        ("proxy_protocol", proxy_protocol::fuzz),
    ];
    for (name, target) in targets {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/finds").join(name);
        // A target that never had a find has no folder.
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.expect("a readable folder").path();
            println!("{}", path.display());
            target(&fs::read(&path).expect("a readable file"));
        }
    }
}

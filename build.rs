//! Compiles python/uringd_native.rs, which the interpreter of an application loads, into the output directory.

use std::{env, fs, path::Path, process::Command};

const SOURCE: &str = "python/uringd_native.rs";

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name: &str| env::var(name).unwrap_or_default();
    let module = Path::new(&variable("OUT_DIR")).join("uringd_native.so");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--edition", "2024", "--crate-type", "cdylib", "--target", &variable("TARGET"), SOURCE, "-o"]).arg(&module);
    rustc.args(["-C", "opt-level=3", "-C", "panic=abort", "-C", "lto=fat", "-C", "strip=symbols"]);
    if variable("CARGO_CFG_TARGET_ENV") == "musl" {
        // Or there are no shared objects.
        rustc.args(["-C", "target-feature=-crt-static"]);
    }
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    if !rustc.status().is_ok_and(|status| status.success()) {
        println!("cargo::warning=without the native module for Python workers, which could not be compiled");
        fs::write(&module, "").expect("the output directory can be written to");
    }
}

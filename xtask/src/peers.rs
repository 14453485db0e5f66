//! `cargo xtask peers`: the tunnel beside other people's WireGuard that has to be built
//! first, and for as long as a session lives.
//!
//! What it is not: part of `cargo xtask test`, which builds nothing but this workspace.

use std::path::PathBuf;

/// Packages of the registry, and the versions that were tried.
const PEERS: [(&str, &str); 2] = [("boringtun-cli", "0.7.1"), ("gotatun-cli", "0.10.2")];

/// Where they are installed; a later run finds them there.
pub(crate) fn directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| crate::workspace_root().join("target")).join("peers")
}

/// Builds the peers and runs the tests; whether they passed.
pub(crate) fn run() -> Result<bool, String> {
    for (package, version) in PEERS {
        let mut command = crate::cargo();
        command.args(["install", "--locked", "--version", version, package, "--root"]);
        let status = command.arg(directory()).status();
        let status = status.map_err(|error| format!("cannot run cargo: {error}"))?;
        if !status.success() {
            return Err(format!("cargo install {package} failed; is the registry reachable?"));
        }
    }
    let tests = ["--package", "conet-tunnel", "--features", "peers", "--test", "interop"];
    let counts = crate::test_run::run(&tests.map(str::to_owned))?;
    Ok(counts.verdict())
}

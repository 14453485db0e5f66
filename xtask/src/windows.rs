//! `cargo xtask windows`: the tunnel built for Windows, and its unit tests run by wine.
//!
//! The toolchain is Debian's (a Rust whose own sources it has, mingw, wine), since a
//! rustup without the target may be all there is. wintun's driver cannot be loaded there:
//! `tunnel/tests/windows/wintun.c` stands in for its library. What it is not: a proof that
//! the tunnel runs on a Windows machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const TARGET: &str = "x86_64-pc-windows-gnu";
const RUSTC: &str = "/usr/bin/rustc";
const LINKER: &str = "x86_64-w64-mingw32-gcc";
/// Files, and the Debian packages that bring them.
const FILES: [(&str, &str); 5] = [
    (RUSTC, "rustc-web"),
    ("/usr/lib/rustlib/src/rust/library/Cargo.toml", "rust-web-src"),
    ("/usr/bin/x86_64-w64-mingw32-gcc", "gcc-mingw-w64-x86-64-win32"),
    ("/usr/bin/wine", "wine"),
    (ZLIB, "libz-mingw-w64"),
];
/// wine 8 lacks a library of Windows 10 that Rust's standard library asks for randomness.
const RANDOM: &str = "#include <windows.h>
BOOLEAN NTAPI SystemFunction036(void *, ULONG);
__declspec(dllexport) BOOL WINAPI ProcessPrng(BYTE *bytes, SIZE_T size)
{ return SystemFunction036(bytes, (ULONG)size); }
";
const ZLIB: &str = "/usr/x86_64-w64-mingw32/lib/zlib1.dll";
/// An interface that wine knows, which stands in for the adapter's.
const ALIAS: &str = "lo";

/// Gets what it needs, and tries it on something that is not ours.
pub(crate) fn prepare() -> Result<(), String> {
    crate::packages::install_files(&FILES)?;
    if let Some((file, package)) = FILES.iter().find(|(file, _)| !Path::new(file).exists()) {
        return Err(format!("{file} is not there; install {package}"));
    }
    succeed(&mut cargo(&["build", "-p", "ipnet"]))?;
    succeed(wine().args(["cmd", "/c", "exit"]))
}

/// Bounded: it waits for ever where it cannot have what it wants of the machine.
fn wine() -> Command {
    let mut command = Command::new("timeout");
    command.args(["300", "wine"]);
    command.env("WINEPREFIX", target_directory().join("wine")).env("WINEDEBUG", "-all");
    // Nor does it ask for what only other programs want.
    command.env("WINEDLLOVERRIDES", "mscoree,mshtml=").stdin(Stdio::null());
    command
}

/// Builds and runs; whether the tests passed.
pub(crate) fn run() -> Result<bool, String> {
    succeed(&mut cargo(&["build", "--lib", "--examples", "-p", "conet-tunnel"]))?;
    let arguments = ["test", "--lib", "-p", "conet-tunnel", "--no-run", "--message-format", "json"];
    let output = cargo(&arguments)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    let program = executable(&String::from_utf8_lossy(&output.stdout))
        .ok_or("cargo has built no test for Windows")?;
    let beside = program.parent().ok_or("a test without a directory")?.to_path_buf();
    let fake = beside.join("conet_fake_wintun.dll");
    let source = crate::workspace_root().join("tunnel/tests/windows/wintun.c");
    library(&source, &fake, &[])?;
    let random = beside.join("random.c");
    write(&random, RANDOM.as_bytes())?;
    library(&random, &beside.join("bcryptprimitives.dll"), &["-ladvapi32"])?;
    let zlib = fs::read(ZLIB).map_err(|error| format!("{ZLIB}: {error}"))?;
    write(&beside.join("zlib1.dll"), &zlib)?;
    let status = wine()
        .arg(&program)
        // wine shows the root directory as drive Z.
        .env("CONET_FAKE_WINTUN", format!("Z:{}", fake.display()))
        .env("CONET_FAKE_ADAPTER", ALIAS)
        .status()
        .map_err(|error| format!("cannot run wine: {error}"))?;
    Ok(status.success())
}

/// With Debian's compiler, which is of another version than ours: it builds the standard
/// library from its own sources, which takes what is unstable elsewhere.
fn cargo(arguments: &[&str]) -> Command {
    let mut command = crate::cargo();
    command
        .args(arguments)
        .args(["-Zbuild-std=std,panic_abort,test", "--target", TARGET])
        .env("RUSTC", RUSTC)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_X86_64_PC_WINDOWS_GNU_LINKER", LINKER)
        .env("CARGO_TARGET_DIR", target_directory());
    command
}

/// Apart from ours: the compiler is another one.
fn target_directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| crate::workspace_root().join("target")).join("windows")
}

fn executable(messages: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str(line).ok());
    messages
        .filter_map(|message: serde_json::Value| Some(message.get("executable")?.as_str()?.into()))
        .next_back()
}

fn library(source: &Path, to: &Path, libraries: &[&str]) -> Result<(), String> {
    let mut command = Command::new(LINKER);
    command.args(["-shared", "-O2", "-Wall", "-Wextra", "-Werror", "-o"]).arg(to);
    succeed(command.arg(source).args(libraries))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}

fn succeed(command: &mut Command) -> Result<(), String> {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{command:?} has failed: {status}")),
        Err(error) => Err(format!("cannot run {command:?}: {error}")),
    }
}

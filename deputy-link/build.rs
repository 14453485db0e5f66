//! Builds the agent, a `no_std` program for the host target, and embeds it.
//!
//! The agent is a workspace of its own (a `no_std` program breaks `cargo build` and
//! `cargo test` in a shared one), so cargo is called with a target directory of its
//! own. The result is checked: no relocation may be left and nothing
//! undefined, since nobody would fill them in.

use object::{Object, ObjectSection, ObjectSegment, SegmentFlags};
use std::env;
use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";
const BASE: u64 = 0x2000_0000_0000;
const LIMIT: u64 = BASE + 0x00a0_0000;

fn main() -> Result<(), Box<dyn Error>> {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for path in
        ["agent/src", "agent/Cargo.toml", "agent/Cargo.lock", "core", "../wire", "../transport/src"]
    {
        println!("cargo::rerun-if-changed={}", here.join(path).display());
    }
    let program = build(&here.join("agent"), &shared(&out))?;
    let bytes = fs::read(&program)?;
    let constants = describe(&bytes)?;
    fs::write(out.join("agent.elf"), &bytes)?;
    fs::write(out.join("agent.rs"), constants)?;
    Ok(())
}

/// Where the agent is built: one directory for all profiles of the outer build, since
/// the agent has one profile, and its crates take a minute.
fn shared(out: &Path) -> PathBuf {
    // Cargo marks a target directory that it made; in another we stay below `OUT_DIR`.
    let target = out.ancestors().find(|directory| directory.join("CACHEDIR.TAG").exists());
    target.unwrap_or(out).join("agent")
}

fn build(agent: &Path, target: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let flags = [
        "-Ctarget-feature=+crt-static",
        "-Crelocation-model=static",
        "-Ccode-model=large",
        "-Cpanic=abort",
        "-Clink-arg=-nostartfiles",
        "-Clink-arg=-nostdlib",
        "-Clink-arg=-static",
        "-Clink-arg=-no-pie",
        "-Clink-arg=-Wl,--image-base=0x200000000000",
        "-Clink-arg=-Wl,-z,noexecstack",
        "-Clink-arg=-Wl,--build-id=none",
    ];
    let mut cargo = Command::new(env::var("CARGO")?);
    cargo
        .current_dir(agent)
        .args(["build", "--release", "--locked", "--target", TARGET, "--target-dir"])
        .arg(target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    // What cargo and its wrappers say of the outer build must not reach the inner.
    for (name, _) in env::vars() {
        let inherited = name.starts_with("CARGO_FEATURE_")
            || name.starts_with("CARGO_CFG_")
            || name.starts_with("CARGO_PROFILE_")
            || name.starts_with("CARGO_PKG_")
            || [
                "RUSTFLAGS",
                "CARGO_BUILD_TARGET",
                "RUSTC_WORKSPACE_WRAPPER",
                "RUSTC_WRAPPER",
                "CARGO_MAKEFLAGS",
                "MAKEFLAGS",
                "TARGET",
                "HOST",
                "CLIPPY_ARGS",
            ]
            .contains(&name.as_str());
        if inherited {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status()?;
    if !status.success() {
        return Err(format!("building the agent failed: {status}").into());
    }
    Ok(target.join(TARGET).join("release/conet-agent"))
}

/// Checks the program and writes where its segments go.
fn describe(bytes: &[u8]) -> Result<String, Box<dyn Error>> {
    let elf = object::read::elf::ElfFile64::<object::Endianness>::parse(bytes)?;
    if let Some(name) = elf.symbols_undefined() {
        return Err(format!("the agent has an undefined symbol: {name}").into());
    }
    if elf.sections().any(|section| section.name().is_ok_and(|name| name.starts_with(".rela"))) {
        return Err("the agent has relocations".into());
    }
    let mut text = String::new();
    writeln!(
        text,
        "/// Where the program begins.\npub(crate) const ENTRY: u64 = {:#x};",
        elf.entry()
    )?;
    writeln!(text, "/// Address, offset and length in the file, length in memory, PROT bits.")?;
    writeln!(text, "pub(crate) const SEGMENTS: &[(u64, usize, usize, u64, u32)] = &[")?;
    for segment in elf.segments() {
        let (offset, len) = segment.file_range();
        let SegmentFlags::Elf { p_flags } = segment.flags() else {
            return Err("not an ELF segment".into());
        };
        let prot = (p_flags >> 2 & 1) | (p_flags & 2) | (p_flags & 1) << 2;
        let end = segment.address() + segment.size();
        if segment.address() < BASE || end > LIMIT || prot & 6 == 6 {
            return Err(
                format!("segment {:#x} is not where it should be", segment.address()).into()
            );
        }
        writeln!(
            text,
            "    ({:#x}, {offset:#x}, {len:#x}, {:#x}, {prot}),",
            segment.address(),
            segment.size()
        )?;
    }
    writeln!(text, "];")?;
    Ok(text)
}

trait Undefined {
    fn symbols_undefined(&self) -> Option<String>;
}

impl Undefined for object::read::elf::ElfFile64<'_, object::Endianness> {
    fn symbols_undefined(&self) -> Option<String> {
        use object::ObjectSymbol;
        self.symbols()
            .find(|s| s.is_undefined() && s.name().is_ok_and(|name| !name.is_empty()))
            .and_then(|s| s.name().ok().map(str::to_owned))
    }
}

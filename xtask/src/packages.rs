//! Programs that the tests run, and the Debian packages that bring them.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

/// Program on `PATH`, and the package that has it.
///
/// What every Debian has (coreutils, util-linux, a shell) is not listed.
const PROGRAMS: &[(&str, &str)] = &[
    // Whichever awk it is: the tests ask for the name.
    ("awk", "gawk"),
    // The static one, which goes into machines as it is; udhcpc takes either.
    ("busybox", "busybox-static"),
    ("cc", "gcc"),
    ("dhclient", "isc-dhcp-client"),
    ("gzip", "gzip"),
    ("ip", "iproute2"),
    ("iperf3", "iperf3"),
    ("kill", "procps"),
    ("pgrep", "procps"),
    ("nft", "nftables"),
    ("ping", "iputils-ping"),
    ("python3", "python3"),
    ("tcpdump", "tcpdump"),
    ("udhcpc", "udhcpc"),
    ("wg", "wireguard-tools"),
    ("wireguard-go", "wireguard-go"),
    ("xz", "xz-utils"),
];

/// Files that programs need which tests compile, static ones included: gcc alone
/// does not bring them.
const FILES: &[(&str, &str)] =
    &[("/usr/include/stdio.h", "libc6-dev"), ("/usr/lib/x86_64-linux-gnu/libc.a", "libc6-dev")];

/// Installs what is missing, as root by apt-get; as another user says what is
/// missing and goes on, since the tests that need it then say so themselves.
pub(crate) fn install() -> Result<(), String> {
    install_these(&missing())
}

/// The same for what only some tests use.
pub(crate) fn install_more(programs: &[(&str, &'static str)]) -> Result<(), String> {
    let missing = programs.iter().filter(|(program, _)| !on_path(program));
    install_these(&missing.map(|(_, package)| *package).collect::<Vec<_>>())
}

/// The same by files that the packages bring.
pub(crate) fn install_files(files: &[(&str, &'static str)]) -> Result<(), String> {
    let missing = files.iter().filter(|(file, _)| !Path::new(file).exists());
    install_these(&missing.map(|(_, package)| *package).collect::<Vec<_>>())
}

fn install_these(missing: &[&'static str]) -> Result<(), String> {
    if missing.is_empty() {
        return Ok(());
    }
    if !crate::is_root() {
        eprintln!("xtask: not installed: {} (root would install them)", missing.join(" "));
        return Ok(());
    }
    eprintln!("xtask: installing {}", missing.join(" "));
    apt_get(&["update"])?;
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.extend(missing);
    apt_get(&arguments)
}

fn missing() -> Vec<&'static str> {
    let programs = PROGRAMS.iter().filter(|(program, _)| !on_path(program));
    let files = FILES.iter().filter(|(file, _)| !Path::new(file).exists());
    let mut packages: Vec<_> = programs.chain(files).map(|(_, package)| *package).collect();
    packages.dedup();
    packages
}

fn apt_get(arguments: &[&str]) -> Result<(), String> {
    let status = Command::new("apt-get")
        .arg("-q")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(|error| {
            format!("cannot run apt-get ({error}): install {}", missing().join(" "))
        })?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("apt-get {} failed: install {}", arguments[0], missing().join(" ")))
    }
}

/// Where programs are looked for: `PATH`, what only root's usually has, and
/// [`crate::peers`].
///
/// The tests get the same, so that what is found here is found there.
pub(crate) fn path() -> OsString {
    let given = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin".into(), "/sbin".into(), crate::peers::directory().join("bin")];
    let dirs = std::env::split_paths(&given).chain(more);
    // Fails for a directory with a colon in its name, which `split_paths` never gives.
    std::env::join_paths(dirs).unwrap_or(given.clone())
}

fn on_path(name: &str) -> bool {
    std::env::split_paths(&path()).any(|dir| dir.join(name).is_file())
}

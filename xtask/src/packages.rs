//! Programs that the tests run, and the Debian packages that bring them.

use std::path::Path;
use std::process::{Command, Stdio};

/// Program on `PATH`, and the package that has it.
const PROGRAMS: &[(&str, &str)] = &[
    ("gawk", "gawk"),
    ("gcc", "gcc"),
    ("gzip", "gzip"),
    ("iperf3", "iperf3"),
    ("ip", "iproute2"),
    ("ping", "iputils-ping"),
    ("python3", "python3"),
    ("tcpdump", "tcpdump"),
    ("xz", "xz-utils"),
];

/// Header that a C program needs: gcc alone does not bring it.
const LIBC_HEADER: (&str, &str) = ("/usr/include/stdio.h", "libc6-dev");

/// Installs what is missing, as root by apt-get; as another user says what is
/// missing and goes on, since the tests that need it then say so themselves.
pub(crate) fn install() -> Result<(), String> {
    let missing = missing();
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
    arguments.extend(&missing);
    apt_get(&arguments)
}

fn missing() -> Vec<&'static str> {
    let header = (!Path::new(LIBC_HEADER.0).exists()).then_some(LIBC_HEADER.1);
    PROGRAMS
        .iter()
        .filter(|(program, _)| !on_path(program))
        .map(|(_, package)| *package)
        .chain(header)
        .collect()
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

fn on_path(name: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|dir| dir.join(name).is_file())
    })
}

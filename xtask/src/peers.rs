//! `cargo xtask peers`: tunnel and ports beside other people's, where they have to be built
//! first, are kernels of their own, or are watched for as long as a session lives.
//!
//! Fifteen minutes, and ten for what is built once. `CONET_GUEST_MIB=1024` sends a gigabyte
//! each way between guests of every kind and the other host, in place of 100 MiB of machines
//! and 16 of namespaces: half an hour more. What it is not: part of `cargo xtask test`, which
//! builds nothing but this workspace.

use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Packages of the registry, and the versions that were tried.
const PEERS: [(&str, &str); 2] = [("boringtun-cli", "0.7.1"), ("gotatun-cli", "0.10.2")];
/// Programs for the kernels, and the Debian packages that bring them.
const PROGRAMS: [(&str, &str); 7] = [
    ("busybox", "busybox-static"),
    ("linux.uml", "user-mode-linux"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("dpkg-deb", "dpkg"),
    ("xz", "xz-utils"),
    ("dhclient", "isc-dhcp-client"),
    ("socat", "socat"),
];
/// Packages and their tests.
const TESTS: [(&str, &[&str]); 3] = [
    ("conet-tunnel", &["interop", "kernels"]),
    ("conet-hostinject", &["gigabyte"]),
    ("conet", &["machines", "start"]),
];
/// Names the newest kernel package.
const META_PACKAGE: &str = "linux-image-amd64";
/// Tells the tests where [`kernel`] is.
pub(crate) const KERNEL: &str = "CONET_PEERS_KERNEL";

/// Where they are installed; a later run finds them there.
pub(crate) fn directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| crate::workspace_root().join("target")).join("peers")
}

/// Debian's kernel and its modules, unpacked.
pub(crate) fn kernel() -> PathBuf {
    directory().join("kernel")
}

/// Gets the peers and runs the tests; whether they passed.
pub(crate) fn run() -> Result<bool, String> {
    crate::packages::install_more(&PROGRAMS)?;
    unpack_kernel()?;
    for (package, version) in PEERS {
        let mut command = crate::cargo();
        command.args(["install", "--locked", "--version", version, package, "--root"]);
        let status = command.arg(directory()).status();
        let status = status.map_err(|error| format!("cannot run cargo: {error}"))?;
        if !status.success() {
            return Err(format!("cargo install {package} failed; is the registry reachable?"));
        }
    }
    let mut is_good = true;
    for (package, tests) in TESTS {
        let mut arguments = vec!["--package", package, "--features", "peers"];
        arguments.extend(tests.iter().flat_map(|test| ["--test", test]));
        let arguments: Vec<_> = arguments.into_iter().map(str::to_owned).collect();
        is_good &= crate::test_run::run(&arguments)?.verdict();
    }
    Ok(is_good)
}

/// Downloads Debian's kernel package and unpacks it. It is not installed: that would
/// change how this machine boots.
fn unpack_kernel() -> Result<(), String> {
    let to = kernel();
    if to.join("boot").is_dir() {
        return Ok(());
    }
    let depends = output(Command::new("apt-cache").args(["depends", META_PACKAGE]))?;
    let package = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| format!("apt-cache knows no {META_PACKAGE}; run: apt-get update"))?;
    eprintln!("xtask: unpacking {package}");
    let next = directory().join("kernel.next");
    // Of a run that was cut short.
    std::fs::remove_dir_all(&next).ok();
    std::fs::create_dir_all(&next).map_err(|error| format!("{}: {error}", next.display()))?;
    output(Command::new("apt-get").args(["-q", "download", package]).current_dir(&next))?;
    let archive = std::fs::read_dir(&next)
        .ok()
        .and_then(|mut entries| entries.find_map(|entry| Some(entry.ok()?.path())))
        .ok_or_else(|| format!("apt-get downloaded no {package}"))?;
    output(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&next))?;
    std::fs::remove_file(&archive).ok();
    std::fs::rename(&next, &to).map_err(|error| format!("{}: {error}", to.display()))
}

fn output(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_owned();
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!(
            "{} failed: {}",
            program.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}

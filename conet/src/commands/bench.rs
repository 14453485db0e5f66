//! `conet bench`: finds a benchmark's executable, and becomes it.
//!
//! What it is not: it measures nothing, and knows of no benchmark what it does.
//!
//! ```text
//! conet-bench-NAME beside this executable ──────────────────────────────► run it
//! a checkout that holds this directory, or this executable ─ cargo bench ─► run it
//! ```
//!
//! A checkout is built anew where it has changed, so that what is measured is what the
//! report's commit says. Building runs code of the checkout, as in any directory of
//! somebody else's: it is refused where the checkout is not the user's own or root's.
//!
//! Sources: doc.rust-lang.org/cargo, "External tools" (JSON messages), `cargo metadata`.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, anyhow, bail};
use serde_json::{Value, json};

use super::process::ExecError;
use crate::table;

/// The package of the benchmarks.
const PACKAGE: &str = "conet-benches";
/// How installed benchmarks are named.
const PREFIX: &str = "conet-bench-";

/// Where a benchmark comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Executable(PathBuf),
    Checkout(PathBuf),
}

impl Place {
    fn path(&self) -> &Path {
        let (Self::Executable(path) | Self::Checkout(path)) = self;
        path
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Bench {
    from: Place,
    about: Option<String>,
    /// Whether it takes `--json`; nobody knows of an installed one.
    json: Option<bool>,
}

/// Prints what can be measured.
pub(super) fn list(json: bool) -> Result<()> {
    let benches = find()?;
    if json {
        let benches: Vec<_> = benches
            .iter()
            .map(|(name, bench)| {
                let (about, json) = (&bench.about, bench.json);
                json!({"name": name, "about": about, "json": json, "from": bench.from.path()})
            })
            .collect();
        return Ok(table::json(&json!({ "benches": benches }))?);
    }
    let mut list = table::table(&["NAME", "JSON", "ABOUT"]);
    for (name, bench) in &benches {
        let json = bench.json.map(|json| if json { "yes" } else { "no" });
        list.add_row([name.clone(), table::or_dash(json), table::or_dash(bench.about.as_ref())]);
    }
    Ok(table::print(&list)?)
}

/// Becomes the benchmark.
pub(super) fn run(name: &str, json: bool, options: Vec<OsString>) -> Result<()> {
    let benches = find()?;
    let Some(bench) = benches.get(name) else {
        let names: Vec<_> = benches.keys().map(String::as_str).collect();
        bail!("no benchmark {name}; there are: {}", names.join(", "));
    };
    if json && bench.json == Some(false) {
        bail!("benchmark {name} gives no JSON; run it without --json");
    }
    let executable = match &bench.from {
        Place::Executable(path) => path.clone(),
        Place::Checkout(root) => build(root, name)?,
    };
    // As cargo starts it: criterion takes a run without --bench for a test.
    let mut command = Command::new(&executable);
    command.arg("--bench").args(json.then_some("--json")).args(options);
    let source = command.exec();
    Err(ExecError { program: executable.into(), source }.into())
}

/// All that there is, by name: what is installed, else what the checkout has.
fn find() -> Result<BTreeMap<String, Bench>> {
    let executable = env::current_exe()?;
    let beside = executable.parent().unwrap_or(Path::new("/"));
    let installed = installed(beside);
    if !installed.is_empty() {
        return Ok(installed);
    }
    let here = env::current_dir()?;
    let Some(root) = checkout(&here).or_else(|| checkout(beside)) else {
        let beside = beside.display();
        bail!(
            "no benchmarks: this is no checkout of conet's sources, and {beside} has no \
             {PREFIX}NAME; run it inside of a checkout"
        );
    };
    check_owner(&root)?;
    parse_metadata(&metadata(&root)?, &root)
        .ok_or_else(|| anyhow!("cargo does not know {PACKAGE} in {}", root.display()))
}

fn installed(directory: &Path) -> BTreeMap<String, Bench> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let named = entries.filter_map(|entry| {
        let name = entry.file_name().to_str()?.strip_prefix(PREFIX)?.to_owned();
        let is_program = entry.path().metadata().is_ok_and(|file| {
            const EXECUTABLE: u32 = 0o111;
            file.is_file() && file.mode() & EXECUTABLE != 0
        });
        let from = Place::Executable(entry.path());
        (is_program && !name.is_empty()).then_some((name, Bench { from, about: None, json: None }))
    });
    named.collect()
}

fn manifest(root: &Path) -> PathBuf {
    root.join("benches/Cargo.toml")
}

/// The checkout that a directory is in.
fn checkout(directory: &Path) -> Option<PathBuf> {
    let is_ours = |root: &&Path| {
        let name = format!("name = \"{PACKAGE}\"");
        fs::read_to_string(manifest(root)).is_ok_and(|text| text.lines().any(|line| line == name))
    };
    directory.ancestors().find(is_ours).map(Path::to_owned)
}

/// Refuses to build what another user may have put there: in /tmp, say, where root is.
fn check_owner(root: &Path) -> Result<()> {
    // Who became root by sudo builds checkouts of their own.
    let by_sudo = env::var("SUDO_UID").ok().and_then(|uid| uid.parse().ok());
    let own = fs::metadata("/proc/self")?.uid();
    let allowed = |uid: u32| uid == 0 || uid == own || own == 0 && by_sudo == Some(uid);
    for path in [root.to_owned(), manifest(root)] {
        let owner = fs::metadata(&path)?.uid();
        if !allowed(owner) {
            let path = path.display();
            bail!(
                "{path} belongs to uid {owner}, and building it would run its code; run \
                   conet bench as that user, or in a checkout of your own"
            );
        }
    }
    Ok(())
}

/// Cargo, asked about the checkout's benchmarks.
fn cargo(root: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).arg("--manifest-path").arg(manifest(root));
    command.current_dir(root).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

fn no_cargo(error: &io::Error) -> anyhow::Error {
    anyhow!("cannot run cargo ({error}), which builds benchmarks; install it: https://rustup.rs")
}

fn metadata(root: &Path) -> Result<Value> {
    let mut command = cargo(root, &["metadata", "--no-deps", "--format-version", "1"]);
    let output = command.stderr(Stdio::inherit()).output().map_err(|error| no_cargo(&error))?;
    if !output.status.success() {
        bail!("cargo cannot read {}; see above", manifest(root).display());
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|error| anyhow!("cargo metadata gave no JSON ({error})"))
}

/// The benchmarks that `cargo metadata` names.
fn parse_metadata(metadata: &Value, root: &Path) -> Option<BTreeMap<String, Bench>> {
    let packages = metadata["packages"].as_array()?;
    let package = packages.iter().find(|package| package["name"] == PACKAGE)?;
    let benches = package["targets"].as_array()?.iter().filter_map(|target| {
        let is_bench = target["kind"].as_array()?.iter().any(|kind| kind == "bench");
        let name = target["name"].as_str().filter(|_| is_bench)?;
        let told = &package["metadata"]["conet"][name];
        let about = told["about"].as_str().map(str::to_owned);
        let json = Some(told["json"].as_bool().unwrap_or(false));
        Some((name.to_owned(), Bench { from: Place::Checkout(root.to_owned()), about, json }))
    });
    Some(benches.collect())
}

/// Builds a benchmark where that is necessary; its executable.
fn build(root: &Path, name: &str) -> Result<PathBuf> {
    let format = "--message-format=json-render-diagnostics";
    let mut command = cargo(root, &["bench", "--no-run", format, "--bench", name]);
    let mut child = command.spawn().map_err(|error| no_cargo(&error))?;
    let mut executable = None;
    for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()) {
        let message = serde_json::from_str(&line?).unwrap_or(Value::Null);
        executable = executable_of(&message, name).or(executable);
    }
    match executable {
        Some(executable) if child.wait()?.success() => Ok(executable),
        _ => bail!("cargo could not build benchmark {name}; see above"),
    }
}

/// The executable that one of cargo's messages tells of.
fn executable_of(message: &Value, name: &str) -> Option<PathBuf> {
    let target = &message["target"];
    let is_bench = target["kind"].as_array()?.iter().any(|kind| kind == "bench");
    let is_it = message["reason"] == "compiler-artifact" && target["name"] == name;
    (is_bench && is_it).then(|| message["executable"].as_str().map(PathBuf::from))?
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_installed_is_found_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        for (name, mode) in [("conet", 0o755), ("conet-bench-a", 0o755), ("conet-bench-b", 0o644)] {
            let path = dir.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir(dir.path().join("conet-bench-c")).unwrap();
        assert_eq!(installed(dir.path()).into_keys().collect::<Vec<_>>(), ["a"]);
        assert!(installed(&dir.path().join("absent")).is_empty());
    }

    #[test]
    fn a_checkout_is_told_by_its_package() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::create_dir(dir.path().join("benches")).unwrap();
        fs::write(manifest(dir.path()), "[package]\nname = \"other\"\n").unwrap();
        assert_eq!(checkout(&inner), None);
        fs::write(manifest(dir.path()), "[package]\nname = \"conet-benches\"\n").unwrap();
        assert_eq!(checkout(&inner).as_deref(), Some(dir.path()));
    }

    #[test]
    fn cargos_answers_are_understood() {
        let target = |name: &str, kind: &str| json!({"name": name, "kind": [kind]});
        let metadata = json!({"packages": [
            {"name": "other", "targets": [target("x", "bench")]},
            {"name": PACKAGE, "targets": [target("l", "lib"), target("d", "bench"), target("e", "bench")],
             "metadata": {"conet": {"d": {"about": "all", "json": true}}}},
        ]});
        let benches = parse_metadata(&metadata, Path::new("/r")).unwrap();
        assert_eq!(benches.keys().collect::<Vec<_>>(), ["d", "e"]);
        assert_eq!((benches["d"].about.as_deref(), benches["d"].json), (Some("all"), Some(true)));
        assert_eq!((benches["e"].about.as_deref(), benches["e"].json), (None, Some(false)));
        assert_eq!(parse_metadata(&json!({"packages": []}), Path::new("/r")), None);

        let artifact = |name, kind| json!({"reason": "compiler-artifact", "target": target(name, kind), "executable": "/e"});
        assert_eq!(executable_of(&artifact("d", "bench"), "d"), Some(PathBuf::from("/e")));
        for other in [artifact("d", "lib"), artifact("e", "bench"), Value::Null] {
            assert_eq!(executable_of(&other, "d"), None, "{other}");
        }
    }
}

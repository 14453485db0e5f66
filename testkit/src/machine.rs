//! A kernel of its own as a child process: User-Mode Linux, whose files are the host's, and
//! QEMU, whose files are packed here. What card it has is the caller's to say.
//!
//! What it says on its console is read line by line.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]
#![allow(clippy::missing_panics_doc, reason = "as every other line of a test's")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// Tells where `cargo xtask peers` has unpacked Debian's kernel.
pub const KERNEL: &str = "CONET_PEERS_KERNEL";
/// How long a machine may say nothing of what is waited for: emulated, it boots in ten
/// to thirty seconds.
const SILENCE: Duration = Duration::from_secs(180);

/// A running machine; ended with the test, also by a panic.
#[derive(Debug)]
pub struct Machine {
    process: Child,
    console: Receiver<String>,
    directory: PathBuf,
}

impl Machine {
    /// User-Mode Linux with the host's files, read-only; `command` starts `linux.uml` with a
    /// card.
    #[must_use]
    pub fn uml(mut command: Command, script: &str) -> Self {
        let directory = directory("uml");
        let init = directory.join("init");
        let begin = "#!/bin/sh\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
            mount -t proc proc /proc; mount -t tmpfs tmpfs /tmp\n";
        fs::write(&init, format!("{begin}{script}busybox poweroff -f\n")).unwrap();
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
        command.args(["mem=512M", "root=/dev/root", "ro", "rootfstype=hostfs", "rootflags=/"]);
        command.args(["con0=null,fd:1", "con=null", "quiet"]);
        command.arg(format!("init={}", init.display()));
        command.arg(format!("uml_dir={}", directory.display()));
        Self::start(command, directory)
    }

    /// Debian's kernel in QEMU, emulated, with `modules` and what they depend on, and
    /// `programs` (names, or paths); `command` starts `qemu-system-x86_64` with a card and 768 MiB.
    #[must_use]
    pub fn qemu(mut command: Command, modules: &[&str], programs: &[&str], script: &str) -> Self {
        let kernel = std::env::var_os(KERNEL).map(PathBuf::from);
        let kernel = &kernel.expect("cargo xtask peers gets the kernel and says where it is");
        let directory = directory("qemu");
        let mut archive = Archive::default();
        for directory in ["bin", "dev", "proc", "sys", "tmp", "m", "lib", "lib64"] {
            archive.add(directory, 0o040_755, &[]);
        }
        let mut load = String::new();
        let found = Modules::of(kernel);
        let mut done = BTreeSet::new();
        for module in ["virtio_pci", "virtio_net"].iter().chain(modules) {
            found.load(module, &mut done, &mut archive, &mut load);
        }
        for program in [&["busybox"], programs].concat() {
            let path = on_path(program);
            let name = path.file_name().unwrap().to_str().unwrap();
            archive.add(&format!("bin/{name}"), 0o100_755, &fs::read(&path).unwrap());
            for library in libraries(&path) {
                let bytes = fs::read(&library).unwrap();
                let name = library.file_name().unwrap().to_str().unwrap();
                // The loader is where programs name it, the rest where it looks by itself.
                let place = if name.starts_with("ld-") { "lib64" } else { "lib" };
                archive.add(&format!("{place}/{name}"), 0o100_755, &bytes);
            }
        }
        let init = format!(
            "#!/bin/busybox sh\n/bin/busybox --install -s /bin\n\
             mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs d /dev\n\
             mount -t tmpfs tmpfs /tmp\n{load}{script}poweroff -f\n"
        );
        archive.add("init", 0o100_755, init.as_bytes());
        let initrd = directory.join("initrd");
        fs::write(&initrd, archive.finish()).unwrap();
        let arguments = ["-accel", "tcg", "-cpu", "max", "-m", "768", "-nodefaults", "-no-reboot"];
        command.args(arguments);
        command.args(["-display", "none", "-serial", "stdio", "-kernel"]);
        command.arg(image(kernel)).arg("-initrd").arg(initrd);
        command.args(["-append", "console=ttyS0 quiet panic=-1"]);
        Self::start(command, directory)
    }

    fn start(mut command: Command, directory: PathBuf) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut process = command.spawn().unwrap();
        let (sender, console) = channel();
        let lines = BufReader::new(process.stdout.take().unwrap()).split(b'\n');
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { process, console, directory }
    }

    /// The next line that contains `what`.
    ///
    /// # Panics
    /// When it says nothing of it for three minutes.
    #[track_caller]
    pub fn wait_for(&mut self, what: &str) -> String {
        match self.says(what) {
            Ok(line) => line,
            Err(said) => panic!("the machine did not say {what:?}, but\n{said}"),
        }
    }

    /// The next line that contains `what`, or all that it has said instead in three
    /// minutes, or until its end.
    ///
    /// # Errors
    /// What it has said.
    pub fn says(&mut self, what: &str) -> Result<String, String> {
        let mut said = Vec::new();
        let began = Instant::now();
        loop {
            match self.console.recv_timeout(SILENCE.saturating_sub(began.elapsed())) {
                Ok(line) if line.contains(what) => return Ok(line),
                Ok(line) => said.push(line),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(said.join("\n"));
                }
            }
        }
    }

    /// The number of its process, whose children are its own too.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Passes over a line that it has said already; whether there was one.
    pub fn has_said(&mut self) -> bool {
        self.console.try_recv().is_ok()
    }

    /// It ends by itself.
    ///
    /// # Panics
    /// When it does not within three minutes.
    #[track_caller]
    pub fn wait_for_end(&mut self) {
        let began = Instant::now();
        while self.process.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < SILENCE, "the machine does not end");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // User-Mode Linux ends its own processes when it is told to, not when killed.
        let pid = rustix::process::Pid::from_child(&self.process);
        if matches!(self.process.try_wait(), Ok(None)) {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).ok();
            let began = Instant::now();
            while matches!(self.process.try_wait(), Ok(None)) {
                if began.elapsed() > Duration::from_secs(10) {
                    self.process.kill().ok();
                    self.process.wait().ok();
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        fs::remove_dir_all(&self.directory).ok();
    }
}

/// A directory that a machine with the host's files sees: not `/tmp`, where it mounts.
fn directory(what: &str) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = PathBuf::from(format!("/var/tmp/conet-t{}-{what}{count}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    path
}

fn on_path(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).map(|dir| dir.join(program)).find(|at| at.is_file());
    found.unwrap_or_else(|| panic!("no {program}"))
}

/// Libraries that a program is linked with, its loader included, as ldd(1) shows them.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let shown = Command::new("ldd").arg(program).output().unwrap().stdout;
    let shown = String::from_utf8(shown).unwrap();
    let paths = shown.split_whitespace().filter(|word| word.starts_with('/'));
    paths.map(PathBuf::from).collect()
}

/// The kernel of a directory that a package was unpacked in.
fn image(kernel: &Path) -> PathBuf {
    let mut boot = fs::read_dir(kernel.join("boot")).unwrap().map(|entry| entry.unwrap().path());
    boot.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("vmlinuz-")).unwrap()
}

/// Modules of an unpacked kernel package, by name.
struct Modules(Vec<PathBuf>);

impl Modules {
    fn of(kernel: &Path) -> Self {
        let mut files = Vec::new();
        let mut left = vec![kernel.join("lib/modules")];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let entry = entry.unwrap();
                match entry.file_type().unwrap().is_dir() {
                    true => left.push(entry.path()),
                    false => files.push(entry.path()),
                }
            }
        }
        Self(files)
    }

    /// Packs a module behind those that it depends on, and says how to load it. One that
    /// is not there is part of the kernel.
    fn load(
        &self,
        name: &str,
        done: &mut BTreeSet<String>,
        archive: &mut Archive,
        load: &mut String,
    ) {
        let name = name.replace('-', "_");
        if !done.insert(name.clone()) {
            return;
        }
        let is_it = |path: &&PathBuf| {
            let file = path.file_name().unwrap().to_str().unwrap().replace('-', "_");
            file.strip_prefix(&name).is_some_and(|rest| rest == ".ko" || rest == ".ko.xz")
        };
        let Some(path) = self.0.iter().find(is_it) else { return };
        let bytes = match path.extension().unwrap() == "xz" {
            true => Command::new("xz").arg("-dc").arg(path).output().unwrap().stdout,
            false => fs::read(path).unwrap(),
        };
        // A string of the section .modinfo.
        const DEPENDS: &[u8] = b"\0depends=";
        let at = bytes.windows(DEPENDS.len()).position(|window| window == DEPENDS).unwrap();
        let depends = &bytes[at + DEPENDS.len()..];
        let end = depends.iter().position(|byte| *byte == 0).unwrap();
        let depends = String::from_utf8(depends[..end].to_vec()).unwrap();
        for other in depends.split(',').filter(|other| !other.is_empty()) {
            self.load(other, done, archive, load);
        }
        archive.add(&format!("m/{name}.ko"), 0o100_644, &bytes);
        load.push_str(&format!("insmod /m/{name}.ko\n"));
    }
}

/// A cpio archive in the format `newc` (kernel `driver-api/early-userspace/buffer-format`).
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn add(&mut self, name: &str, mode: u32, bytes: &[u8]) {
        let inode = self.0.len();
        let (size, name_size) = (bytes.len(), name.len() + 1);
        // Magic, inode, mode, uid, gid, links, mtime, size, four device numbers, length
        // of the name, checksum.
        write!(
            self.0,
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}\
             {0:08x}{0:08x}{name_size:08x}{0:08x}{name}\0",
            0, 1
        )
        .unwrap();
        self.pad();
        self.0.extend_from_slice(bytes);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.0
    }
}

//! Virtual machines of Debian's kernels: User-Mode Linux and QEMU by TCG, each with an
//! initial file system that holds busybox, a network card's modules and one script.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What runs a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Uml,
    Qemu,
}

/// A machine that runs, and ends with its test.
pub(crate) struct Machine {
    child: Child,
    log: PathBuf,
    _directory: tempfile::TempDir,
}

impl Machine {
    /// Boots one whose card is behind the vhost-user socket, and which runs `script`.
    pub(crate) fn boot(kind: Kind, socket: &Path, script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let initrd = initrd(kind, directory.path(), script);
        let log = directory.path().join("console");
        let mut command = match kind {
            Kind::Uml => uml(socket, &initrd),
            Kind::Qemu => qemu(socket, &initrd),
        };
        let console = File::create(&log).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(console.try_clone().unwrap())
            .stderr(console)
            .env("TMPDIR", directory.path())
            .spawn()
            .unwrap();
        Self { child, log, _directory: directory }
    }

    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap()).into_owned()
    }

    /// Waits until the console shows `text`; the line on which it is.
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        let begin = Instant::now();
        loop {
            let console = self.console();
            if let Some(line) = console.lines().find(|line| line.contains(text)) {
                return line.to_owned();
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended: {ended:?}\n{console}");
            assert!(begin.elapsed() < Duration::from_secs(60), "no {text:?} on\n{console}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn uml(socket: &Path, initrd: &Path) -> Command {
    let mut command = Command::new("linux.uml");
    command.args(["mem=128M", "con=null", "con0=null,fd:1", "quiet", "panic=1", "noreboot"]);
    command.arg(format!("initrd={}", initrd.display()));
    command.arg(format!("virtio_uml.device={}:1", socket.display()));
    command
}

fn qemu(socket: &Path, initrd: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-m", "256", "-smp", "1", "-nodefaults"]);
    command.args(["-nographic", "-no-reboot", "-serial", "stdio"]);
    command.args(["-object", "memory-backend-memfd,id=m,size=256M,share=on"]);
    command.args(["-machine", "q35,memory-backend=m"]);
    command.arg("-chardev").arg(format!("socket,id=c,path={},reconnect=1", socket.display()));
    command.args(["-netdev", "vhost-user,id=n,chardev=c"]);
    command.args(["-device", "virtio-net-pci,netdev=n,vectors=0,mac=02:00:0a:4d:01:0a"]);
    command.arg("-kernel").arg(newest("/boot", "vmlinuz-"));
    command.arg("-initrd").arg(initrd);
    command.args(["-append", "console=ttyS0 quiet panic=1"]);
    command
}

/// The newest file or directory of a name.
fn newest(directory: &str, prefix: &str) -> PathBuf {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = entries
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix))
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| panic!("no {prefix}* in {directory}"))
}

/// What the card needs, in order; what is built in has no module.
const MODULES: [&str; 9] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "af_packet",
];

fn initrd(kind: Kind, directory: &Path, script: &str) -> PathBuf {
    let root = directory.join("root");
    for name in ["bin", "proc", "sys", "dev", "modules"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let modules = match kind {
        Kind::Uml => newest("/usr/lib/uml/modules", ""),
        Kind::Qemu => newest("/lib/modules", ""),
    };
    let mut loads = String::new();
    for name in MODULES {
        if unpack(&modules, name, &root.join(format!("modules/{name}.ko"))) {
            loads += &format!("insmod /modules/{name}.ko\n");
        }
    }
    let text = format!(
        "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
         {loads}{script}\necho the end of it\nsleep 100000\n"
    );
    let init = root.join("init");
    fs::write(&init, text).unwrap();
    ok(Command::new("chmod").arg("755").arg(&init));
    let image = directory.join("initrd");
    let mut pack = Command::new("sh");
    let pack = pack.args(["-c", "cd \"$1\" && find . | busybox cpio -o -H newc > \"$2\"", "sh"]);
    ok(pack.arg(&root).arg(&image).stderr(Stdio::null()));
    image
}

/// Puts a module where it is to be; whether there is one.
fn unpack(modules: &Path, name: &str, to: &Path) -> bool {
    let find = Command::new("find").arg(modules).args(["-name", &format!("{name}.ko*")]).output();
    let found = String::from_utf8(find.unwrap().stdout).unwrap();
    let Some(path) = found.lines().next() else { return false };
    if Path::new(path).extension().is_some_and(|extension| extension == "xz") {
        ok(Command::new("xz").args(["-dc", path]).stdout(File::create(to).unwrap()));
    } else {
        fs::copy(path, to).unwrap();
    }
    true
}

fn ok(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

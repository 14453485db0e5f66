//! The lanes that there are, and what each needs.

use std::path::PathBuf;
use std::process::Command;

/// What is between host and guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Netns,
    NetnsPair,
    Tap,
    UmlVhost,
    UmlBess,
    QemuVhost,
    QemuStream,
    Replica,
    Bridge,
    BridgePair,
    UmlTap,
    UmlRaw,
    UmlBound,
    Passt,
    PasstUml,
    Pasta,
    Slirp,
}

use Kind::{
    Bridge, BridgePair, Netns, NetnsPair, Passt, PasstUml, Pasta, QemuStream, QemuVhost, Replica,
    Slirp, Tap, UmlBess, UmlBound, UmlRaw, UmlTap, UmlVhost,
};

const UML: &str = "linux.uml";
const QEMU: &str = "qemu-system-x86_64";

impl Kind {
    pub(crate) const ALL: [Self; 17] = [
        Netns, NetnsPair, Tap, UmlVhost, UmlBess, QemuVhost, QemuStream, Replica, Bridge,
        BridgePair, UmlTap, UmlRaw, UmlBound, Passt, PasstUml, Pasta, Slirp,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Netns => "netns",
            NetnsPair => "netns-pair",
            Tap => "tap",
            UmlVhost => "uml-vhost",
            UmlBess => "uml-bess",
            QemuVhost => "qemu-vhost",
            QemuStream => "qemu-stream",
            Replica => "replica",
            Bridge => "bridge",
            BridgePair => "bridge-pair",
            UmlTap => "uml-tap",
            UmlRaw => "uml-raw",
            UmlBound => "uml-bound",
            Passt => "passt",
            PasstUml => "passt-uml",
            Pasta => "pasta",
            Slirp => "slirp4netns",
        }
    }

    pub(crate) const fn is_ours(self) -> bool {
        matches!(self, Netns | NetnsPair | Tap | UmlVhost | UmlBess | QemuVhost | QemuStream)
    }

    /// Whether its guest has an address that the host reaches.
    pub(crate) const fn has_address(self) -> bool {
        !matches!(self, Passt | PasstUml | Pasta | Slirp)
    }

    pub(crate) const fn is_uml(self) -> bool {
        matches!(self, UmlVhost | UmlBess | UmlTap | UmlRaw | UmlBound | PasstUml)
    }

    pub(crate) const fn is_qemu(self) -> bool {
        matches!(self, QemuVhost | QemuStream | Passt)
    }

    /// Programs that it cannot do without.
    fn programs(self) -> Vec<&'static str> {
        let mut programs = match self {
            Passt | PasstUml => vec!["passt"],
            Pasta => vec!["pasta"],
            Slirp => vec!["slirp4netns"],
            _ => vec![],
        };
        if self.is_uml() {
            programs.extend([UML, "busybox"]);
        }
        if self.is_qemu() {
            programs.extend([QEMU, "busybox"]);
        }
        programs
    }

    /// Why it cannot be measured here.
    pub(crate) fn missing(self) -> Option<String> {
        if let Some(program) = self.programs().into_iter().find(|name| program(name).is_none()) {
            return Some(format!("{program} is not installed"));
        }
        let kernel = conet_testkit::machine::KERNEL;
        (self.is_qemu() && std::env::var_os(kernel).is_none())
            .then(|| format!("no kernel for QEMU: {kernel} is not set, see cargo xtask peers"))
    }

    /// What its parts say of themselves.
    pub(crate) fn version(self) -> Option<String> {
        let of: Vec<_> = self
            .programs()
            .into_iter()
            .filter(|program| *program != "busybox")
            .map(|name| format!("{name} {}", version(name).unwrap_or_else(|| "unknown".into())))
            .collect();
        match self {
            UmlBound => Some(format!(
                "{}, served by this benchmark, see benches/hostinject/bound.rs",
                of.join(", ")
            )),
            _ if !of.is_empty() => Some(of.join(", ")),
            Replica => Some("of this benchmark, see benches/hostinject/replica.rs".to_owned()),
            _ => None,
        }
    }
}

fn program(name: &str) -> Option<PathBuf> {
    let places = std::env::var_os("PATH")?;
    std::env::split_paths(&places).map(|place| place.join(name)).find(|path| path.is_file())
}

/// Debian's packages know better than some programs of theirs.
fn version(name: &str) -> Option<String> {
    let package = match name {
        UML => "user-mode-linux",
        QEMU => "qemu-system-x86",
        "pasta" => "passt",
        other => other,
    };
    let output = Command::new("dpkg-query").args(["-W", "-f", "${Version}", package]).output();
    let text = String::from_utf8(output.ok().filter(|output| output.status.success())?.stdout);
    text.ok().filter(|text| !text.is_empty())
}

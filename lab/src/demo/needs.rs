//! What of the machine a step needs, asked of the machine's doctor.

use std::path::Path;

use conet_node::config::Mode;
use conet_node::doctor::{self, Trial};

/// The running program, which makes the trials.
const SELF: &str = "/proc/self/exe";

/// What a step needs.
#[derive(Debug, Clone, Copy)]
pub(super) enum Need {
    /// Nothing beside the lab.
    Nothing,
    /// A lab whose packets travel so.
    Lab(Mode),
    /// To move programs, and to host them.
    Moving,
    /// To move connections.
    Sockets,
}

impl Need {
    /// Why this machine cannot show what needs this, and the remedy; none where it can.
    pub(super) fn lacking(self) -> Option<String> {
        let trials: Vec<&Trial> =
            self.names().iter().filter_map(|name| Trial::named(name)).collect();
        doctor::lacks(Path::new(SELF), &trials)
    }

    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Nothing => &[],
            Self::Lab(Mode::WireGuard | Mode::IpUdp) => &["network-namespaces", "tun"],
            Self::Lab(Mode::IpIp) => &["network-namespaces", "tun", "raw-sockets"],
            Self::Moving => {
                &["kernel", "processor", "user-namespaces", "ptrace", "seccomp", "set-tid", "vdso"]
            }
            Self::Sockets => &["tcp-repair", "nf-tables"],
        }
    }
}

#[cfg(test)]
mod tests {
    use conet_node::doctor::{Need as Needed, TRIALS};

    use super::*;

    #[test]
    fn what_is_asked_for_is_what_the_doctor_tries() {
        for need in [Need::Lab(Mode::WireGuard), Need::Lab(Mode::IpIp), Need::Moving, Need::Sockets]
        {
            for name in need.names() {
                assert!(Trial::named(name).is_some(), "{name}");
            }
        }
        // What the doctor says no program moves without is asked for before one moves.
        for trial in TRIALS.iter().filter(|trial| trial.need == Needed::Moving) {
            assert!(Need::Moving.names().contains(&trial.name), "{}", trial.name);
        }
    }
}

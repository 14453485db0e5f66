//! What `/proc/PID` says of a process (man 5 proc).

use conet_deputy_core::areas::{Backing, parse_line};
use conet_wire::image::MemoryMap;
use rustix::process::Pid;
use std::fs;
use std::io;

/// One mapping, with its name owned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) prot: u32,
    pub(crate) is_shared: bool,
    pub(crate) backing: Backing,
    pub(crate) name: String,
}

fn malformed(file: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc/PID/{file} is not understood"))
}

pub(crate) fn path(pid: Pid, file: &str) -> String {
    format!("/proc/{}/{file}", pid.as_raw_nonzero())
}

/// Reads `/proc/PID/maps`, of a process that may run: the kernel gives it page by page,
/// and a mapping that has grown between two of them may overlap with the one before
/// (man 5 proc_pid_maps). Then it is read again.
pub(crate) fn maps(pid: Pid) -> io::Result<Vec<Mapping>> {
    const TRIES: u32 = 20;
    for _ in 0..TRIES {
        let mappings = maps_once(pid)?;
        if mappings.windows(2).all(|pair| pair[0].end <= pair[1].start) {
            return Ok(mappings);
        }
    }
    Err(malformed("maps"))
}

fn maps_once(pid: Pid) -> io::Result<Vec<Mapping>> {
    let text = fs::read(path(pid, "maps"))?;
    text.split(|&b| b == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            let line = parse_line(line).ok_or_else(|| malformed("maps"))?;
            Ok(Mapping {
                start: line.start,
                end: line.end,
                prot: line.prot,
                is_shared: line.shared,
                backing: line.backing,
                name: String::from_utf8_lossy(line.name).into_owned(),
            })
        })
        .collect()
}

/// Fields of `/proc/PID/status` and `/proc/PID/stat` that matter here.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    pub(crate) name: String,
    /// `R`, `S`, `D`, `T`, `t`, `Z`, …
    pub(crate) state: char,
    pub(crate) parent: i32,
    pub(crate) threads: u64,
    pub(crate) tracer: i32,
    /// Real, effective, saved and file system user.
    pub(crate) uids: [u32; 4],
    pub(crate) capabilities: u64,
    pub(crate) pending: u64,
    pub(crate) handled: u64,
    pub(crate) locked_kib: u64,
    /// It has memory: it has not ended, and is no kernel thread.
    pub(crate) has_memory: bool,
    pub(crate) seccomp: u64,
    pub(crate) shadow_stack: bool,
    /// Scheduling policy (man 7 sched).
    pub(crate) policy: u64,
    /// Clock ticks since boot at which it began.
    pub(crate) start_time: u64,
    pub(crate) memory_map: MemoryMap,
}

impl Facts {
    /// Whether it is in the midst of `execve`: its new memory has no stack yet.
    pub(crate) const fn is_becoming_another(&self) -> bool {
        self.has_memory && self.memory_map.start_stack == 0
    }
}

/// Reads both files.
pub(crate) fn facts(pid: Pid) -> io::Result<Facts> {
    let mut facts = Facts::default();
    let status = fs::read_to_string(path(pid, "status"))?;
    for line in status.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        let number = || value.split_whitespace().next().and_then(|v| v.parse().ok()).unwrap_or(0);
        let bits = || u64::from_str_radix(value, 16).unwrap_or(0);
        match key {
            "Threads" => facts.threads = number(),
            "TracerPid" => facts.tracer = value.parse().unwrap_or(0),
            "PPid" => facts.parent = value.parse().unwrap_or(0),
            "VmLck" => (facts.has_memory, facts.locked_kib) = (true, number()),
            "Seccomp" => facts.seccomp = number(),
            "SigPnd" | "ShdPnd" => facts.pending |= bits(),
            "SigCgt" => facts.handled = bits(),
            "CapEff" => facts.capabilities = bits(),
            "x86_Thread_features" => facts.shadow_stack = !value.is_empty(),
            "Uid" => {
                for (uid, text) in facts.uids.iter_mut().zip(value.split_whitespace()) {
                    *uid = text.parse().unwrap_or(0);
                }
            }
            _ => {}
        }
    }
    read_stat(pid, &mut facts)?;
    Ok(facts)
}

fn read_stat(pid: Pid, facts: &mut Facts) -> io::Result<()> {
    let stat = fs::read_to_string(path(pid, "stat"))?;
    let (front, rest) = stat.rsplit_once(')').ok_or_else(|| malformed("stat"))?;
    facts.name = front.split_once('(').map(|(_, name)| name.to_owned()).unwrap_or_default();
    // The first of these is field 3 of the manual page.
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let field = |number: usize| -> u64 {
        fields.get(number - 3).and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    facts.state = fields.first().and_then(|text| text.chars().next()).unwrap_or('?');
    facts.start_time = field(22);
    facts.policy = field(41);
    facts.memory_map = MemoryMap {
        start_code: field(26),
        end_code: field(27),
        start_stack: field(28),
        start_data: field(45),
        end_data: field(46),
        start_brk: field(47),
        brk: 0,
        arg_start: field(48),
        arg_end: field(49),
        env_start: field(50),
        env_end: field(51),
    };
    Ok(())
}

/// Soft limits of stack, data and address space, in bytes.
pub(crate) fn limits(pid: Pid) -> io::Result<[u64; 3]> {
    let text = fs::read_to_string(path(pid, "limits"))?;
    let soft = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|value| value.parse().ok())
            .unwrap_or(u64::MAX)
    };
    Ok([soft("Max stack size"), soft("Max data size"), soft("Max address space")])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_very_process_is_understood() {
        let me = rustix::process::getpid();
        let facts = facts(me).unwrap();
        assert!(facts.threads >= 1 && facts.start_time > 0);
        assert!(facts.memory_map.start_stack > 0 && facts.memory_map.start_code > 0);
        assert!(facts.has_memory && !facts.is_becoming_another());
        let maps = maps(me).unwrap();
        assert!(maps.iter().any(|m| m.backing == Backing::Vdso));
        assert!(limits(me).unwrap()[0] > 0);
    }
}

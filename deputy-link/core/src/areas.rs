//! Address spaces as lists of areas: reading `/proc/PID/maps`, comparing two.
//!
//! `no_std` and without allocation, because the agent reads its own map and the
//! deputy rebuilds one. Format: man 5 proc_pid_maps.

use conet_wire::image::{Area, area_flags};

/// What lies behind a line of `/proc/PID/maps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory, `[heap]` and `[anon:…]` included.
    Anonymous,
    /// The main thread's stack.
    Stack,
    /// The program's vDSO code.
    Vdso,
    /// Data of the vDSO (`[vvar]`, `[vvar_vclock]`), which cannot be copied.
    Vvar,
    /// The legacy page outside of the user range.
    Vsyscall,
    /// A file, or anything else with a name.
    File,
}

/// One line of `/proc/PID/maps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// `PROT_*` bits.
    pub prot: u32,
    /// `MAP_SHARED` as opposed to private.
    pub shared: bool,
    /// What lies behind it.
    pub backing: Backing,
    /// The last column, empty for anonymous memory.
    pub name: &'a [u8],
}

impl Line<'_> {
    /// As an area of an image.
    #[must_use]
    pub const fn area(&self) -> Area {
        let flags = match self.backing {
            Backing::Stack => area_flags::GROWS_DOWN,
            Backing::File => area_flags::FILE,
            Backing::Vvar => area_flags::HOLD,
            _ => 0,
        };
        Area { start: self.start, end: self.end, prot: self.prot, flags }
    }
}

/// Parses one line, without its newline; `None` if it is not of the format.
#[must_use]
pub fn parse_line(line: &[u8]) -> Option<Line<'_>> {
    let (range, rest) = field(line)?;
    let dash = range.iter().position(|&b| b == b'-')?;
    let (start, end) = (hex(&range[..dash])?, hex(&range[dash + 1..])?);
    let (perms, rest) = field(rest)?;
    let &[r, w, x, s] = perms else { return None };
    let (_offset, rest) = field(rest)?;
    let (_device, rest) = field(rest)?;
    let (inode, rest) = field(rest)?;
    let from = rest.iter().position(|&b| b != b' ').unwrap_or(rest.len());
    let name = &rest[from..];
    let prot = u32::from(r == b'r') | u32::from(w == b'w') << 1 | u32::from(x == b'x') << 2;
    let backing = match name {
        b"[stack]" => Backing::Stack,
        b"[vdso]" => Backing::Vdso,
        b"[vsyscall]" => Backing::Vsyscall,
        _ if name.starts_with(b"[vvar") => Backing::Vvar,
        _ if inode != b"0" => Backing::File,
        b"" | b"[heap]" => Backing::Anonymous,
        _ if name.starts_with(b"[anon") => Backing::Anonymous,
        _ => Backing::File,
    };
    Some(Line { start, end, prot, shared: s == b's', backing, name })
}

fn field(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = text.iter().position(|&b| b == b' ').unwrap_or(text.len());
    (end > 0).then(|| (&text[..end], text.get(end + 1..).unwrap_or(&[])))
}

fn hex(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || digits.len() > 16 {
        return None;
    }
    digits.iter().try_fold(0u64, |value, &digit| {
        let digit = char::from(digit).to_digit(16)?;
        Some(value << 4 | u64::from(digit))
    })
}

/// Parts of `range` that no area of the sorted `areas` covers, in order.
pub fn gaps(range: (u64, u64), areas: &[Area]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let (mut at, end) = range;
    let mut rest = areas.iter().skip_while(move |a| a.end <= at);
    core::iter::from_fn(move || {
        while at < end {
            match rest.next() {
                Some(area) if area.start < end => {
                    let gap = (at, area.start);
                    at = area.end.max(at);
                    if gap.0 < gap.1 {
                        return Some(gap);
                    }
                }
                _ => {
                    let gap = (at, end);
                    at = end;
                    return Some(gap);
                }
            }
        }
        None
    })
}

/// Takes `range` out of the first `count` of the sorted `areas`; how many there are then.
///
/// Where there is no room for an area that would be cut in two, it stays whole.
#[must_use]
pub fn remove(areas: &mut [Area], count: usize, range: (u64, u64)) -> usize {
    let (start, end) = range;
    if start >= end {
        return count;
    }
    let mut count = count.min(areas.len());
    let first = areas[..count].partition_point(|area| area.end <= start);
    if let Some(area) = areas[..count].get(first).copied()
        && area.start < start
        && area.end > end
    {
        if count < areas.len() {
            areas.copy_within(first..count, first + 1);
            areas[first].end = start;
            areas[first + 1].start = end;
            count += 1;
        }
        return count;
    }
    let after = first + areas[first..count].partition_point(|area| area.start < end);
    let mut kept = first;
    for i in first..after {
        let mut area = areas[i];
        if area.start < start {
            area.end = start;
        } else if area.end > end {
            area.start = end;
        } else {
            continue;
        }
        areas[kept] = area;
        kept += 1;
    }
    areas.copy_within(after..count, kept);
    count - (after - kept)
}

/// Whether `areas` are sorted, apart and each valid: what a peer sends must be.
#[must_use]
pub fn well_formed(areas: &[Area]) -> bool {
    areas.iter().all(Area::is_valid) && areas.windows(2).all(|w| w[0].end <= w[1].start)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn lines_of_a_real_map_parse() {
        let text =
            b"55d0c2a00000-55d0c2a21000 rw-p 00000000 00:00 0                          [heap]";
        let line = parse_line(text).unwrap();
        assert_eq!((line.start, line.end, line.prot), (0x55d0_c2a0_0000, 0x55d0_c2a2_1000, 3));
        assert_eq!((line.shared, line.backing), (false, Backing::Anonymous));
        let text = b"7f10c0000000-7f10c0021000 r--s 00001000 fe:00 1835 /usr/lib/gconv/my cache";
        let line = parse_line(text).unwrap();
        assert_eq!((line.shared, line.backing), (true, Backing::File));
        assert_eq!(line.name, b"/usr/lib/gconv/my cache");
        for (name, backing) in [
            ("[stack]", Backing::Stack),
            ("[vdso]", Backing::Vdso),
            ("[vvar]", Backing::Vvar),
            ("[vvar_vclock]", Backing::Vvar),
            ("[vsyscall]", Backing::Vsyscall),
            ("[anon:glibc: malloc]", Backing::Anonymous),
            ("", Backing::Anonymous),
        ] {
            let text = std::format!("1000-2000 ---p 00000000 00:00 0 {name}");
            assert_eq!(parse_line(text.as_bytes()).unwrap().backing, backing, "{name}");
        }
        let own = std::fs::read("/proc/self/maps").unwrap();
        for line in own.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
            assert!(parse_line(line).is_some());
        }
    }

    #[test]
    fn garbage_does_not_parse() {
        for text in ["", " ", "1000", "1000-", "-", "x-y rwxp 0 0 0", "1000-2000 rwx 0 0 0"] {
            assert_eq!(parse_line(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn what_is_removed_is_a_gap() {
        let area = |start, end| Area { start, end, prot: 3, flags: 0 };
        let have = [area(10, 20), area(30, 40), area(40, 50)];
        for start in 0..60 {
            for end in start..60 {
                for room in [3, 4] {
                    let mut list = [area(0, 0); 4];
                    list[..3].copy_from_slice(&have);
                    let count = remove(&mut list[..room], 3, (start, end));
                    let left = &list[..count];
                    assert!(left.windows(2).all(|w| w[0].end <= w[1].start));
                    let has = |list: &[Area], n| list.iter().any(|a| (a.start..a.end).contains(&n));
                    let is_cut = |a: &Area| a.start < start && end < a.end && start < end;
                    let is_stuck = room == 3 && have.iter().any(is_cut);
                    for n in 0..60 {
                        let wanted = has(&have, n) && (is_stuck || !(start..end).contains(&n));
                        assert_eq!(has(left, n), wanted, "{start}..{end} at {n}");
                    }
                }
            }
        }
    }

    #[test]
    fn gaps_are_what_is_not_covered() {
        let area = |start, end| Area { start, end, prot: 3, flags: 0 };
        let have = [area(10, 20), area(30, 40), area(40, 50)];
        let all = |range| gaps(range, &have).collect::<Vec<_>>();
        assert_eq!(all((0, 60)), [(0, 10), (20, 30), (50, 60)]);
        assert_eq!(all((12, 18)), []);
        assert_eq!(all((15, 35)), [(20, 30)]);
        assert_eq!(all((60, 70)), [(60, 70)]);
        assert_eq!(all((5, 10)), [(5, 10)]);
    }
}

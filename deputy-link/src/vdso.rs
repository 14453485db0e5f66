//! Entry points of a process's vDSO (vdso(7)).

use conet_wire::image::VdsoEntries;
use object::{Object, ObjectSymbol};

/// Finds the entry points in a vDSO's bytes, mapped at `base`.
pub(crate) fn entries(bytes: &[u8], base: u64) -> Option<VdsoEntries> {
    let elf = object::read::elf::ElfFile64::<object::Endianness>::parse(bytes).ok()?;
    let find = |name: &str| {
        elf.dynamic_symbols()
            .find(|symbol| symbol.name() == Ok(name))
            .map_or(0, |symbol| base + symbol.address())
    };
    Some(VdsoEntries {
        clock_gettime: find("__vdso_clock_gettime"),
        gettimeofday: find("__vdso_gettimeofday"),
        time: find("__vdso_time"),
        clock_getres: find("__vdso_clock_getres"),
        getcpu: find("__vdso_getcpu"),
        getrandom: find("__vdso_getrandom"),
    })
}

#[cfg(test)]
mod tests {
    use crate::procfs;
    use conet_deputy_core::areas::Backing;
    use std::os::unix::fs::FileExt;

    #[test]
    fn the_running_kernels_vdso_has_its_clocks() {
        let maps = procfs::maps(rustix::process::getpid()).unwrap();
        let vdso = maps.iter().find(|m| m.backing == Backing::Vdso).unwrap();
        let mut bytes = vec![0; usize::try_from(vdso.end - vdso.start).unwrap()];
        let memory = std::fs::File::open("/proc/self/mem").unwrap();
        memory.read_exact_at(&mut bytes, vdso.start).unwrap();
        let entries = super::entries(&bytes, vdso.start).unwrap();
        for at in [entries.clock_gettime, entries.gettimeofday, entries.time, entries.getcpu] {
            assert!((vdso.start..vdso.end).contains(&at), "{entries:x?}");
        }
    }
}

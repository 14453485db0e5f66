//! What a forwarded call is compared with. Each is processes of its own, as the call's
//! two halves are; none does less than its description says.
//!
//! | peer | who does what |
//! |---|---|
//! | `native` | the program makes the call |
//! | `tcp_nodelay` | one message each way over TCP_NODELAY, of as many bytes as the forwarded call has in plain; nothing is called |
//! | `tcp_nodelay_spin` | the same, both ends polling |
//! | `bound`, `bound_plain` | SIGSYS in the program, one message each way, the call made by the other process; with and without AES-128-GCM |
//! | `bound_spin`, `bound_plain_spin` | the same, both ends polling |
//! | `bound_filter` | the program at home under a seccomp filter that looks and lets through: the least a local call can cost |
//! | `bound_trap` | the program at home, its own SIGSYS handler making the call: the least a call can cost that is looked at |
//! | `bound_vdso` | the program at home, the C library's calls of the vDSO led to code that calls the vDSO and adds an offset: the least that home's clock can cost away |
//! | `bound_copy` | the program is stopped, its page map scanned, as many pages as ours sent meanwhile read, sealed, sent over TCP and opened into new memory: the least that it can stand still for |
//! | `ptrace_inject` | a tracer makes the call in another, stopped process; no program waits for it |
//! | `ptrace_forward` | the program stops by SECCOMP_RET_TRACE, its tracer sends the call over TCP, another tracer makes it in a stopped process |
//! | `seccomp_notify` | the program's call is made by its supervisor, with the program's buffers by `process_vm_*v` |

use conet_benches::report::Report;

pub(crate) mod bound;
pub(crate) mod conn;
pub(crate) mod copy;
pub(crate) mod inject;
pub(crate) mod notify;

/// The workspace's lock file, which says with what this was built.
const LOCKED: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.lock"));

/// The version of a crate that this is built with.
fn locked(name: &str) -> &'static str {
    let entry = format!("name = \"{name}\"\nversion = \"");
    let rest = LOCKED.split_once(&entry).map_or("", |(_, rest)| rest);
    rest.split_once('"').map_or("unknown", |(version, _)| version)
}

/// Says what the peers are, and of which versions. All but the AEAD are the kernel's, used
/// by this benchmark's own code.
pub(crate) fn name_versions(report: &mut Report) {
    let linux = format!("Linux {}", report.kernel());
    let sealed = format!("SIGSYS, TCP and AES-128-GCM of ring {}, {linux}", locked("ring"));
    for (peer, version) in [
        ("native", linux.clone()),
        ("tcp_nodelay", format!("TCP over loopback, {linux}")),
        ("tcp_nodelay_spin", format!("the same, polled, {linux}")),
        ("bound_plain", format!("SIGSYS and TCP, {linux}")),
        ("bound", sealed.clone()),
        ("bound_plain_spin", format!("SIGSYS and TCP, polled, {linux}")),
        ("bound_spin", format!("{sealed}, polled")),
        ("bound_filter", format!("seccomp filter, {linux}")),
        ("bound_trap", format!("SIGSYS, {linux}")),
        ("bound_vdso", format!("patched vDSO of {linux}")),
        (
            "bound_copy",
            format!(
                "PAGEMAP_SCAN, process_vm_readv, AES-128-GCM of ring {}, TCP, {linux}",
                locked("ring")
            ),
        ),
        ("ptrace_inject", format!("PTRACE_SINGLESTEP, no network, {linux}")),
        ("ptrace_forward", format!("two tracers and TCP, {linux}")),
        ("seccomp_notify", format!("SECCOMP_USER_NOTIF, no network, {linux}")),
    ] {
        report.version(peer, &version);
    }
}

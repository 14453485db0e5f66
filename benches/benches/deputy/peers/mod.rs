//! What a forwarded call is compared with. Each is processes of its own, as the call's
//! two halves are; none does less than its description says.
//!
//! | peer | who does what |
//! |---|---|
//! | `native` | the program makes the call |
//! | `tcp` | one message each way over TCP_NODELAY, of as many bytes as the forwarded call has in plain; nothing is called |
//! | `tcp_spin` | the same, both ends polling |
//! | `bound`, `bound_plain` | SIGSYS in the program, one message each way, the call made by the other process; with and without AES-128-GCM |
//! | `bound_spin` | as `bound`, both ends polling |
//! | `bound_filter` | the program at home under a seccomp filter that looks and lets through: the least a local call can cost |
//! | `bound_trap` | the program at home, its own SIGSYS handler making the call: the least a call can cost that is looked at |
//! | `ptrace_inject` | a tracer makes the call in another, stopped process; no program waits for it |
//! | `ptrace_forward` | the program stops by SECCOMP_RET_TRACE, its tracer sends the call over TCP, another tracer makes it in a stopped process |
//! | `seccomp_notify` | the program's call is made by its supervisor, with the program's buffers by `process_vm_*v` |

pub(crate) mod bound;
pub(crate) mod conn;
pub(crate) mod inject;
pub(crate) mod notify;

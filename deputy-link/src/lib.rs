//! Processes that move: remote, deputy, warden and the calls forwarded between them.

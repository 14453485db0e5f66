//! TCP sockets that move: saved state, save and restore.

//! WireGuard and IP-in-IP tunnels with longest-prefix routes between hosts.

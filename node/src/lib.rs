//! The node daemon: peers, guests, processes and their movement.

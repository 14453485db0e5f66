//! Packet buffers, ports and drop reasons shared by the tunnel and the guest ports.

//! Guest ports: how a guest's kernel receives and sends packets.

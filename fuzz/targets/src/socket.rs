//! Saved TCP sockets, as another host sends them.

use conet_migsock::SavedSocket;

/// Decodes the bytes; a state that is one encodes to the same bytes again.
///
/// # Panics
///
/// If it does not: a finding.
pub fn saved_socket(data: &[u8]) {
    if let Ok(state) = SavedSocket::decode(data) {
        assert_eq!(state.encode(), data, "one state has one form");
    }
}

//! Round trips of echo requests, which the far end's kernel answers.

use std::io::{self, Read as _};
use std::time::{Duration, Instant};

use conet_wire::ip::checksum;
use socket2::Socket;

/// Sends `count` echo requests on a raw ICMP socket that is connected, one after the
/// other, 64 bytes each with the IP header. Gives the round trips in microseconds;
/// requests without an answer within `patience` are left out.
///
/// # Errors
/// When the socket takes no time limit.
pub fn ping(socket: &Socket, count: u16, patience: Duration) -> io::Result<Vec<f64>> {
    socket.set_read_timeout(Some(patience))?;
    let identifier = (std::process::id() & 0xffff).to_be_bytes();
    let identifier = [identifier[2], identifier[3]];
    let mut times = Vec::new();
    for number in 0..count {
        let mut request = [0; 44];
        request[0] = 8;
        request[4..6].copy_from_slice(&identifier);
        request[6..8].copy_from_slice(&number.to_be_bytes());
        let sum = checksum(&request, 0);
        request[2..4].copy_from_slice(&sum.to_be_bytes());
        let began = Instant::now();
        if socket.send(&request).is_err() {
            continue;
        }
        let mut reply = [0; 256];
        let mut socket = socket;
        while let Ok(len) = socket.read(&mut reply) {
            if len < 28 {
                continue;
            }
            // Behind the IP header: an echo reply, ours, this one.
            let is_it = reply[20] == 0
                && reply[24..26] == identifier
                && reply[26..28] == number.to_be_bytes();
            if is_it {
                times.push(began.elapsed().as_secs_f64() * 1e6);
                break;
            }
            if began.elapsed() > patience {
                break;
            }
        }
    }
    Ok(times)
}

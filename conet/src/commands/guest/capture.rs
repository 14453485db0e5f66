//! `conet guest capture`: a guest's frames as pcapng.
//!
//! The file is whole whenever it ends, also by Ctrl-C or a pipe that is closed; what was
//! missed is in the statistics at its end. Numbers are big-endian, since the crate writes
//! 64-bit times so that they are right in that order alone.
//!
//! Sources: draft-ietf-opsawg-pcapng §4.1 to §4.3, §4.6.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use conet_hostinject::capture::{Capture, Frame};
use conet_node::client::{Client, ClientError};
use conet_node::enter;
use conet_wire::control::{Request, Response};
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::interface_statistics::{
    InterfaceStatisticsBlock, InterfaceStatisticsOption,
};
use pcap_file::{DataLink, Endianness, PcapError};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// How long what was written may wait, and how soon a signal is heard.
const TICK: Duration = Duration::from_millis(100);
/// Nanoseconds: 10 to the power of -9.
const NANOSECONDS: u8 = 9;

/// When a capture ends by itself.
pub(super) struct Ends {
    pub(super) seconds: Option<u32>,
    pub(super) packets: Option<u64>,
}

pub(super) fn run(
    client: &mut Client,
    name: &str,
    file: Option<PathBuf>,
    ends: &Ends,
) -> Result<()> {
    if file.is_none() && io::stdout().is_terminal() {
        anyhow::bail!("a terminal shows no pcapng; give -w FILE, or pipe it into tcpdump -r -");
    }
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&ended))?;
    }
    let capture = open(client, name)?;
    let out: Box<dyn Write> = match &file {
        Some(path) => {
            let made = File::create(path);
            Box::new(made.with_context(|| format!("cannot write {}", path.display()))?)
        }
        None => Box::new(io::stdout()),
    };
    let (taken, missed) = match write(&capture, name, out, ends, &ended) {
        // Whoever read it has read enough.
        Err(PcapError::IoError(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            return Ok(());
        }
        other => other?,
    };
    eprintln!("{taken} packets of {name}, {missed} missed");
    Ok(())
}

/// Begins to watch; a namespace by its link, a machine by its port.
fn open(client: &mut Client, name: &str) -> Result<Capture> {
    let Response::Guests { guests } = client.ask(&Request::Guests {})? else {
        return Err(ClientError::Unexpected.into());
    };
    let guest = guests.into_iter().find(|guest| guest.name == name);
    let (machine, line) = guest.map_or((None, None), |guest| (guest.machine, guest.line));
    let capture = match machine {
        Some(machine) => Capture::of_machine(machine.socket.as_ref()),
        None => {
            enter::enter(client, name)?;
            // One in place of coLinux has the card of its line.
            let card = line.as_deref().and_then(|line| line.split_once('='));
            Capture::of_link(card.map_or("eth0", |(card, _)| card))
        }
    };
    capture.with_context(|| format!("cannot watch {name}; root can, see conet guest list"))
}

/// Writes until the end; how many packets, and how many were missed.
fn write(
    capture: &Capture,
    name: &str,
    out: impl Write,
    ends: &Ends,
    ended: &AtomicBool,
) -> Result<(u64, u64), PcapError> {
    let out = BufWriter::new(out);
    let mut file = PcapNgWriter::with_endianness(out, Endianness::Big)?;
    file.write_pcapng_block(InterfaceDescriptionBlock {
        linktype: DataLink::ETHERNET,
        snaplen: 0,
        options: vec![
            InterfaceDescriptionOption::IfName(Cow::Borrowed(name)),
            InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
        ],
    })?;
    // Whoever reads it knows that it has begun.
    file.get_mut().flush().map_err(PcapError::IoError)?;
    let begin = Instant::now();
    let mut taken = 0;
    let is_over = |taken: u64| {
        let is_late =
            ends.seconds.is_some_and(|most| begin.elapsed() >= Duration::from_secs(most.into()));
        is_late || ends.packets.is_some_and(|most| taken >= most) || ended.load(Ordering::Relaxed)
    };
    while !is_over(taken) {
        match capture.next(TICK) {
            Ok(Some(Frame { time, bytes })) => {
                taken += 1;
                file.write_pcapng_block(EnhancedPacketBlock {
                    interface_id: 0,
                    timestamp: time,
                    original_len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
                    data: Cow::Owned(bytes),
                    options: Vec::new(),
                })?;
            }
            Ok(None) => file.get_mut().flush().map_err(PcapError::IoError)?,
            Err(error) => {
                eprintln!("the capture of {name} ends here: {error}");
                break;
            }
        }
    }
    let missed = capture.missed();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    file.write_pcapng_block(InterfaceStatisticsBlock {
        interface_id: 0,
        timestamp: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        options: vec![
            InterfaceStatisticsOption::IsbIfRecv(taken + missed),
            InterfaceStatisticsOption::IsbIfDrop(missed),
        ],
    })?;
    file.get_mut().flush().map_err(PcapError::IoError)?;
    Ok((taken, missed))
}

//! The host's end of a port: a TUN device, with a queue for each pair of the guest's.
//!
//! The kernel spreads flows over the queues that are attached, and a flow over none but one:
//! that by which its packets came from the guest, where there were any. A queue whose pair
//! is not in use is detached, so that nothing waits there for nobody.
//!
//! Invariant: the first queue is always attached.
//!
//! Sources: Linux `Documentation/networking/tuntap.rst`, `drivers/net/tun.c`.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use conet_netsys::IfName;

use super::sys;

/// Most pairs of queues of a guest.
pub const MAX_QUEUES: u16 = 16;

/// The host's end of a port, by which its guest is served.
#[derive(Debug, Clone)]
pub struct Device(Vec<Arc<File>>);

/// Makes the host's end of a port, down, in the namespace of the calling thread, for so many
/// pairs of queues: 1 to [`MAX_QUEUES`]. It is there as long as somebody has it open.
///
/// # Errors
/// As the kernel refuses (`/dev/net/tun`); EINVAL for another number.
pub fn open_device(name: IfName, queues: u16) -> io::Result<Device> {
    if !(1..=MAX_QUEUES).contains(&queues) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let first = tun_rs::DeviceBuilder::new()
        .name(name.as_str())
        .enable(false)
        .with(|options| {
            // A device for one has one: the kernel makes 256 of the others.
            options.offload(true).multi_queue(queues > 1);
        })
        .build_sync()?;
    let mut all = vec![];
    for _ in 1..queues {
        all.push(first.try_clone()?);
    }
    all.insert(0, first);
    for queue in &all {
        queue.set_nonblocking(true)?;
    }
    let device = Device::of(all.into_iter().map(sys::into_fd));
    // Until a guest has said what it takes.
    device.set_offload(0)?;
    device.rest();
    Ok(device)
}

impl Device {
    /// Of the descriptors of its queues.
    pub(super) fn of(queues: impl IntoIterator<Item = OwnedFd>) -> Self {
        Self(queues.into_iter().map(|queue| Arc::new(File::from(queue))).collect())
    }

    /// Each queue.
    pub(super) fn queues(&self) -> &[Arc<File>] {
        &self.0
    }

    /// The one that is always attached.
    pub(super) fn first(&self) -> &Arc<File> {
        // There is at least one: `open_device`, and whoever gets descriptors from it.
        &self.0[0]
    }

    /// What the guest takes in large pieces and without checksums: `TUN_F_…`.
    pub(super) fn set_offload(&self, flags: u32) -> io::Result<()> {
        sys::set_offload(&**self.first(), flags)
    }

    /// Whether a queue is given packets; the first always is.
    pub(super) fn set_attached(&self, queue: usize, is_attached: bool) {
        if let Some(file) = self.0.get(queue).filter(|_| queue > 0) {
            // Refused where it is so already.
            sys::set_attached(&**file, is_attached).ok();
        }
    }

    /// Detaches all queues but the first: nobody is there who would read them.
    pub(super) fn rest(&self) {
        (1..self.0.len()).for_each(|queue| self.set_attached(queue, false));
    }
}

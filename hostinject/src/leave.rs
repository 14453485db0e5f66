//! The end of a link, without the kernel's wait for its last users.
//!
//! Who deletes a link, or closes the last descriptor of a TUN device, waits until nobody in
//! the kernel can hold it any more: a barrier of RCU, 20 to 80 ms with lazy callbacks
//! (Linux `net/core/dev.c`, `netdev_run_todo`). By then the link has left its namespace long
//! since, its routes and rules with it, and its name is free. So that wait is left to a
//! thread; if the process ends before, the kernel comes to the end of it all the same.

use std::sync::mpsc::{RecvTimeoutError, SendError, channel};
use std::thread;
use std::time::Duration;

use conet_netsys::{IfName, Link, NetError, Netlink};

/// Between two looks whether the link is gone; taking it out takes the kernel 0.2 to 5 ms.
const LOOK: Duration = Duration::from_micros(200);

/// Deletes a link of the namespace that `host` is of; whether there was one.
///
/// # Errors
/// As the kernel refuses.
pub(crate) fn delete(link: IfName, mut host: Netlink) -> Result<bool, NetError> {
    let Some(found) = host.link(link)? else { return Ok(false) };
    until_gone(&found.clone(), move || host.delete_this_link(&found).map(|_| ()))?;
    Ok(true)
}

/// Drops what holds a link, which ends with it.
///
/// # Errors
/// As the kernel refuses to look.
pub(crate) fn drop_holder<H>(link: IfName, host: &mut Netlink, holder: H) -> Result<(), NetError>
where
    H: Send + 'static,
{
    // Where it is gone already, the holder ends here.
    let Some(found) = host.link(link)? else { return Ok(()) };
    until_gone(&found, move || {
        drop(holder);
        Ok(())
    })
}

/// Does `work`, which ends a link, and returns as soon as that is gone; where it is of another
/// namespace than the calling thread, when all is done.
///
/// The work must not go by the link's name: that may be another's by the end of it.
fn until_gone<W>(link: &Link, work: W) -> Result<(), NetError>
where
    W: FnOnce() -> Result<(), NetError> + Send + 'static,
{
    let mut netlink = Netlink::open()?;
    let mut is_there =
        || Ok(netlink.link(link.name)?.is_some_and(|found| found.index == link.index));
    if !is_there()? {
        return work();
    }
    let ((give, given), (send, done)) = (channel::<W>(), channel());
    let worker = move || given.recv().ok().and_then(|work| send.send(work()).ok());
    if thread::Builder::new().name("conet-leave".to_owned()).spawn(worker).is_err() {
        // Threads have run out: then the wait is ours.
        return work();
    }
    if let Err(SendError(work)) = give.send(work) {
        return work();
    }
    loop {
        match done.recv_timeout(LOOK) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) if is_there()? => {}
            // Gone; or the thread is, by a panic that was said already.
            Err(_) => return Ok(()),
        }
    }
}

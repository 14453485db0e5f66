//! Network namespaces: made, named, entered, listed, deleted.
//!
//! A named namespace is a file in `/run/netns` on which the namespace is
//! mounted, exactly as `ip netns add` leaves it, so `ip netns list` and `ip netns
//! exec` see those made here and the other way round. The directory is a shared
//! mount point, so the names reach other mount namespaces that share it.
//!
//! ```text
//! create ── file (O_EXCL) ── thread: unshare, bind /proc/thread-self/ns/net ── open
//! delete ── lazy unmount ── unlink; the namespace itself ends with its last user
//! ```
//!
//! Invariant: no function leaves the calling thread in another namespace than
//! it was in, save through a live [`Entered`].
//!
//! Sources: `network_namespaces(7)`, `setns(2)`, iproute2 `ip/ipnetns.c`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::{panic, thread};

use rustix::fs::{FlockOperation, flock, fstat, fstatfs};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive, mount_change, unmount,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{NetError, NetnsName, Object, Op, sys};

/// Where named namespaces live (iproute2's `NETNS_RUN_DIR`).
pub const NETNS_DIR: &str = "/run/netns";

/// File system type of namespace files (`linux/magic.h`, NSFS_MAGIC).
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// An open network namespace. It lives at least as long as this value.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
}

/// What tells two namespaces apart: device and inode of their nsfs file
/// (`namespaces(7)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetnsId {
    /// Device number of nsfs.
    pub device: u64,
    /// Inode number of the namespace.
    pub inode: u64,
}

impl Netns {
    /// Creates a namespace and names it, as `ip netns add NAME`. Its loopback
    /// link is down.
    ///
    /// # Errors
    /// EEXIST when the name is taken, EPERM without CAP_SYS_ADMIN.
    pub fn create(name: &NetnsName) -> Result<Self, NetError> {
        let fail =
            |e: io::Error| NetError::refused(Op::CreateNetns, Object::Netns(name.clone()), e);
        share_directory().map_err(fail)?;
        let path = path_of(name);
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(&path)
            .map_err(fail)?;
        // A fresh thread leaves its namespace so that the caller need not.
        let made = on_thread(Op::CreateNetns, || {
            sys::unshare_net()?;
            mount_bind("/proc/thread-self/ns/net", &path)
        });
        match made.and_then(|mounted| mounted.map_err(|e| fail(e.into()))) {
            Ok(()) => Self::open(name),
            Err(error) => {
                // The first failure is the one to report; the file is ours.
                drop(fs::remove_file(&path));
                Err(error)
            }
        }
    }

    /// Opens a named namespace.
    ///
    /// # Errors
    /// ENOENT when there is none, [`NetError::NotANamespace`] when the name is a
    /// rest without a namespace.
    pub fn open(name: &NetnsName) -> Result<Self, NetError> {
        let fail = |e: io::Error| NetError::refused(Op::OpenNetns, Object::Netns(name.clone()), e);
        let file = File::open(path_of(name)).map_err(fail)?;
        if !is_nsfs(&file) {
            return Err(NetError::NotANamespace { op: Op::OpenNetns, name: name.clone() });
        }
        Ok(Self { fd: file.into() })
    }

    /// Opens a namespace by the path of its file.
    ///
    /// # Errors
    /// As `open(2)`; EINVAL when the file is no namespace.
    pub fn open_path(path: &Path) -> Result<Self, NetError> {
        let fail = |e: io::Error| NetError::refused(Op::OpenNetns, Object::Path(path.into()), e);
        let file = File::open(path).map_err(fail)?;
        if !is_nsfs(&file) {
            return Err(fail(Errno::INVAL.into()));
        }
        Ok(Self { fd: file.into() })
    }

    /// Opens the namespace of a process.
    ///
    /// # Errors
    /// ENOENT when the process is gone, EACCES without the right to trace it.
    pub fn of_process(pid: u32) -> Result<Self, NetError> {
        let file = File::open(format!("/proc/{pid}/ns/net"))
            .map_err(|e| NetError::refused(Op::OpenNetns, Object::Process(pid), e))?;
        Ok(Self { fd: file.into() })
    }

    /// Opens the namespace of the calling thread.
    ///
    /// # Errors
    /// As `open(2)` on `/proc/thread-self/ns/net`.
    pub fn current() -> Result<Self, NetError> {
        Self::open_path(Path::new("/proc/thread-self/ns/net"))
    }

    /// Removes a name, as `ip netns delete`; says whether it was there. What
    /// still runs inside keeps the nameless namespace until it ends.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN.
    pub fn delete(name: &NetnsName) -> Result<bool, NetError> {
        let fail =
            |e: io::Error| NetError::refused(Op::DeleteNetns, Object::Netns(name.clone()), e);
        let path = path_of(name);
        match unmount(&path, UnmountFlags::DETACH) {
            // EINVAL: nothing is mounted there, a rest of a crash.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(Errno::NOENT) => return Ok(false),
            Err(e) => return Err(fail(e.into())),
        }
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(fail(e)),
        }
    }

    /// Whether a namespace of that name is there and alive.
    pub fn exists(name: &NetnsName) -> bool {
        Self::open(name).is_ok()
    }

    /// The names in `/run/netns`, sorted; also those without a living namespace,
    /// so that they can be deleted.
    ///
    /// # Errors
    /// As `readdir(3)`; an absent directory is an empty list.
    pub fn list() -> Result<Vec<NetnsName>, NetError> {
        let fail = |e: io::Error| NetError::refused(Op::ListNetns, Object::None, e);
        let entries = match fs::read_dir(NETNS_DIR) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(fail)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let file = entry.map_err(fail)?.file_name();
            // A name that we could not have made is not ours to touch.
            if let Some(name) = file.to_str().and_then(|n| NetnsName::new(n).ok()) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// What tells this namespace from others.
    ///
    /// # Errors
    /// As `fstat(2)`.
    pub fn id(&self) -> Result<NetnsId, NetError> {
        let stat =
            fstat(&self.fd).map_err(|e| NetError::refused(Op::OpenNetns, Object::None, e))?;
        Ok(NetnsId { device: stat.st_dev, inode: stat.st_ino })
    }

    /// Moves the calling thread into this namespace until the guard drops.
    ///
    /// Sockets opened meanwhile stay in it; other threads are not concerned.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN.
    pub fn enter(&self) -> Result<Entered, NetError> {
        let before = Self::current()?;
        self.enter_for_good()?;
        Ok(Entered { before, thread: PhantomData })
    }

    /// Runs `work` on a fresh thread inside this namespace and gives its value
    /// back. A panic of `work` continues in the caller.
    ///
    /// # Errors
    /// When the thread cannot be started or may not enter.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        on_thread(Op::StartThread, || self.enter_for_good().map(|()| work()))?
    }

    /// Moves the calling thread into this namespace and leaves it there: for a
    /// thread that spends its whole life inside.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN.
    pub fn enter_for_good(&self) -> Result<(), NetError> {
        move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|e| NetError::refused(Op::EnterNetns, Object::None, e))
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The calling thread is inside a namespace; dropping this brings it back.
#[derive(Debug)]
pub struct Entered {
    before: Netns,
    // A namespace belongs to a thread: this guard must drop on its own.
    thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // Whatever runs next on this thread would act on a foreign network. It
        // can fail only when the thread gave up CAP_SYS_ADMIN while inside.
        if let Err(error) = self.before.enter_for_good()
            && !thread::panicking()
        {
            panic!("cannot return to the former network namespace: {error}");
        }
    }
}

fn path_of(name: &NetnsName) -> PathBuf {
    Path::new(NETNS_DIR).join(name.as_str())
}

fn is_nsfs(file: &File) -> bool {
    // The type of f_type differs between architectures; its value does not.
    fstatfs(file).is_ok_and(|s| u64::try_from(s.f_type).is_ok_and(|t| t == NSFS_MAGIC))
}

fn on_thread<T: Send>(op: Op, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
    thread::scope(|scope| {
        let handle = thread::Builder::new()
            .name("conet-netns".into())
            .spawn_scoped(scope, work)
            .map_err(|e| NetError::refused(op, Object::None, e))?;
        Ok(handle.join().unwrap_or_else(|payload| panic::resume_unwind(payload)))
    })
}

/// Makes `/run/netns` a shared mount point of its own, under a lock, so that
/// names made in one mount namespace appear in those that share it.
fn share_directory() -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(NETNS_DIR)?;
    let lock = File::open(NETNS_DIR)?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let share =
        || mount_change(NETNS_DIR, MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    match share() {
        // Not yet a mount point: make it one by binding it onto itself.
        Err(Errno::INVAL) => {
            mount_bind_recursive(NETNS_DIR, NETNS_DIR)?;
            Ok(share()?)
        }
        other => Ok(other?),
    }
}

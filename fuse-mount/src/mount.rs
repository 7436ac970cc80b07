//! From a device's name to a served mount point, and back.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;

use blockdev::BlockDevice;
use blockdev::open::{NameError, User, has_sectors_of_its_own, open};
use cluster::HintNet;
use cluster::udp::UdpHints;
use fs_core::{MountConfig, MountError, Volume, read_superblock, refuse_unclean};
use fuse_session::{MountSpec, Session, UnmountMode};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use crate::convert::HostClock;
use crate::counters::Counters;
use crate::handler::Server;
use crate::kernel_cache::{KernelView, KnownInodes};
use crate::membership::Membership;
use crate::options::{Hints, Options};
use crate::report::Reporter;
use crate::wake::Waker;

/// The process's name once the mount is gone and the node leaves the volume: `ps` shows it, and who unmounts waits for it.
pub const LEAVING: &str = "clusterfs-leave";
/// Threads that read requests. They only hand them on.
const READERS: usize = 2;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Open(#[from] NameError),
    #[error(transparent)]
    Volume(#[from] MountError),
    #[error(transparent)]
    Cluster(#[from] cluster::ClusterError),
    #[error(transparent)]
    Mount(#[from] fuse_session::MountError),
    #[error(transparent)]
    Run(#[from] fuse_session::RunError),
    #[error("{0}")]
    System(#[from] std::io::Error),
    #[error("leaving the volume: {0}: its journal will be replayed by another node or the next mount")]
    Leave(fs_core::FsError),
}

/// Mounts and serves until the mount point is gone. `ready` is called once the mount is usable.
pub fn serve(device: &str, dir: &Path, options: &Options, ready: impl FnOnce()) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let dir = std::fs::canonicalize(dir)
        .map_err(|source| std::io::Error::new(source.kind(), format!("{}: {source}", dir.display())))?;
    let known = Arc::new(KnownInodes::default());
    let volume = runtime.block_on(async {
        if options.read_only {
            refuse_unclean(open_device(device, options).await?.as_ref()).await?;
        }
        open_volume(device, options, known.clone()).await
    })?;
    let mut spec = MountSpec::new(device, "clusterfs", &dir);
    // The kernel need not doubt access times: the volume keeps them.
    spec.flags = options.flags | libc::MS_NOATIME;
    let session = match Session::mount(&spec) {
        Ok(session) => Arc::new(session),
        Err(e) => {
            // Nothing was changed; leaving frees the slot for others.
            let _ = runtime.block_on(volume.unmount());
            return Err(e.into());
        }
    };
    known.mounted(session.notifier());
    let begun = Arc::new(Notify::new());
    let counters = Arc::new(Counters::default());
    let (ready_to, on) = (begun.clone(), runtime.handle().clone());
    let membership = Membership::new(volume, known.clone());
    let server = Server {
        membership: membership.clone(),
        known: known.clone(),
        counters: counters.clone(),
        reporter: Arc::new(Reporter::new(device, counters.clone())),
        runtime: on,
        io_uring: options.io_uring,
        dirsync: options.flags & (libc::MS_DIRSYNC | libc::MS_SYNCHRONOUS) != 0,
        ready: ready_to,
    };
    let serving = {
        let session = session.clone();
        std::thread::Builder::new().name("fuse".into()).spawn(move || session.run(Arc::new(server), READERS))?
    };
    runtime.spawn(unmount_on_signal(session.clone()));
    runtime.spawn(tell_on_signal(counters, membership.clone()));
    let keeping = {
        let (device, options, known) = (device.to_string(), options.clone(), known.clone());
        runtime.spawn(membership.clone().keep(move || {
            let (device, options, known) = (device.clone(), options.clone(), known.clone());
            async move { open_volume(&device, &options, known).await }
        }))
    };
    runtime.block_on(begun.notified());
    // Without it the mount works, but those who wait for changes have to look by themselves.
    let waker =
        Waker::start(known, &dir).inspect_err(|e| tracing::warn!("inotify tells of no other node's changes: {e}"));
    ready();
    let served = serving.join().map_err(|_| std::io::Error::other("the thread that serves the kernel panicked"))?;
    if let Err(e) = std::fs::write("/proc/self/comm", LEAVING) {
        tracing::debug!("nobody will see that this node leaves: {e}");
    }
    keeping.abort();
    drop(waker);
    let left = runtime.block_on(async {
        let lapsed = fs_core::FsError::Cluster(cluster::ClusterError::Lapsed);
        match membership.volume() {
            Some(volume) => volume.unmount().await,
            None => Err(lapsed),
        }
    });
    served?;
    left.map_err(Error::Leave)
}

async fn open_volume(device: &str, options: &Options, known: Arc<KnownInodes>) -> Result<Arc<Volume>, Error> {
    let dev = open_device(device, options).await?;
    let cfg = MountConfig {
        device: dev,
        net: hint_net(device, options.hints).await,
        clock: Arc::new(HostClock),
        kernel: Arc::new(KernelView(known)),
        host_name: options.host.clone().unwrap_or_else(host_name),
        seed: random_seed()?,
        read_only: options.read_only,
        atime: options.atime,
        cache_bytes: options.cache_bytes,
        dirty_bytes: options.dirty_bytes,
    };
    let volume = Volume::mount(cfg).await?;
    if options.discard {
        volume.discard_freed_blocks();
    }
    Ok(volume)
}

async fn open_device(device: &str, options: &Options) -> Result<Arc<dyn BlockDevice>, Error> {
    let name = Path::new(device);
    let dev = open(name, User::Node, None, &options.iscsi).await?;
    match read_superblock(dev.as_ref()).await {
        // The image was moved to a filesystem that wants larger sectors: go through its page cache.
        Err(MountError::SectorSize { volume, .. }) if !has_sectors_of_its_own(dev.as_ref()) => {
            drop(dev);
            Ok(open(name, User::Node, Some(volume), &options.iscsi).await?)
        }
        superblock => superblock.map(|_| dev).map_err(Error::from),
    }
}

async fn hint_net(device: &str, hints: Hints) -> Option<Arc<dyn HintNet>> {
    let at = match hints {
        Hints::Off => return None,
        Hints::At(at) => at,
        Hints::Auto => {
            let file = std::fs::metadata(device).is_ok_and(|m| m.is_file());
            let ip = if file { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { primary_address()? };
            SocketAddr::new(ip, 0)
        }
    };
    match UdpHints::bind(at, at.ip()).await {
        Ok(net) => Some(Arc::new(net)),
        Err(e) => {
            tracing::warn!("no hints ({at}: {e}): handovers go through the device only");
            None
        }
    }
}

/// The address this host uses towards others. Connecting a datagram socket sends nothing.
fn primary_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    socket.local_addr().ok().map(|a| a.ip()).filter(|ip| !ip.is_unspecified())
}

fn host_name() -> String {
    let mut buf = [0u8; 65];
    // SAFETY: the buffer is as long as said; the last byte stays zero.
    let ok = unsafe { libc::gethostname(buf.as_mut_ptr().cast(), buf.len() - 1) } == 0;
    let end = buf.iter().position(|b| *b == 0).unwrap_or(0);
    if ok { String::from_utf8_lossy(&buf[..end]).into_owned() } else { "unknown".into() }
}

fn random_seed() -> std::io::Result<u64> {
    let mut seed = [0u8; 8];
    // SAFETY: the buffer is as long as said.
    let n = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
    if n == seed.len() as isize { Ok(u64::from_ne_bytes(seed)) } else { Err(std::io::Error::last_os_error()) }
}

/// SIGUSR1 asks for the counters, and for what is going on with which lock. Asked for, they come whatever the log's level is by default.
async fn tell_on_signal(counters: Arc<Counters>, membership: Arc<Membership>) {
    let Ok(mut asked) = signal(SignalKind::user_defined1()) else { return };
    while asked.recv().await.is_some() {
        tracing::warn!("requests of the kernel so far: {counters}");
        let busy = membership.volume().map(|v| v.busy_locks());
        busy.into_iter().flatten().for_each(|lock| tracing::warn!("{lock}"));
    }
}

/// SIGTERM and SIGINT unmount; a busy mount point is taken out of the tree and served until its last user is gone.
async fn unmount_on_signal(session: Arc<Session>) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    let unmount = move || match session.unmount(UnmountMode::Plain) {
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            tracing::warn!("the mount point is in use: it is detached, and served until its users are done");
            session.unmount(UnmountMode::Detach)
        }
        r => r,
    };
    if let Ok(Err(e)) = tokio::task::spawn_blocking(unmount).await {
        tracing::error!("cannot unmount: {e}");
    }
}

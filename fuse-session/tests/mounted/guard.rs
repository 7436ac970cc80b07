//! A mount for one test, which neither outlives the test nor hangs it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use fuse_session::{MountSpec, Notifier, RunError, Session, UnmountMode};
use tempfile::TempDir;

use crate::enable::Enabled;
use crate::memfs::MemFs;

/// Longer than any test takes; then the connection is aborted, and what hangs in the kernel fails.
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Mounted {
    dir: TempDir,
    pub session: Arc<Session>,
    pub fs: Arc<MemFs>,
    server: Option<JoinHandle<Result<(), RunError>>>,
    watchdog: Option<(Sender<()>, JoinHandle<()>)>,
    /// Last: as long as the mount.
    _enabled: Option<Enabled>,
}

impl Mounted {
    pub fn new() -> Mounted {
        Mounted::with_flags(libc::MS_NOSUID | libc::MS_NODEV)
    }

    pub fn with_flags(flags: u64) -> Mounted {
        Mounted::with_switch(flags, crate::URING.then(Enabled::new))
    }

    /// `enabled` is kept as long as the mount.
    pub fn with_switch(flags: u64, enabled: Option<Enabled>) -> Mounted {
        let dir = tempfile::tempdir().unwrap();
        let spec = MountSpec { flags, ..MountSpec::new("/dev/test-lun", "clusterfs", dir.path()) };
        let session = Session::mount(&spec).expect("these tests need root and /dev/fuse");
        let session = Arc::new(session);
        let fs = MemFs::new();
        let (run_session, run_fs) = (session.clone(), fs.clone());
        let server = std::thread::spawn(move || run_session.run(run_fs, 3));
        let (alive, ended) = channel::<()>();
        let watched = session.clone();
        let watchdog = std::thread::spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("test took too long, aborting its connection");
                watched.unmount(UnmountMode::Force).ok();
            }
        });
        Mounted { dir, session, fs, server: Some(server), watchdog: Some((alive, watchdog)), _enabled: enabled }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    pub fn notifier(&self) -> Notifier {
        self.session.notifier()
    }

    /// Unmounts and gives back what `run` returned.
    pub fn finish(mut self, mode: UnmountMode) -> Result<(), RunError> {
        self.session.unmount(mode).unwrap();
        self.server.take().unwrap().join().unwrap()
    }

    /// Waits for `run` to return by itself.
    pub fn ended(&mut self) -> Result<(), RunError> {
        self.server.take().unwrap().join().unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.session.unmount(UnmountMode::Force).ok();
        if let Some(server) = self.server.take() {
            server.join().ok();
        }
        if let Some((alive, watchdog)) = self.watchdog.take() {
            drop(alive);
            watchdog.join().ok();
        }
    }
}

//! A shared device that fails on demand: a FUSE filesystem of one file, which passes everything on to a file below until a
//! process is told to get errors, or no answers. The nodes' image is that file.
//!
//! Locks on it are the kernel's own, so the nodes see each other as on any image file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use fuse_session::{
    Attr, EntryOut, Forget, Handler, InitConfig, InitFlags, InitRequest, MountSpec, Op, Reply, Request, RunError,
    Session, Statfs, UnmountMode, abi,
};
use parking_lot::Mutex;

const ROOT: u64 = 1;
const FILE: u64 = 2;
const NAME: &str = "lun.img";
const CACHED: Duration = Duration::from_secs(3600);
/// A thread answers one request at a time; each node has several under way.
const THREADS: usize = 8;

/// What the device does to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Every read, write and flush fails.
    Errors,
    /// One of so many fails.
    Some { one_in: u32 },
    /// Nothing is answered until the fault is over; then what waited has failed.
    Silence,
}

#[derive(Default)]
struct State {
    faults: BTreeMap<u32, Fault>,
    /// Descriptors and the processes that opened them.
    openers: Vec<u32>,
    silenced: Vec<(u32, Reply)>,
    commands: u32,
    failed: usize,
}

struct Passing {
    file: File,
    state: Mutex<State>,
}

/// The mount. Drop it after the nodes that use it.
pub struct FaultyDevice {
    dir: tempfile::TempDir,
    session: Arc<Session>,
    passing: Arc<Passing>,
    server: Option<JoinHandle<Result<(), RunError>>>,
}

impl FaultyDevice {
    /// A sparse device of `bytes`.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let file = tempfile::tempfile()?;
        file.set_len(bytes)?;
        let dir = tempfile::tempdir()?;
        let session = Session::mount(&MountSpec::new("faulty", "faulty", dir.path())).map_err(io::Error::other)?;
        let session = Arc::new(session);
        let passing = Arc::new(Passing { file, state: Mutex::default() });
        let (serving, handler) = (session.clone(), passing.clone());
        let server = std::thread::spawn(move || serving.run(handler, THREADS));
        Ok(Self { dir, session, passing, server: Some(server) })
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join(NAME)
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// From now on, until [`FaultyDevice::heal`].
    pub fn fail(&self, process: u32, fault: Fault) {
        self.passing.state.lock().faults.insert(process, fault);
    }

    pub fn heal(&self, process: u32) {
        let mut state = self.passing.state.lock();
        state.faults.remove(&process);
        let (over, others) = std::mem::take(&mut state.silenced).into_iter().partition(|(p, _)| *p == process);
        state.silenced = others;
        drop(state);
        let over: Vec<(u32, Reply)> = over;
        for (_, reply) in over {
            reply.err(libc::EIO);
        }
    }

    /// How many commands have failed on purpose.
    pub fn failed(&self) -> usize {
        self.passing.state.lock().failed
    }
}

impl Drop for FaultyDevice {
    fn drop(&mut self) {
        self.passing.state.lock().silenced.clear();
        if let Err(e) = self.session.unmount(UnmountMode::Force) {
            eprintln!("{}: {e}", self.dir.path().display());
        }
        if let Some(Err(e)) = self.server.take().map(JoinHandle::join) {
            eprintln!("the faulty device's server panicked: {e:?}");
        }
    }
}

impl Handler for Passing {
    fn init(&self, _: &InitRequest) -> InitConfig {
        InitConfig { flags: InitFlags::ASYNC_READ | InitFlags::BIG_WRITES, ..InitConfig::default() }
    }

    fn request(&self, request: Request, reply: Reply) {
        // False: the caller has gone meanwhile.
        let _ = match (&request.op, request.nodeid) {
            (Op::Lookup { name }, ROOT) if name == NAME.as_bytes() => match self.attr(FILE) {
                Ok(attr) => reply.entry(&EntryOut {
                    nodeid: FILE,
                    generation: 1,
                    entry_valid: CACHED,
                    attr_valid: CACHED,
                    attr,
                }),
                Err(e) => reply.err(errno(&e)),
            },
            (Op::Lookup { .. }, _) => reply.err(libc::ENOENT),
            (Op::Getattr { .. }, node) => match self.attr(node) {
                Ok(attr) => reply.attr(CACHED, &attr),
                Err(e) => reply.err(errno(&e)),
            },
            (Op::Open { .. }, FILE) => {
                let mut state = self.state.lock();
                state.openers.push(process_of(request.pid));
                let fh = state.openers.len() as u64 - 1;
                drop(state);
                reply.open(fh, abi::FOPEN_DIRECT_IO | abi::FOPEN_PARALLEL_DIRECT_WRITES)
            }
            (Op::Read { fh, offset, size, .. }, _) => {
                let Some(reply) = self.admit(*fh, reply) else { return };
                let mut data = vec![0; *size as usize];
                match self.file.read_at(&mut data, *offset) {
                    Ok(n) => reply.data(&data[..n]),
                    Err(e) => reply.err(errno(&e)),
                }
            }
            (Op::Write { fh, offset, data, .. }, _) => {
                let Some(reply) = self.admit(*fh, reply) else { return };
                match self.file.write_all_at(data, *offset) {
                    Ok(()) => reply.write(data.len() as u32),
                    Err(e) => reply.err(errno(&e)),
                }
            }
            (Op::Fsync { fh, .. }, _) => {
                let Some(reply) = self.admit(*fh, reply) else { return };
                match self.file.sync_data() {
                    Ok(()) => reply.ok(),
                    Err(e) => reply.err(errno(&e)),
                }
            }
            (Op::Statfs, _) => reply.statfs(&Statfs { bsize: 4096, frsize: 4096, namelen: 255, ..Statfs::default() }),
            (Op::Flush { .. } | Op::Release { .. }, _) => reply.ok(),
            _ => reply.err(libc::ENOSYS),
        };
    }

    fn forget(&self, _: Vec<Forget>) {}
}

impl Passing {
    /// The reply, if the command is to be carried out.
    fn admit(&self, fh: u64, reply: Reply) -> Option<Reply> {
        let mut state = self.state.lock();
        let process = state.openers[fh as usize];
        state.commands = state.commands.wrapping_add(1);
        match state.faults.get(&process) {
            None => return Some(reply),
            Some(Fault::Some { one_in }) if !state.commands.is_multiple_of(*one_in) => return Some(reply),
            Some(Fault::Silence) => state.silenced.push((process, reply)),
            Some(_) => {
                reply.err(libc::EIO);
            }
        }
        state.failed += 1;
        None
    }

    fn attr(&self, node: u64) -> io::Result<Attr> {
        if node == ROOT {
            return Ok(Attr { ino: ROOT, mode: libc::S_IFDIR | 0o755, nlink: 2, blksize: 4096, ..Attr::default() });
        }
        let m = self.file.metadata()?;
        let mode = libc::S_IFREG | 0o600;
        Ok(Attr { ino: FILE, size: m.len(), blocks: m.blocks(), mode, nlink: 1, blksize: 4096, ..Attr::default() })
    }
}

fn errno(e: &io::Error) -> i32 {
    e.raw_os_error().unwrap_or(libc::EIO)
}

/// FUSE tells the thread.
fn process_of(thread: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let tgid = status.lines().find_map(|l| l.strip_prefix("Tgid:"));
    tgid.and_then(|t| t.trim().parse().ok()).unwrap_or(thread)
}

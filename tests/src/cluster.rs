//! Real nodes for tests: mount processes on one image file, and the promise that none of them outlives its cluster.
//!
//! Everything that must be ended is in one list. It is worked off when the cluster is dropped (also by a panic), when its time
//! is over (a test that hangs in a system call gets an error then and fails), and on signals where asked for. Only processes
//! that the cluster started are killed, only its own mount points are unmounted. Should the test itself be killed, the kernel
//! kills its nodes.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::sys::enter_netns;

pub type Error = Box<dyn std::error::Error + Send + Sync>;
pub type Result<T> = std::result::Result<T, Error>;

/// See [`Cluster::patience`].
const PATIENCE: Duration = Duration::from_secs(40);
/// The life of a test's cluster.
const TEST_LIMIT: Duration = Duration::from_secs(300);
const TEST_VOLUME: u64 = 1 << 30;
/// Set in the environment: what a failed test leaves is kept, the image, all logs and configurations.
const KEEP: &str = "CLUSTERFS_KEEP";
/// Lines of a node's log to show when a test fails.
const SHOWN: usize = 30;

/// Where the programs are; an error says what is missing to run real mounts.
pub fn programs() -> Result<PathBuf> {
    // SAFETY: no arguments, cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Err("mounting needs root: run it as root".into());
    }
    if !Path::new("/dev/fuse").exists() {
        return Err("there is no /dev/fuse: load the kernel module fuse".into());
    }
    let unset =
        "CLUSTERFS_BIN_DIR is not set: run `cargo xtask test` (or `cargo xtask demo`), which builds the programs";
    let dir = PathBuf::from(std::env::var_os("CLUSTERFS_BIN_DIR").ok_or(unset)?);
    let mount = dir.join("mount.clusterfs");
    if !mount.exists() {
        return Err(
            format!("{} does not exist: run `cargo xtask test`, which builds the programs", mount.display()).into()
        );
    }
    Ok(dir)
}

struct Running {
    number: usize,
    child: Child,
    dir: PathBuf,
}

#[derive(Clone, Default)]
struct Registry(Arc<Mutex<Vec<Running>>>);

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Vec<Running>> {
        // A thread that panicked leaves a list that is still true.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Each node logs what is going on.
    fn ask_all(&self) {
        for r in self.lock().iter() {
            // SAFETY: a child that has not been waited for, so the number is still its own.
            unsafe { libc::kill(r.child.id() as libc::pid_t, libc::SIGUSR1) };
        }
        std::thread::sleep(Duration::from_secs(1));
    }

    fn end_all(&self) {
        for mut r in self.lock().drain(..) {
            if let Err(e) = r.end() {
                eprintln!("node {}: {e}", r.number);
            }
        }
    }
}

impl Running {
    /// Kills, and aborts the kernel's connection: a thread of the daemon may be waiting in the kernel for a page that only a
    /// reply of the daemon would unlock, and would never end otherwise.
    fn end(&mut self) -> io::Result<()> {
        self.child.kill()?;
        if is_mounted(&self.dir) {
            umount(&self.dir, libc::MNT_FORCE | libc::MNT_DETACH)?;
        }
        self.child.wait().map(drop)
    }
}

struct Start {
    command: Command,
    started: Sender<io::Result<Child>>,
}

/// One image, and the nodes that have it mounted, by numbers that the user chooses.
pub struct Cluster {
    running: Registry,
    bin: PathBuf,
    dir: tempfile::TempDir,
    image: PathBuf,
    keeper: Sender<Start>,
    /// Bytes of address space that a program may have (RLIMIT_AS).
    pub memory: Option<u64>,
    /// How long a mount or an unmount may take.
    pub patience: Duration,
    /// Network namespaces that nodes run in, where it is not the test's own.
    pub netns: BTreeMap<usize, PathBuf>,
    /// ... and the other programs.
    pub programs_netns: Option<PathBuf>,
    /// What nodes call the device, where it is not [`Cluster::image`].
    pub devices: BTreeMap<usize, PathBuf>,
    /// Further mount options of nodes.
    pub options: BTreeMap<usize, String>,
    /// There is no volume: [`Cluster::local`].
    local: bool,
}

impl Cluster {
    /// No image yet and no node. After `limit` all nodes are killed.
    pub fn new(limit: Duration) -> Result<Self> {
        let running = Registry::default();
        let (keeper, requests) = channel();
        let ended = running.clone();
        std::thread::Builder::new().name("keeper".into()).spawn(move || keep(&requests, &ended, limit))?;
        let dir = tempfile::tempdir()?;
        // Tests look at permissions as other users.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        let image = dir.path().join("lun.img");
        Ok(Self {
            running,
            bin: programs()?,
            dir,
            image,
            keeper,
            memory: None,
            patience: PATIENCE,
            netns: BTreeMap::new(),
            programs_netns: None,
            devices: BTreeMap::new(),
            options: BTreeMap::new(),
            local: false,
        })
    }

    /// As [`Cluster::new`]; a signal that ends the process (ctrl-C) ends all nodes first. For programs, before they start threads.
    pub fn ended_by_signals(limit: Duration) -> Result<Self> {
        let set = block_signals()?;
        let c = Self::new(limit)?;
        let (running, dir) = (c.running.clone(), c.path().to_owned());
        std::thread::spawn(move || end_on_signal(&set, &running, &dir));
        Ok(c)
    }

    /// For a test: a fresh volume, mounted by nodes 0 to `nodes` - 1, with one slot to spare.
    pub fn start(nodes: usize) -> Self {
        Self::try_start(nodes).unwrap_or_else(|e| panic!("{e}"))
    }

    /// For comparison: all nodes are names of one directory of the local filesystem, there is no volume.
    pub fn local(nodes: usize) -> Result<Self> {
        let mut c = Self::new(TEST_LIMIT)?;
        c.local = true;
        let shared = c.path().join("local");
        fs::create_dir(&shared)?;
        (0..nodes).try_for_each(|n| std::os::unix::fs::symlink(&shared, c.mount_point(n)))?;
        Ok(c)
    }

    fn try_start(nodes: usize) -> Result<Self> {
        let c = Self::formatted(nodes + 1, TEST_VOLUME)?;
        (0..nodes).try_for_each(|n| c.mount(n))?;
        Ok(c)
    }

    /// A fresh volume that nobody has mounted.
    pub fn formatted(slots: usize, bytes: u64) -> Result<Self> {
        Self::formatted_for(slots, bytes, TEST_LIMIT)
    }

    /// As [`Cluster::formatted`], for a test that may take `limit`.
    pub fn formatted_for(slots: usize, bytes: u64, limit: Duration) -> Result<Self> {
        Self::formatted_with(slots, bytes, limit, &[])
    }

    /// As [`Cluster::formatted_for`], with more options of mkfs.
    pub fn formatted_with(slots: usize, bytes: u64, limit: Duration, options: &[&str]) -> Result<Self> {
        let c = Self::new(limit)?;
        File::create(c.image())?.set_len(bytes)?;
        c.format(slots, options)?;
        Ok(c)
    }

    /// As [`Cluster::formatted_with`], on an image that is there and outlives the cluster.
    pub fn formatted_on(image: &Path, slots: usize, limit: Duration, options: &[&str]) -> Result<Self> {
        let mut c = Self::new(limit)?;
        c.image = image.to_owned();
        c.format(slots, options)?;
        Ok(c)
    }

    /// As [`Cluster::formatted_on`], where the programs run in a network namespace.
    pub fn formatted_in(
        netns: PathBuf,
        device: &Path,
        slots: usize,
        limit: Duration,
        options: &[&str],
    ) -> Result<Self> {
        let mut c = Self::new(limit)?;
        c.image = device.to_owned();
        c.programs_netns = Some(netns);
        c.format(slots, options)?;
        Ok(c)
    }

    fn format(&self, slots: usize, options: &[&str]) -> Result<()> {
        let slots = slots.to_string();
        self.program("mkfs.clusterfs", &[&["-q", "--nodes", &slots], options].concat()).map(drop)
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn image(&self) -> PathBuf {
        self.image.clone()
    }

    pub fn mount_point(&self, number: usize) -> PathBuf {
        self.path().join(format!("node{number}"))
    }

    fn log(&self, number: usize) -> PathBuf {
        self.path().join(format!("node{number}.log"))
    }

    pub fn log_text(&self, number: usize) -> String {
        fs::read_to_string(self.log(number)).unwrap_or_default()
    }

    /// One of the programs, to be run by the caller.
    pub fn command(&self, name: &str) -> Command {
        let mut c = Command::new(self.bin.join(name));
        c.stdin(Stdio::null());
        if let Some(bytes) = self.memory {
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
            // Each thread may get an arena, which takes 64 MiB of address space, whatever is in it.
            c.env("MALLOC_ARENA_MAX", "2");
            // SAFETY: only one system call in the child, on memory that it owns.
            unsafe {
                c.pre_exec(move || match libc::setrlimit(libc::RLIMIT_AS, &limit) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                });
            }
        }
        c
    }

    /// Runs one of the programs on the image to its end and returns what it printed.
    pub fn program(&self, name: &str, args: &[&str]) -> Result<String> {
        let mut command = self.command(name);
        if let Some(netns) = &self.programs_netns {
            enter_netns(&mut command, netns)?;
        }
        let out = command.args(args).arg(self.image()).output();
        let out = out.map_err(|e| format!("{name}: {e}"))?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        if out.status.success() { Ok(text) } else { Err(format!("{name}: {}\n{text}", out.status).into()) }
    }

    /// Starts a node and waits until its mount is there.
    pub fn mount(&self, number: usize) -> Result<()> {
        self.mount_with(number, "rw")
    }

    pub fn mount_with(&self, number: usize, options: &str) -> Result<()> {
        let dir = self.mount_point(number);
        fs::create_dir_all(&dir)?;
        let log = File::options().create(true).append(true).open(self.log(number))?;
        let mut command = self.command("mount.clusterfs");
        if let Some(netns) = self.netns.get(&number) {
            enter_netns(&mut command, netns)?;
        }
        let more = self.options.get(&number).map(|o| format!(",{o}")).unwrap_or_default();
        let options = format!("{options}{more}");
        let device = self.devices.get(&number).cloned().unwrap_or_else(|| self.image());
        command.arg(device).arg(&dir).args(["-f", "-o", &options]).stdout(log.try_clone()?).stderr(log);
        let child = self.spawn(command).map_err(|e| format!("mount.clusterfs: {e}"))?;
        self.running.lock().push(Running { number, child, dir: dir.clone() });
        let deadline = Instant::now() + self.patience;
        while !is_mounted(&dir) {
            if let Some(status) = self.ended(number)? {
                drop(self.take(number));
                return Err(format!("node {number} ended while mounting: {status}\n{}", self.log_text(number)).into());
            }
            if Instant::now() > deadline {
                return Err(format!("node {number} does not get mounted\n{}", self.log_text(number)).into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Starts a process that ends with the cluster's keeper at the latest.
    pub fn spawn(&self, mut command: Command) -> Result<Child> {
        // Ctrl-C is for the test, which then ends its nodes.
        command.process_group(0);
        // SAFETY: only one system call in the child, on numbers.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let (started, child) = channel();
        self.keeper.send(Start { command, started }).map_err(|_| "the cluster's time is over")?;
        Ok(child.recv().map_err(|_| "the cluster's time is over")??)
    }

    pub fn pid(&self, number: usize) -> Option<u32> {
        self.running.lock().iter().find(|r| r.number == number).map(|r| r.child.id())
    }

    fn ended(&self, number: usize) -> Result<Option<ExitStatus>> {
        match self.running.lock().iter_mut().find(|r| r.number == number) {
            Some(r) => Ok(r.child.try_wait()?),
            None => Err(format!("node {number} does not run").into()),
        }
    }

    fn take(&self, number: usize) -> Result<Running> {
        let mut list = self.running.lock();
        let at = list.iter().position(|r| r.number == number).ok_or_else(|| format!("node {number} does not run"))?;
        Ok(list.remove(at))
    }

    /// SIGKILL, as if the host had lost power.
    pub fn kill9(&self, number: usize) -> Result<()> {
        Ok(self.take(number)?.end()?)
    }

    /// SIGTERM, as a service manager does, and waits for the end of the process.
    pub fn terminate(&self, number: usize) -> Result<()> {
        self.signal(number, libc::SIGTERM)?;
        self.wait_for_end(number)
    }

    /// The process stands still until [`Cluster::resume`].
    pub fn suspend(&self, number: usize) -> Result<()> {
        self.signal(number, libc::SIGSTOP)
    }

    pub fn resume(&self, number: usize) -> Result<()> {
        self.signal(number, libc::SIGCONT)
    }

    fn signal(&self, number: usize, signal: libc::c_int) -> Result<()> {
        let pid = self.pid(number).ok_or_else(|| format!("node {number} does not run"))?;
        // SAFETY: a child that has not been waited for, so the number is still its own.
        match unsafe { libc::kill(pid as libc::pid_t, signal) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().into()),
        }
    }

    /// Unmounts in order and waits for the end of the process.
    pub fn unmount(&self, number: usize) -> Result<()> {
        let dir = self.mount_point(number);
        umount(&dir, 0).map_err(|e| format!("{}: {e}", dir.display()))?;
        self.wait_for_end(number)
    }

    fn wait_for_end(&self, number: usize) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        loop {
            match self.ended(number)? {
                Some(status) if status.success() => return self.take(number).map(drop),
                Some(status) => return Err(format!("node {number}: {status}\n{}", self.log_text(number)).into()),
                None if Instant::now() > deadline => return Err(format!("node {number} does not end").into()),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// The end of a test that went well: all nodes unmount, the volume has no error, no node complained of a fault.
    pub fn finish(self) {
        self.unmount_and_check();
        for n in 0..64 {
            let log = self.log_text(n);
            assert!(!log.contains("panicked") && !log.contains("ERROR"), "node {n} logged a fault:\n{log}");
        }
    }

    /// As [`Cluster::finish`], where the nodes had reason to complain.
    pub fn finish_after_faults(self) {
        self.unmount_and_check();
        for n in 0..64 {
            let log = self.log_text(n);
            assert!(!log.contains("panicked"), "node {n}:\n{log}");
        }
    }

    fn unmount_and_check(&self) {
        let numbers: Vec<usize> = self.running.lock().iter().map(|r| r.number).collect();
        for n in numbers {
            self.unmount(n).unwrap_or_else(|e| panic!("{e}"));
        }
        if self.local {
            return;
        }
        let report = self.program("fsck.clusterfs", &["-n"]).unwrap_or_else(|e| panic!("{e}"));
        assert!(report.contains("clean"), "{report}");
        print!("{report}");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.running.end_all();
        if std::thread::panicking() {
            if std::env::var_os(KEEP).is_some() {
                self.dir.disable_cleanup(true);
                eprintln!("kept: {}", self.path().display());
            }
            for n in 0..64 {
                let log = self.log_text(n);
                let lines: Vec<&str> = log.lines().collect();
                if !lines.is_empty() {
                    let from = lines.len().saturating_sub(SHOWN);
                    eprintln!("log of node {n}, the last of {} lines:\n{}", lines.len(), lines[from..].join("\n"));
                }
            }
        }
    }
}

/// Starts processes until the cluster is dropped. The kernel kills them when the thread that started them ends, so it is
/// one that outlives them.
fn keep(requests: &Receiver<Start>, running: &Registry, limit: Duration) {
    let deadline = Instant::now() + limit;
    loop {
        match requests.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Start { mut command, started }) => drop(started.send(command.spawn())),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                eprintln!(
                    "nothing has happened for too long: all nodes are killed, after they have logged what they wait for"
                );
                running.ask_all();
                return running.end_all();
            }
        }
    }
}

/// In this thread and all that it starts.
fn block_signals() -> Result<libc::sigset_t> {
    // SAFETY: an initialised set, changed by the calls made for it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        match libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) {
            0 => Ok(set),
            e => Err(io::Error::from_raw_os_error(e).into()),
        }
    }
}

fn end_on_signal(set: &libc::sigset_t, running: &Registry, dir: &Path) {
    let mut signal = 0;
    // SAFETY: both live through the call.
    while unsafe { libc::sigwait(set, &mut signal) } != 0 {}
    eprintln!("\nended by a signal: cleaning up");
    running.end_all();
    if let Err(e) = fs::remove_dir_all(dir) {
        eprintln!("{}: {e}", dir.display());
    }
    std::process::exit(128 + signal);
}

pub fn is_mounted(dir: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|l| l.split(' ').nth(1).is_some_and(|d| Path::new(d) == dir))
}

pub fn umount(dir: &Path, flags: libc::c_int) -> io::Result<()> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: a valid C string.
    match unsafe { libc::umount2(path.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

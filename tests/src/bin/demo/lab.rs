//! Nodes for a demonstration: mount processes on one image file, and the promise that none of them outlives it.
//!
//! Everything that must be ended is in one list; it is worked off when the lab is dropped, on ctrl-C, and when the time is
//! over. Only processes that the lab started are killed, only its own mount points are unmounted.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub type Error = Box<dyn std::error::Error + Send + Sync>;
pub type Result<T> = std::result::Result<T, Error>;

const PATIENCE: Duration = Duration::from_secs(40);

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

    /// Kills first: a detached mount whose daemon is dead lets go of everything that waits in it.
    fn end_all(&self) {
        for mut r in self.lock().drain(..) {
            let _ = r.child.kill();
            let _ = r.child.wait();
            if is_mounted(&r.dir) {
                let _ = umount(&r.dir, libc::MNT_DETACH);
            }
        }
    }
}

pub struct Lab {
    running: Registry,
    bin: PathBuf,
    dir: tempfile::TempDir,
}

impl Lab {
    /// Programs are in `bin`; after `limit` everything is ended and the process with it.
    pub fn new(bin: PathBuf, limit: Duration) -> Result<Self> {
        let lab = Self { running: Registry::default(), bin, dir: tempfile::tempdir()? };
        watch_signals(lab.running.clone(), lab.dir.path().to_owned(), limit)?;
        Ok(lab)
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("lun.img")
    }

    pub fn mount_point(&self, number: usize) -> PathBuf {
        self.dir.path().join(format!("node{number}"))
    }

    fn log(&self, number: usize) -> PathBuf {
        self.dir.path().join(format!("node{number}.log"))
    }

    /// Runs one of the programs to its end and returns what it printed.
    pub fn program(&self, name: &str, args: &[&str]) -> Result<String> {
        let path = self.bin.join(name);
        let out = Command::new(&path).args(args).arg(self.image()).output();
        let out = out.map_err(|e| format!("{}: {e}", path.display()))?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        if out.status.success() { Ok(text) } else { Err(format!("{name}: {}\n{text}", out.status).into()) }
    }

    /// Starts a node and waits until its mount is there.
    pub fn mount(&self, number: usize) -> Result<()> {
        let dir = self.mount_point(number);
        fs::create_dir_all(&dir)?;
        let log = File::options().create(true).append(true).open(self.log(number))?;
        let path = self.bin.join("mount.clusterfs");
        let child = Command::new(&path)
            .arg(self.image())
            .arg(&dir)
            .arg("-f")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for the demonstration, which then ends its nodes.
            .process_group(0)
            .spawn()
            .map_err(|e| format!("{}: {e}", path.display()))?;
        self.running.lock().push(Running { number, child, dir: dir.clone() });
        let deadline = Instant::now() + PATIENCE;
        while !is_mounted(&dir) {
            if let Some(r) = self.running.lock().iter_mut().find(|r| r.number == number)
                && let Some(status) = r.child.try_wait()?
            {
                return Err(format!("node {number} ended while mounting: {status}\n{}", self.log_text(number)).into());
            }
            if Instant::now() > deadline {
                return Err(format!("node {number} does not get mounted\n{}", self.log_text(number)).into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    pub fn pid(&self, number: usize) -> Option<u32> {
        self.running.lock().iter().find(|r| r.number == number).map(|r| r.child.id())
    }

    fn take(&self, number: usize) -> Result<Running> {
        let mut list = self.running.lock();
        let at = list.iter().position(|r| r.number == number).ok_or_else(|| format!("node {number} does not run"))?;
        Ok(list.remove(at))
    }

    /// SIGKILL, as if the host had lost power.
    pub fn kill(&self, number: usize) -> Result<()> {
        let mut r = self.take(number)?;
        r.child.kill()?;
        r.child.wait()?;
        umount(&r.dir, libc::MNT_DETACH)?;
        Ok(())
    }

    /// Unmounts in order and waits for the end of the process.
    pub fn unmount(&self, number: usize) -> Result<()> {
        let dir = self.mount_point(number);
        umount(&dir, 0).map_err(|e| format!("{}: {e}", dir.display()))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ended = match self.running.lock().iter_mut().find(|r| r.number == number) {
                Some(r) => r.child.try_wait()?,
                None => return Ok(()),
            };
            match ended {
                Some(status) if status.success() => return self.take(number).map(drop),
                Some(status) => return Err(format!("node {number}: {status}\n{}", self.log_text(number)).into()),
                None if Instant::now() > deadline => return Err(format!("node {number} does not end").into()),
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    pub fn log_text(&self, number: usize) -> String {
        fs::read_to_string(self.log(number)).unwrap_or_default()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.running.end_all();
    }
}

/// Waits for ctrl-C, a termination or the end of the time, and ends everything.
fn watch_signals(running: Registry, dir: PathBuf, limit: Duration) -> Result<()> {
    // SAFETY: an initialised set, changed by the calls made for it; blocked here, so in every later thread.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        if libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error().into());
        }
        set
    };
    std::thread::spawn(move || {
        let deadline = Instant::now() + limit;
        let signal = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let wait = libc::timespec { tv_sec: left.as_secs() as libc::time_t, tv_nsec: 0 };
            // SAFETY: both live through the call; no information about the signal is wanted.
            let got = unsafe { libc::sigtimedwait(&set, std::ptr::null_mut(), &wait) };
            if got > 0 || left.is_zero() {
                break got;
            }
        };
        match signal {
            1.. => eprintln!("\nended by a signal: cleaning up"),
            _ => eprintln!("\nnothing has happened for too long: cleaning up"),
        }
        running.end_all();
        if let Err(e) = fs::remove_dir_all(&dir) {
            eprintln!("{}: {e}", dir.display());
        }
        std::process::exit(if signal > 0 { 130 } else { 1 });
    });
    Ok(())
}

fn is_mounted(dir: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|l| l.split(' ').nth(1).is_some_and(|d| Path::new(d) == dir))
}

fn umount(dir: &Path, flags: libc::c_int) -> io::Result<()> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: a valid C string.
    match unsafe { libc::umount2(path.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

//! A server process with all that it starts: in one process group, which ends with it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, Result};

/// For an orderly end of a server.
const GRACE: Duration = Duration::from_secs(5);
/// Until a server accepts connections.
const START: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// A program of a Debian package; an error says how to get it.
pub fn installed(path: &str) -> Result<&Path> {
    let p = Path::new(path);
    if p.exists() {
        Ok(p)
    } else {
        Err(format!("{path} is missing: run `cargo xtask setup`, which installs it").into())
    }
}

/// A loopback address that only this process and node use: tests may run beside each other.
pub fn address(node: usize) -> Ipv4Addr {
    let [.., b, c] = (std::process::id() % 0xfe00 + 0x100).to_be_bytes();
    Ipv4Addr::new(127, b, c, 10 + node as u8)
}

/// Ports of `address` that nobody uses.
pub fn free_ports<const N: usize>(address: Ipv4Addr) -> io::Result<[SocketAddr; N]> {
    let mut ports = [SocketAddr::from((address, 0)); N];
    // Kept until all are known: one that was let go may be given again.
    let mut taken = Vec::new();
    for port in &mut ports {
        let listener = TcpListener::bind((address, 0))?;
        *port = listener.local_addr()?;
        taken.push(listener);
    }
    Ok(ports)
}

/// Kills a server's process group once the process that started the server is gone, however that ended. The kernel's signal at
/// the death of a parent does not do: it is forgotten when a process changes its user, as Postfix's master does when it starts.
struct Guard {
    child: Child,
}

impl Guard {
    const DISMISSED: &str = "dismissed";

    fn of(group: u32) -> io::Result<Self> {
        let script = format!("read line; test \"$line\" = {} || kill -s KILL -- -{group}", Self::DISMISSED);
        let mut command = Command::new("/bin/sh");
        // Ctrl-C is for the test, the guard outlives it.
        command.args(["-c", &script]).process_group(0).stdin(Stdio::piped());
        Ok(Self { child: command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()? })
    }

    /// The group has ended: its number may be another's from now on.
    fn dismiss(&mut self) -> io::Result<()> {
        if let Some(mut input) = self.child.stdin.take() {
            writeln!(input, "{}", Self::DISMISSED)?;
        }
        self.child.wait().map(drop)
    }
}

pub struct Process {
    name: String,
    child: Child,
    guard: Guard,
    output: PathBuf,
}

impl Process {
    /// Starts a server whose output goes to a file in `dir`.
    pub fn start(cluster: &Cluster, name: &str, dir: &Path, mut command: Command) -> Result<Self> {
        let output = dir.join(format!("{name}.out"));
        let out = File::options().create(true).append(true).open(&output)?;
        adopt_orphans()?;
        command.current_dir(dir).stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = cluster.spawn(command).map_err(|e| format!("{name}: {e}"))?;
        let guard = Guard::of(child.id())?;
        Ok(Self { name: name.to_owned(), child, guard, output })
    }

    /// Waits until it accepts connections at `at`.
    pub fn ready(&mut self, at: SocketAddr) -> Result<()> {
        let deadline = Instant::now() + START;
        while TcpStream::connect_timeout(&at, Duration::from_secs(1)).is_err() {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("{} ended at its start: {status}\n{}", self.name, self.output()).into());
            }
            if Instant::now() > deadline {
                return Err(format!("{} does not answer at {at}\n{}", self.name, self.output()).into());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    pub fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// In order, if it does so within a few seconds.
    pub fn stop(&mut self) {
        self.signal(libc::SIGTERM, self.child.id() as libc::pid_t);
        if !self.ends_within(GRACE) {
            eprintln!("{} does not end, it is killed", self.name);
        }
        self.kill();
    }

    /// At once, with all that it started.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL, -(self.child.id() as libc::pid_t));
        // Its files may be on a mount that does not answer: that mount ends next.
        self.ends_within(GRACE);
        self.bury();
    }

    /// Takes note of the ends of what it started: a process counts as alive to those that look at its lock files until then.
    fn bury(&self) {
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline {
            // SAFETY: no memory is involved; only processes of the group are waited for.
            match unsafe { libc::waitpid(-(self.child.id() as libc::pid_t), std::ptr::null_mut(), libc::WNOHANG) } {
                0 => std::thread::sleep(POLL),
                n if n < 0 => return,
                _ => {}
            }
        }
    }

    fn ends_within(&mut self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return true;
            }
            std::thread::sleep(POLL);
        }
        false
    }

    /// To the process or its group; the group keeps the number as long as anybody is in it.
    fn signal(&self, signal: libc::c_int, to: libc::pid_t) {
        // SAFETY: no memory is involved. The leader's number was not given away: it is our child, or its group still lives; if
        // neither, the call finds nobody.
        unsafe { libc::kill(to, signal) };
    }
}

/// What a server started becomes our child when the server ends.
fn adopt_orphans() -> io::Result<()> {
    // SAFETY: only a number is passed.
    match unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
        if let Err(e) = self.guard.dismiss() {
            eprintln!("the guard of {}: {e}", self.name);
        }
    }
}

//! `umount.fuse.clusterfs`: see umount.fuse.clusterfs(8). umount(8) calls it by the type that the kernel shows. Exit statuses are those of
//! umount(8).
//!
//! The kernel is done with a FUSE mount before its daemon is: what was not synced still has to be written back, and the node has to
//! leave the volume. Who shuts the host down takes the network away after that, so this waits for it.

use std::ffi::{CString, OsString};
use std::fs;
use std::io::{self, IsTerminal};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use fuse_mount::mount::LEAVING;
use fuse_mount::options::{USAGE, command_line};
use fuse_mount::report::PID_XATTR;

const SYSTEM: u8 = 2;
const FAILED: u8 = 32;

/// A daemon that serves this long after the unmount is asked for by another mount point or namespace.
const NOTICES: Duration = Duration::from_secs(2);
/// So often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(50);

#[derive(Parser)]
#[command(
    name = "umount.fuse.clusterfs",
    version,
    about = "Ends a node of a clusterfs volume, and waits until it has left"
)]
struct Cli {
    /// Where the volume is mounted
    dir: PathBuf,
    /// Even if the device does not answer: requests under way get errors, and nothing is waited for
    #[arg(short)]
    force: bool,
    /// Take it out of the tree now; the node leaves when nobody uses it any more, which is not waited for
    #[arg(short)]
    lazy: bool,
    /// Tell what is done
    #[arg(short)]
    verbose: bool,
    /// Leave no trace in /etc/mtab: there never is one
    #[arg(short)]
    no_mtab: bool,
    /// Not for this filesystem: a mount that is in use stays as it is
    #[arg(short)]
    read_only: bool,
    /// The type, as umount(8) gives it
    #[arg(short = 't', value_name = "TYPE")]
    kind: Option<OsString>,
}

fn main() -> ExitCode {
    let cli: Cli = match command_line() {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    // SAFETY: asks for a number.
    if unsafe { libc::geteuid() } != 0 {
        return complain("only root can unmount", USAGE);
    }
    if cli.kind.as_ref().is_some_and(|k| k != "fuse.clusterfs" && k != "clusterfs") {
        return complain("only for mounts of type fuse.clusterfs", USAGE);
    }
    // Of a mount whose device does not answer, not even this may be asked.
    let daemon = if cli.force || cli.lazy { None } else { Daemon::of(&cli.dir) };
    if let Err(e) = unmount(&cli) {
        let why = match e.raw_os_error() {
            Some(libc::EBUSY) => "it is in use (see fuser -m, or umount -l)".into(),
            Some(libc::EINVAL) => "nothing is mounted there".into(),
            _ => e.to_string(),
        };
        let read_only = if cli.read_only { "; clusterfs cannot be made read-only instead" } else { "" };
        return complain(&format!("{}: {why}{read_only}", cli.dir.display()), FAILED);
    }
    match daemon.map(|d| d.wait(&cli)) {
        None | Some(Ok(())) => ExitCode::SUCCESS,
        Some(Err(e)) => {
            complain(&format!("{}: unmounted, but its daemon cannot be waited for: {e}", cli.dir.display()), SYSTEM)
        }
    }
}

fn complain(what: &str, status: u8) -> ExitCode {
    eprintln!("umount.fuse.clusterfs: {what}");
    ExitCode::from(status)
}

fn path(dir: &Path) -> io::Result<CString> {
    CString::new(dir.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn unmount(cli: &Cli) -> io::Result<()> {
    let mut flags = libc::UMOUNT_NOFOLLOW;
    if cli.force {
        flags |= libc::MNT_FORCE;
    }
    if cli.lazy {
        flags |= libc::MNT_DETACH;
    }
    let dir = path(&cli.dir)?;
    // SAFETY: a string that ends with a zero byte, and flags.
    if unsafe { libc::umount2(dir.as_ptr(), flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if cli.verbose {
        println!("{} unmounted", cli.dir.display());
    }
    Ok(())
}

/// The process that serves a mount.
struct Daemon {
    pid: u32,
    fd: OwnedFd,
}

impl Daemon {
    /// `None`: it does not tell, as it is gone, or of an older version.
    fn of(dir: &Path) -> Option<Self> {
        let (dir, name) = (path(dir).ok()?, CString::new(PID_XATTR).ok()?);
        let mut value = [0u8; 16];
        // SAFETY: two strings that end with a zero byte, and a buffer as long as said.
        let n = unsafe { libc::getxattr(dir.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        let pid: u32 = std::str::from_utf8(value.get(..usize::try_from(n).ok()?)?).ok()?.parse().ok()?;
        // SAFETY: numbers only.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::pid_t::try_from(pid).ok()?, 0) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: pidfd_open has just made it, nobody else owns it.
        Some(Self { pid, fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Until it has ended; if it goes on serving, until that is clear.
    fn wait(&self, cli: &Cli) -> io::Result<()> {
        let (begun, dir) = (Instant::now(), cli.dir.display());
        let mut told = false;
        while !self.ended(LOOK)? {
            if begun.elapsed() < NOTICES {
                continue;
            }
            if self.serves() {
                if cli.verbose {
                    println!("the volume is mounted elsewhere, too: its daemon (process {}) goes on", self.pid);
                }
                return Ok(());
            }
            if !std::mem::replace(&mut told, true) && (cli.verbose || io::stderr().is_terminal()) {
                eprintln!(
                    "{dir}: waiting for what has to be written, and for the node to leave (process {})",
                    self.pid
                );
            }
        }
        if cli.verbose {
            println!("{dir}: the node has left the volume");
        }
        Ok(())
    }

    fn ended(&self, within: Duration) -> io::Result<bool> {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, as said.
        match unsafe { libc::poll(&mut poll, 1, within.as_millis() as libc::c_int) } {
            -1 if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted => Err(io::Error::last_os_error()),
            n => Ok(n > 0),
        }
    }

    /// Whether it has not come to its end yet.
    fn serves(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/comm", self.pid)).is_ok_and(|name| name.trim_end() != LEAVING)
    }
}

//! A kernel of its own for a test: User Mode Linux (Debian's package `user-mode-linux`), with the host's files read-only as its
//! root and the program `clusterfs-guest` as its first process, which does one of its scenarios and writes a report.
//!
//! In there are what a host's kernel may lack or a test must not touch: SCSI disks of a target (LIO) that knows everything that a
//! volume needs, device-mapper, a reboot.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cluster::Result;

const KERNEL: &str = "linux.uml";
const MEMORY: &str = "mem=512M";
/// The first line of the report of a scenario that went well.
pub const WELL: &str = "well";
/// Ends the guest's arguments: its kernel adds some of its own.
pub const END: &str = "end";
/// Name of the report in the directory that the guest may write to.
pub const REPORT: &str = "report";

/// A guest at work. Killed when dropped.
pub struct Guest {
    child: Child,
    dir: tempfile::TempDir,
    scenario: String,
    limit: Duration,
    started: Instant,
}

impl Guest {
    /// Boots a guest that does `scenario`, a word and its arguments; `disks` are files or devices that it sees as `/dev/ubda` and
    /// on, each of which may be another guest's too.
    pub fn start(program: &Path, scenario: &[&str], disks: &[&Path], limit: Duration) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let console = File::create(dir.path().join("console"))?;
        let mut command = Command::new(KERNEL);
        command.arg(MEMORY).args(["rootfstype=hostfs", "rootflags=/", "ro", "quiet", "panic=1", "con=null"]);
        command.args(["con0=null,fd:1", "con1=null", "ssl=null"]);
        // The kernel's own files: its memory among them, which is to be in memory.
        command.env("TMPDIR", "/dev/shm").arg(format!("uml_dir={}", dir.path().display()));
        for (disk, letter) in disks.iter().zip('a'..) {
            // c: shared with others, no lock on it; s: written before it is acknowledged.
            command.arg(format!("ubd{letter}cs={}", disk.display()));
        }
        command.arg(format!("init={}", program.display())).arg("--").arg(dir.path()).args(scenario).arg(END);
        command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
        // SAFETY: only one system call in the child, on numbers.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let child = command
            .spawn()
            .map_err(|e| format!("{KERNEL}: {e}: `cargo xtask setup` installs it (package user-mode-linux)"))?;
        Ok(Self { child, dir, scenario: scenario.join(" "), limit, started: Instant::now() })
    }

    /// What the guest shares with the host.
    pub fn shared(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    /// Waits for its end; an error if the scenario did not go well.
    pub fn finish(mut self) -> Result<String> {
        while self.child.try_wait()?.is_none() {
            if self.started.elapsed() > self.limit {
                return Err(format!("{}: not done after {:?}\n{}", self.scenario, self.limit, self.told()).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let report = fs::read_to_string(self.dir.path().join(REPORT)).unwrap_or_default();
        match report.strip_prefix(WELL) {
            Some(said) => Ok(said.trim_start().to_string()),
            None => Err(format!("{}: {report}\n{}", self.scenario, self.told()).into()),
        }
    }

    /// The console.
    fn told(&self) -> String {
        let bytes = fs::read(self.dir.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // It has made itself the leader of a group, in which its helpers are.
        // SAFETY: only numbers, and a child that has not been waited for, so that the number is still its own.
        unsafe { libc::kill(-(self.child.id() as libc::pid_t), libc::SIGKILL) };
        // Before it came to that.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! iSCSI targets for tests, run as children, and a proxy that loses connections.
//!
//! | | tgt, made to accept COMPARE AND WRITE | istgt |
//! |---|---|---|
//! | COMPARE AND WRITE | in its disks, but not in its table of commands: [`SHIM`] adds it; atomic with one I/O thread | yes |
//! | registrations | per session, forgotten when it ends | per initiator port; removing one damages those made after it |
//! | PREEMPT AND ABORT | no | yes |

pub mod stranger;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::cluster::Result;
use crate::sys::enter_netns;

/// Name of every test's target: each has an address of its own.
pub const TARGET: &str = "iqn.2026-01.test:disk";
/// What tells tgt's programs where the control socket is.
const CONTROL: &str = "TGT_IPC_SOCKET";
const START: Duration = Duration::from_secs(10);
/// User and secret of one-way CHAP, and what the target answers with.
pub const CHAP: [&str; 4] = ["me", "secret-of-mine", "it", "secret-of-its"];
/// See the file.
pub const SHIM: &str = include_str!("tgt_compare_and_write.c");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tgt,
    /// ... with many I/O threads: its compare-and-writes are not atomic then.
    ThreadedTgt,
    /// As Debian ships it: without COMPARE AND WRITE.
    PlainTgt,
    /// With authentication: `None`, `CHAP` or `CHAP Mutual`.
    Istgt(&'static str),
}

/// What is unusual about a target.
#[derive(Clone, Debug)]
pub struct Shape {
    pub kind: Kind,
    /// Where it listens.
    pub at: SocketAddr,
    pub block_size: u32,
    /// The network namespace it runs in, a file.
    pub netns: Option<PathBuf>,
}

impl Shape {
    pub fn local(kind: Kind) -> Result<Self> {
        Ok(Self { kind, at: (Ipv4Addr::LOCALHOST, free_port()?).into(), block_size: 512, netns: None })
    }
}

/// A port that nobody uses now.
fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A target with one LUN, a sparse file.
pub struct Target {
    dir: tempfile::TempDir,
    shape: Shape,
    /// Port of istgt's control portal.
    control: u16,
    child: Option<Child>,
}

impl Target {
    /// tgt, on loopback.
    pub fn start(bytes: u64) -> Result<Self> {
        Self::with(bytes, Shape::local(Kind::Tgt)?)
    }

    pub fn with(bytes: u64, shape: Shape) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        File::create(dir.path().join("lun"))?.set_len(bytes)?;
        let mut target = Self { dir, shape, control: free_port()?, child: None };
        match target.shape.kind {
            Kind::Tgt | Kind::ThreadedTgt => target.build_shim()?,
            Kind::PlainTgt => {}
            Kind::Istgt(auth) => {
                fs::write(target.path("conf"), target.configuration(auth))?;
                let [user, secret, theirs, answer] = CHAP;
                let auth = format!("[AuthGroup1]\n  Auth \"{user}\" \"{secret}\" \"{theirs}\" \"{answer}\"\n");
                fs::write(target.path("auth"), auth)?;
            }
        }
        target.run()?;
        Ok(target)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The file behind the LUN.
    pub fn lun(&self) -> PathBuf {
        self.path("lun")
    }

    fn build_shim(&self) -> Result<()> {
        fs::write(self.path("shim.c"), SHIM)?;
        let out = Command::new("gcc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([self.path("shim.so"), self.path("shim.c")])
            .output()
            .map_err(|e| format!("gcc: {e}: `cargo xtask setup` installs it"))?;
        if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned().into()) }
    }

    fn configuration(&self, auth: &str) -> String {
        let dir = self.dir.path().display();
        let (base, disk) = TARGET.split_once(':').unwrap_or((TARGET, ""));
        let Shape { at, block_size, .. } = &self.shape;
        let control = self.control;
        format!(
            "[Global]
  NodeBase \"{base}\"
  PidFile {dir}/pid
  AuthFile {dir}/auth
  LogFacility \"local7\"
  Timeout 30
  NopInInterval 20
  DiscoveryAuthMethod Auto
  MaxSessions 64
  MaxConnections 4
  MaxR2T 32
  MaxOutstandingR2T 16
  DefaultTime2Wait 2
  DefaultTime2Retain 60
  FirstBurstLength 262144
  MaxBurstLength 1048576
  MaxRecvDataSegmentLength 262144
  InitialR2T Yes
  ImmediateData Yes
  DataPDUInOrder Yes
  DataSequenceInOrder Yes
  ErrorRecoveryLevel 0
[UnitControl]
  AuthMethod CHAP
  Portal UC1 127.0.0.1:{control}
  Netmask 127.0.0.1
[PortalGroup1]
  Portal DA1 {at}
[InitiatorGroup1]
  InitiatorName \"ALL\"
  Netmask ALL
[LogicalUnit1]
  TargetName {disk}
  Mapping PortalGroup1 InitiatorGroup1
  AuthMethod {auth}
  AuthGroup AuthGroup1
  UseDigest Auto
  UnitType Disk
  QueueDepth 64
  BlockLength {block_size}
  LUN0 Storage {dir}/lun Auto
"
        )
    }

    fn command(&self) -> Command {
        match self.shape.kind {
            Kind::Istgt(_) => {
                let mut c = Command::new("istgt");
                c.arg("-D").arg("-c").arg(self.path("conf")).arg("-p").arg(self.path("pid"));
                c
            }
            kind => {
                let mut c = Command::new("tgtd");
                let threads = if kind == Kind::ThreadedTgt { "16" } else { "1" };
                c.args(["-f", "-t", threads, "--iscsi", &format!("portal={}", self.shape.at)]);
                c.env(CONTROL, self.path("control"));
                if kind != Kind::PlainTgt {
                    c.env("LD_PRELOAD", self.path("shim.so"));
                }
                c
            }
        }
    }

    /// Starts it, after [`Target::kill`] again, and waits until it serves.
    pub fn run(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.path("log"))?;
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        if let Some(netns) = &self.shape.netns {
            enter_netns(&mut command, netns)?;
        }
        // SAFETY: only one system call in the child, on numbers.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let program = command.get_program().to_string_lossy().into_owned();
        self.child = Some(
            command
                .spawn()
                .map_err(|e| format!("{program}: {e}: `cargo xtask setup` installs it (packages tgt, istgt)"))?,
        );
        let end = Instant::now() + START;
        while let Err(e) = self.set_up() {
            let ended = self.child.as_mut().map(Child::try_wait).transpose()?.flatten();
            if ended.is_some() || Instant::now() > end {
                return Err(format!("{program} does not start: {e}\n{}", self.log()).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn set_up(&self) -> Result<()> {
        if let Kind::Istgt(_) = self.shape.kind {
            TcpStream::connect_timeout(&self.shape.at, Duration::from_millis(200))?;
            return Ok(());
        }
        let lun = self.lun().display().to_string();
        let size = self.shape.block_size.to_string();
        self.admin(&["--op", "show", "--mode", "target"])?;
        self.admin(&["--op", "new", "--mode", "target", "--tid", "1", "-T", TARGET])?;
        let disk =
            ["--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", &lun, "--blocksize", &size];
        self.admin(&disk)?;
        // As arrays do: UNMAP gives blocks back, to the file's filesystem here.
        let thin = ["--op", "update", "--mode", "logicalunit", "--tid", "1", "--lun", "1"];
        self.admin(&[&thin[..], &["--params", "thin_provisioning=1"]].concat())?;
        self.admin(&["--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"])
    }

    fn admin(&self, args: &[&str]) -> Result<()> {
        self.tgtadm(args).map(drop)
    }

    fn tgtadm(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new("tgtadm");
        command.args(["--lld", "iscsi"]).args(args).env(CONTROL, self.path("control"));
        let out = command.output()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        if out.status.success() { Ok(text) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned().into()) }
    }

    /// tgt closes all connections, as a controller of an array does that hands over to the other.
    pub fn drop_sessions(&self) -> Result<()> {
        let shown = self.tgtadm(&["--op", "show", "--mode", "conn", "--tid", "1"])?;
        for sid in shown.lines().filter_map(|l| l.trim().strip_prefix("Session: ")) {
            // One that is gone meanwhile is as good.
            let _ = self.admin(&["--op", "delete", "--mode", "conn", "--tid", "1", "--sid", sid, "--cid", "0"]);
        }
        Ok(())
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// The name of the disk, by way of another address if need be.
    pub fn url_at(&self, user: Option<&str>, at: SocketAddr) -> String {
        let user = user.map(|u| format!("{u}@")).unwrap_or_default();
        let lun = if matches!(self.shape.kind, Kind::Istgt(_)) { 0 } else { 1 };
        format!("iscsi://{user}{at}/{TARGET}/{lun}")
    }

    pub fn url(&self) -> String {
        self.url_at(None, self.shape.at)
    }

    pub fn address(&self) -> SocketAddr {
        self.shape.at
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// As if the array had lost power, but for its disks' contents.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    fn signal(&self, signal: libc::c_int) -> Result<()> {
        let pid = self.pid().ok_or("the target does not run")?;
        // SAFETY: a child that has not been waited for, so the number is still its own.
        match unsafe { libc::kill(pid as libc::pid_t, signal) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().into()),
        }
    }

    pub fn suspend(&self) -> Result<()> {
        self.signal(libc::SIGSTOP)
    }

    pub fn resume(&self) -> Result<()> {
        self.signal(libc::SIGCONT)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Err(e) = self.kill() {
            eprintln!("target: {e}");
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("log of the target:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
    }
}

/// A file of CHAP secrets, that only its owner can read. `answer`: what the target is expected to know.
pub fn secrets_file(dir: &Path, secret: &str, answer: Option<&str>) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join("secrets");
    let [user, _, theirs, _] = CHAP;
    let mutual = answer.map(|a| format!(" {theirs} {a}")).unwrap_or_default();
    fs::write(&path, format!("{TARGET} {user} {secret}{mutual}\n"))?;
    fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
    Ok(path)
}

#[derive(Default)]
struct Lines {
    open: Vec<TcpStream>,
    /// Answers of the target are thrown away, and the connection with them.
    deaf: bool,
    /// No connection is let through.
    cut: bool,
}

/// Forwards connections to a target.
pub struct Proxy {
    at: SocketAddr,
    lines: Arc<Mutex<Lines>>,
}

impl Proxy {
    /// Runs until the test's process ends.
    pub fn start(to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let at = listener.local_addr()?;
        let lines = Arc::new(Mutex::new(Lines::default()));
        let shared = lines.clone();
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if let Err(e) = forward(&near, to, &shared) {
                    eprintln!("proxy: {e}");
                }
            }
        });
        Ok(Self { at, lines })
    }

    pub fn address(&self) -> SocketAddr {
        self.at
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes every connection. New ones are let through.
    pub fn drop_all(&self) {
        for line in self.lines().open.drain(..) {
            let _ = line.shutdown(Shutdown::Both);
        }
    }

    /// Closes every connection, and new ones, until [`Proxy::mend`].
    pub fn cut(&self) {
        self.lines().cut = true;
        self.drop_all();
    }

    pub fn mend(&self) {
        self.lines().cut = false;
    }

    /// The next answer of the target ends its connection unseen: what was asked for is done, but nobody knows.
    pub fn lose_next_answer(&self) {
        self.lines().deaf = true;
    }
}

fn forward(near: &TcpStream, to: SocketAddr, lines: &Arc<Mutex<Lines>>) -> io::Result<()> {
    let far = TcpStream::connect(to)?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    {
        let mut l = lines.lock().unwrap_or_else(PoisonError::into_inner);
        if l.cut {
            return Ok(());
        }
        l.open.push(near.try_clone()?);
        l.open.push(far.try_clone()?);
    }
    let (up, down) = ((near.try_clone()?, far.try_clone()?), (far, near.try_clone()?));
    std::thread::spawn(move || pump(up.0, up.1, || false));
    let lines = lines.clone();
    std::thread::spawn(move || {
        pump(down.0, down.1, || std::mem::take(&mut lines.lock().unwrap_or_else(PoisonError::into_inner).deaf));
    });
    Ok(())
}

/// Copies until one side ends, or `stop` says so when something arrives.
fn pump(mut from: TcpStream, mut to: TcpStream, stop: impl Fn() -> bool) {
    let mut buf = vec![0; 64 << 10];
    loop {
        match from.read(&mut buf) {
            Ok(n) if n > 0 && !stop() => {
                if to.write_all(&buf[..n]).is_err() {
                    break;
                }
            }
            _ => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

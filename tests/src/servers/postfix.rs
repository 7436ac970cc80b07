//! A node's own Postfix: SMTP in, and three ways out, by the recipient's domain.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::accounts::{GID, Store, UID, USERS};
use super::process::{Process, address, free_ports, installed};
use crate::cluster::{Cluster, Result};
use crate::sys::chown;

const MASTER: &str = "/usr/lib/postfix/sbin/master";
/// What a log must not have.
const FAULTS: [&str; 6] = ["error:", "fatal:", "panic:", "warning:", "status=bounced", "status=deferred"];
/// A recipient's domain says who delivers.
pub const BY_LMTP: &str = "lmtp.example";
pub const BY_VIRTUAL: &str = "virtual.example";
pub const BY_LOCAL: &str = "local.example";
pub const ROUTES: [&str; 3] = [BY_LMTP, BY_VIRTUAL, BY_LOCAL];
/// Messages that have not been delivered are in these.
const QUEUES: [&str; 5] = ["maildrop", "incoming", "active", "deferred", "hold"];
/// The other directories of a queue, with modes as Postfix itself makes them.
const PRIVATE: [&str; 7] = ["bounce", "corrupt", "defer", "flush", "private", "saved", "trace"];

pub struct Postfix {
    process: Process,
    dir: PathBuf,
    queue: PathBuf,
    pub smtp: SocketAddr,
}

impl Postfix {
    /// `settings` are lines of main.cf that are to be tested; `lmtp` is the node's own Dovecot. Its messages wait in `queue`.
    pub fn start(
        cluster: &Cluster,
        node: usize,
        dir: &Path,
        queue: &Path,
        store: Store,
        settings: &str,
        lmtp: SocketAddr,
    ) -> Result<Self> {
        installed(MASTER)?;
        let conf = dir.join("conf");
        let data = dir.join("data");
        fs::create_dir_all(&conf)?;
        fs::create_dir_all(&data)?;
        chown(&data, id(c"postfix")?.0, 0)?;
        make_queue(queue)?;
        let [smtp] = free_ports(address(node))?;
        let root = cluster.mount_point(node);
        fs::write(conf.join("main.cf"), main_cf(node, dir, queue, &root, settings, lmtp))?;
        fs::write(conf.join("master.cf"), master_cf(smtp))?;
        let boxes = USERS.map(|u| {
            let inbox = store.inbox(u);
            format!("{u}@virtual.example {inbox}\n{u}@lmtp.example {inbox}\n")
        });
        fs::write(conf.join("boxes"), boxes.concat())?;
        // local(8) writes to files with the rights of the table's owner.
        let aliases = dir.join("aliases");
        fs::write(&aliases, USERS.map(|u| format!("{u} {}/{}\n", root.display(), store.inbox(u))).concat())?;
        chown(&aliases, UID, GID)?;
        let mut command = Command::new(MASTER);
        command.arg("-c").arg(&conf).arg("-d");
        let mut process = Process::start(cluster, "postfix", dir, command)?;
        process.ready(smtp)?;
        Ok(Self { process, dir: dir.to_owned(), queue: queue.to_owned(), smtp })
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("postfix.log")).unwrap_or_default() + &self.process.output()
    }

    /// Lines of the log that tell of something wrong.
    pub fn faults(&self) -> Vec<String> {
        self.log().lines().filter(|l| FAULTS.iter().any(|f| l.contains(f))).map(str::to_owned).collect()
    }

    /// Messages that it has accepted and not delivered, as they are in its queue. What it was about to accept when it was
    /// killed stays in `incoming` and is not executable, which is how Postfix marks what is complete: it delivers only that.
    pub fn waiting(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for q in QUEUES {
            files_below(&self.queue.join(q), &mut found);
        }
        let incoming = self.queue.join("incoming");
        found.retain(|f| {
            !f.starts_with(&incoming) || fs::metadata(f).is_ok_and(|m| m.permissions().mode() & 0o100 != 0)
        });
        found
    }

    /// The Message-IDs of these.
    pub fn waiting_ids(&self) -> io::Result<BTreeSet<String>> {
        let mut ids = BTreeSet::new();
        for file in self.waiting() {
            let text = fs::read(file)?;
            let text = String::from_utf8_lossy(&text);
            let id = text.split_once("Message-ID: ").and_then(|(_, rest)| rest.split_inclusive('>').next());
            ids.extend(id.map(str::to_owned));
        }
        Ok(ids)
    }

    /// What the log has so far counts no longer.
    pub fn forget_log(&self) -> io::Result<()> {
        let log = self.dir.join("postfix.log");
        fs::rename(&log, log.with_extension("log.before"))
    }

    /// Waits until all that was accepted has been delivered.
    pub fn drained(&self, time: Duration) -> Result<()> {
        let deadline = Instant::now() + time;
        while !self.waiting().is_empty() {
            if Instant::now() > deadline {
                return Err(format!("messages remain in the queue: {:?}\n{}", self.waiting(), self.log()).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    pub fn stop(&mut self) {
        self.process.stop();
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }
}

/// A file that vanishes meanwhile was delivered.
fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(t) if t.is_dir() => files_below(&entry.path(), found),
            Ok(_) => found.push(entry.path()),
            Err(_) => {}
        }
    }
}

fn main_cf(node: usize, dir: &Path, queue: &Path, root: &Path, settings: &str, lmtp: SocketAddr) -> String {
    format!(
        "compatibility_level = 3.6
queue_directory = {queue}
data_directory = {dir}/data
maillog_file = {dir}/postfix.log
maillog_file_prefixes = {dir}
myhostname = node{node}.example
mydestination = {BY_LOCAL}
inet_interfaces = loopback-only
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_peername_lookup = no
lmtp_dns_support_level = disabled
alias_maps = texthash:{dir}/aliases
alias_database =
local_recipient_maps =
virtual_mailbox_domains = {BY_VIRTUAL}, {BY_LMTP}
virtual_mailbox_base = {root}
virtual_mailbox_maps = texthash:{dir}/conf/boxes
virtual_mailbox_limit = 0
mailbox_size_limit = 0
virtual_minimum_uid = 1
virtual_uid_maps = static:{UID}
virtual_gid_maps = static:{GID}
transport_maps = inline:{{ {{ {BY_LMTP} = lmtp:inet:[{ip}]:{port} }} }}
minimal_backoff_time = 1s
maximal_backoff_time = 2s
queue_run_delay = 1s
{settings}
",
        queue = queue.display(),
        dir = dir.display(),
        root = root.display(),
        ip = lmtp.ip(),
        port = lmtp.port(),
    )
}

/// Nothing in a chroot: its sockets and tables are the test's own.
fn master_cf(smtp: SocketAddr) -> String {
    const SERVICES: &str = "cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
local unix - n n - - local
virtual unix - n n - - virtual
lmtp unix - - n - - lmtp
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
";
    format!("{smtp} inet n - n - - smtpd\n{SERVICES}")
}

/// What `postfix check` makes, which takes seconds for it.
fn make_queue(queue: &Path) -> Result<()> {
    let (user, _) = id(c"postfix")?;
    let drop_group = group(c"postdrop")?;
    let make = |name: &str, mode: u32, uid: u32, gid: u32| -> io::Result<()> {
        let dir = queue.join(name);
        fs::create_dir_all(&dir)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(mode))?;
        chown(&dir, uid, gid)
    };
    for name in PRIVATE.into_iter().chain(QUEUES) {
        make(name, 0o700, user, 0)?;
    }
    make("maildrop", 0o730, user, drop_group)?;
    make("public", 0o710, user, drop_group)?;
    make("pid", 0o755, 0, 0)?;
    Ok(())
}

/// A system user's number and its group's.
fn id(name: &std::ffi::CStr) -> Result<(u32, u32)> {
    // SAFETY: a C string; the record is read before anything else in this process asks for one (tests do not otherwise).
    unsafe {
        let found = libc::getpwnam(name.as_ptr());
        if found.is_null() { Err(no_such("user", name)) } else { Ok(((*found).pw_uid, (*found).pw_gid)) }
    }
}

fn group(name: &std::ffi::CStr) -> Result<u32> {
    // SAFETY: as above.
    unsafe {
        let found = libc::getgrnam(name.as_ptr());
        if found.is_null() { Err(no_such("group", name)) } else { Ok((*found).gr_gid) }
    }
}

fn no_such(kind: &str, name: &std::ffi::CStr) -> crate::cluster::Error {
    format!(
        "there is no {kind} {}: run `cargo xtask setup`, which installs postfix",
        CString::from(name).to_string_lossy()
    )
    .into()
}

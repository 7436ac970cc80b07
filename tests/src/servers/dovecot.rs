//! A node's own Dovecot: LMTP, IMAP and POP3.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::accounts::{GID, Store, UID};
use super::process::{Process, address, free_ports, installed};
use crate::cluster::{Cluster, Result};

const PROGRAM: &str = "/usr/sbin/dovecot";
/// One file for each protocol's package.
const PARTS: [&str; 3] = ["/usr/lib/dovecot/imap", "/usr/lib/dovecot/lmtp", "/usr/lib/dovecot/pop3"];
/// What a log must not have.
const FAULTS: [&str; 5] = ["Error:", "Panic:", "Fatal:", "Warning:", "orrupt"];

/// How it takes note of being stopped.
const STOPPED: &str = "Warning: Killed with signal 15";

pub struct Dovecot {
    process: Process,
    log: PathBuf,
    pub imap: SocketAddr,
    pub lmtp: SocketAddr,
    pub pop3: SocketAddr,
}

/// Set in the environment: more lines of dovecot.conf, to try them out.
const MORE: &str = "CLUSTERFS_DOVECOT";

impl Dovecot {
    /// `settings` are lines of dovecot.conf that are to be tested, behind the few that every site needs.
    pub fn start(cluster: &Cluster, node: usize, dir: &Path, store: Store, settings: &str) -> Result<Self> {
        installed(PROGRAM)?;
        for part in PARTS {
            installed(part)?;
        }
        fs::create_dir_all(dir)?;
        let at = address(node);
        let [imap, lmtp, pop3] = free_ports(at)?;
        let log = dir.join("dovecot.log");
        let config = dir.join("dovecot.conf");
        let text = format!(
            "instance_name = node{node}
base_dir = {dir}/run
state_dir = {dir}/state
log_path = {log}
protocols = imap lmtp pop3
listen = {at}
ssl = no
disable_plaintext_auth = no
auth_username_format = %n
first_valid_uid = 1
passdb {{
  driver = static
  args = nopassword=y
}}
userdb {{
  driver = static
  args = uid={UID} gid={GID} home={root}/home/%n allow_all_users=yes
}}
{imap}{pop3}{lmtp}mail_location = {location}
{settings}
{more}
",
            more = std::env::var(MORE).unwrap_or_default(),
            dir = dir.display(),
            log = log.display(),
            root = cluster.mount_point(node).display(),
            imap = listener("imap-login", "imap", imap),
            pop3 = listener("pop3-login", "pop3", pop3),
            lmtp = listener("lmtp", "lmtp", lmtp),
            location = store.location(),
        );
        fs::write(&config, text)?;
        let mut command = Command::new(PROGRAM);
        command.arg("-F").arg("-c").arg(&config);
        let mut process = Process::start(cluster, "dovecot", dir, command)?;
        process.ready(imap)?;
        process.ready(lmtp)?;
        Ok(Self { process, log, imap, lmtp, pop3 })
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default() + &self.process.output()
    }

    /// Lines of the log that tell of something wrong.
    pub fn faults(&self) -> Vec<String> {
        let fault = |l: &&str| FAULTS.iter().any(|f| l.contains(f)) && !l.contains(STOPPED);
        self.log().lines().filter(fault).map(str::to_owned).collect()
    }

    /// What the log has so far counts no longer.
    pub fn forget_log(&self) -> io::Result<()> {
        fs::rename(&self.log, self.log.with_extension("log.before"))
    }

    pub fn stop(&mut self) {
        self.process.stop();
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }
}

/// The service and nothing but the one port.
fn listener(service: &str, name: &str, at: SocketAddr) -> String {
    let secure =
        if name == "lmtp" { String::new() } else { format!("  inet_listener {name}s {{\n    port = 0\n  }}\n") };
    let port = at.port();
    format!("service {service} {{\n  inet_listener {name} {{\n    port = {port}\n  }}\n{secure}}}\n")
}

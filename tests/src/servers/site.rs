//! A mail site: a cluster whose nodes all run mail servers on the one volume.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use parking_lot::Mutex;

use super::accounts::{Store, USERS, home, make_homes};
use super::dovecot::Dovecot;
use super::imap::Imap;
use super::pop3::Pop3;
use super::postfix::Postfix;
use super::smtp::Smtp;
use super::traffic::ARCHIVE;
use crate::cluster::{Cluster, Result};

/// Until a queue is empty: deferred messages are tried again every second or two, but a lock file that a dead process left may stand
/// in their way for two minutes.
const DRAIN: Duration = Duration::from_secs(180);

/// Set in the environment: the same servers on one directory of the local filesystem, to tell their faults from ours.
const LOCAL: &str = "CLUSTERFS_LOCAL";

/// Dovecot locks a UID list for milliseconds, and for as long as it waits for a dead node's recovery.
const STALE: Duration = Duration::from_secs(5);

/// Where a node's Postfix keeps its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// On the node's own disk.
    Local,
    /// On the volume, in a directory of the node's own.
    Volume,
}

/// What a site tries out.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub store: Store,
    pub queue: Queue,
    /// Lines of dovecot.conf.
    pub dovecot: &'static str,
    /// Lines of main.cf.
    pub postfix: &'static str,
}

struct Servers {
    postfix: Postfix,
    dovecot: Dovecot,
}

impl Servers {
    fn faults(&self) -> Vec<String> {
        self.dovecot.faults().into_iter().chain(self.postfix.faults()).collect()
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("faults of a node's servers:\n{}", self.faults().join("\n"));
        }
    }
}

/// Fields are dropped in order: servers end before the mounts that they use.
pub struct Site {
    servers: Vec<Mutex<Option<Servers>>>,
    pub cluster: Cluster,
    settings: Settings,
}

impl Site {
    /// For a test: a fresh volume and servers on `nodes` nodes.
    pub fn start(nodes: usize, settings: Settings) -> Self {
        let cluster = match std::env::var_os(LOCAL) {
            None => Cluster::start(nodes),
            Some(_) => Cluster::local(nodes).unwrap_or_else(|e| panic!("{e}")),
        };
        Self::serve(cluster, nodes, settings).unwrap_or_else(|e| panic!("{e}"))
    }

    fn serve(cluster: Cluster, nodes: usize, settings: Settings) -> Result<Self> {
        make_homes(&cluster.mount_point(0))?;
        let mut site = Self { servers: Vec::new(), cluster, settings };
        for node in 0..nodes {
            site.servers.push(Mutex::new(None));
            site.start_servers(node)?;
        }
        Ok(site)
    }

    pub fn store(&self) -> Store {
        self.settings.store
    }

    pub fn nodes(&self) -> usize {
        self.servers.len()
    }

    fn dir(&self, node: usize, name: &str) -> PathBuf {
        self.cluster.path().join(format!("{name}{node}"))
    }

    /// On a node that is mounted.
    pub fn start_servers(&self, node: usize) -> Result<()> {
        let s = self.settings;
        let dovecot = Dovecot::start(&self.cluster, node, &self.dir(node, "dovecot"), s.store, s.dovecot)?;
        let queue = match s.queue {
            Queue::Local => self.dir(node, "queue"),
            Queue::Volume => self.cluster.mount_point(node).join("queue").join(format!("node{node}")),
        };
        let dir = self.dir(node, "postfix");
        let postfix = Postfix::start(&self.cluster, node, &dir, &queue, s.store, s.postfix, dovecot.lmtp)?;
        *self.servers[node].lock() = Some(Servers { postfix, dovecot });
        Ok(())
    }

    /// As with their host. Returns the Message-IDs of what its Postfix had accepted and not seen through: these may be delivered
    /// again.
    pub fn kill_servers(&self, node: usize) -> io::Result<BTreeSet<String>> {
        let Some(mut s) = self.servers[node].lock().take() else { return Ok(BTreeSet::new()) };
        s.postfix.kill();
        s.dovecot.kill();
        s.postfix.forget_log()?;
        s.dovecot.forget_log()?;
        s.postfix.waiting_ids()
    }

    /// What an administrator may do after a death: removes lock files of maildirs' UID lists that are older than any live process
    /// keeps one. Dovecot itself takes them over two minutes after they were made.
    pub fn remove_stale_locks(&self, node: usize) -> io::Result<()> {
        for user in USERS {
            let inbox = home(&self.cluster.mount_point(node), user).join("Maildir");
            for mailbox in [inbox.join(format!(".{ARCHIVE}")), inbox] {
                let lock = mailbox.join("dovecot-uidlist.lock");
                let age = match fs::metadata(&lock) {
                    Ok(found) => found.modified()?.elapsed().unwrap_or_default(),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(e),
                };
                if age > STALE {
                    println!("removing {} after {age:.1?}", lock.display());
                    fs::remove_file(&lock)?;
                }
            }
        }
        Ok(())
    }

    /// What `of` says of a node's servers.
    fn ask<T>(&self, node: usize, of: impl FnOnce(&Servers) -> T) -> io::Result<T> {
        let servers = self.servers[node].lock();
        servers.as_ref().map(of).ok_or_else(|| io::Error::other(format!("no servers run on node {node}")))
    }

    pub fn smtp(&self, node: usize) -> io::Result<Smtp> {
        Smtp::connect(self.ask(node, |s| s.postfix.smtp)?)
    }

    pub fn lmtp(&self, node: usize) -> io::Result<Smtp> {
        Smtp::connect_lmtp(self.ask(node, |s| s.dovecot.lmtp)?)
    }

    pub fn imap(&self, node: usize, user: &str) -> io::Result<Imap> {
        Imap::login(self.ask(node, |s| s.dovecot.imap)?, user)
    }

    pub fn pop3(&self, node: usize, user: &str) -> io::Result<Pop3> {
        Pop3::login(self.ask(node, |s| s.dovecot.pop3)?, user)
    }

    /// Waits until all servers have delivered all they accepted.
    ///
    /// # Panics
    /// If that takes too long.
    pub fn drain(&self) {
        for node in 0..self.nodes() {
            let drained = self.ask(node, |s| s.postfix.drained(DRAIN));
            drained.unwrap_or_else(|e| panic!("{e}")).unwrap_or_else(|e| panic!("node {node}: {e}"));
        }
    }

    /// Lines of the servers' logs that tell of something wrong.
    pub fn faults(&self) -> Vec<String> {
        let mut all = Vec::new();
        for (node, servers) in self.servers.iter().enumerate() {
            let lines = servers.lock().iter().flat_map(Servers::faults).collect::<Vec<_>>();
            all.extend(lines.into_iter().map(|l| format!("node {node}: {l}")));
        }
        all
    }

    /// The end of a test that went well: no server complained, all nodes unmount, the volume has no error.
    ///
    /// # Panics
    /// If not.
    pub fn finish(mut self) {
        for s in self.servers.iter_mut().filter_map(|s| s.get_mut().as_mut()) {
            s.postfix.stop();
            s.dovecot.stop();
        }
        let faults = self.faults();
        assert!(faults.is_empty(), "the servers complain:\n{}", faults.join("\n"));
        self.servers.clear();
        self.cluster.finish();
    }
}

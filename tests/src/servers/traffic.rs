//! Mail traffic on all nodes of a site, and the account of it: what was accepted, what clients did, what must be there in the end.
//!
//! Every message has a fate, by its Message-ID: to stay, to be moved to Archive or to be expunged, by a client on a node that
//! follows from it too. Those that stay get flags from clients on all nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::accounts::{Store, USERS, home};
use super::imap::Imap;
use super::postfix::ROUTES;
use super::site::Site;
use crate::mail::{Mailer, verify};

pub const ARCHIVE: &str = "Archive";
const BOXES: [&str; 2] = ["INBOX", ARCHIVE];
const IDLE: Duration = Duration::from_millis(500);

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct Mail {
    pub seed: u64,
    /// Recipients' domains, in turn.
    pub routes: &'static [&'static str],
    /// Bytes of a body.
    pub largest: usize,
    /// From the answer to a message until the next one is sent.
    pub pause: Duration,
}

impl Mail {
    /// By all routes.
    pub fn usual(seed: u64) -> Self {
        Self { seed, routes: &ROUTES, largest: 50 << 10, pause: Duration::from_millis(30) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stay,
    Move,
    Expunge,
}

/// And the node whose client does it.
fn fate(id: &str, nodes: usize) -> (Fate, usize) {
    let [kind, node, ..] = *blake3::hash(id.as_bytes()).as_bytes();
    let fate = match kind % 5 {
        0 => Fate::Move,
        1 => Fate::Expunge,
        _ => Fate::Stay,
    };
    (fate, usize::from(node) % nodes)
}

struct Accepted {
    user: &'static str,
    /// The next UID of the mailbox before the message was sent, as some client was told: its own is not smaller.
    floor: u32,
}

#[derive(Default)]
struct Account {
    accepted: BTreeMap<String, Accepted>,
    expunged: BTreeSet<String>,
    /// Moves and expunges that were begun and not answered (any more).
    begun: BTreeSet<String>,
    flagged: BTreeMap<String, BTreeSet<String>>,
    /// What a node did that Dovecot does not sync (`mail_fsync = optimized`), and that no other node has seen: its death may undo it.
    unseen: BTreeMap<usize, Unseen>,
    /// Moves and expunges that a node's death has undone perhaps.
    undone: BTreeSet<String>,
    /// Messages whose flag \Deleted was gone when it was time to expunge them.
    undeleted: Vec<String>,
    /// What each UID meant whenever a client saw it: (user, mailbox, UIDVALIDITY, UID).
    meant: BTreeMap<(&'static str, &'static str, u32, u32), String>,
    uid_next: BTreeMap<&'static str, u32>,
}

#[derive(Default)]
struct Unseen {
    /// (Message-ID, flag).
    flags: BTreeSet<(String, String)>,
    /// Messages that were expunged from an INBOX, or moved away: (user, UID).
    gone: BTreeMap<String, (&'static str, u32)>,
}

impl Account {
    fn flag(&mut self, node: usize, id: &str, flags: impl IntoIterator<Item = String>) {
        let given = self.flagged.entry(id.to_owned()).or_default();
        for f in flags {
            if given.insert(f.clone()) {
                self.unseen.entry(node).or_default().flags.insert((id.to_owned(), f));
            }
        }
    }

    fn gone(&mut self, node: usize, user: &'static str, uid: u32, id: &str) {
        self.unseen.entry(node).or_default().gone.insert(id.to_owned(), (user, uid));
    }

    /// A node shows a user's INBOX, all that was in it when it was selected and still is. What another node did to it is durable
    /// once it is seen.
    fn shown(&mut self, node: usize, user: &str, uid_next: u32, messages: &BTreeMap<String, BTreeSet<String>>) {
        for (_, unseen) in self.unseen.iter_mut().filter(|(n, _)| **n != node) {
            unseen.flags.retain(|(id, flag)| !messages.get(id).is_some_and(|flags| flags.contains(flag)));
            unseen.gone.retain(|id, (whose, uid)| *whose != user || *uid >= uid_next || messages.contains_key(id));
        }
    }
}

/// Keeps the account while traffic runs.
#[derive(Default)]
pub struct Ledger {
    account: Mutex<Account>,
}

/// A mailbox as a client sees it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    uid_validity: u32,
    /// Message-ID and flags by UID.
    messages: BTreeMap<u32, (String, BTreeSet<String>)>,
}

/// The account of flags: how many were given, and which of them are not there.
#[derive(Default)]
struct Flags {
    given: usize,
    lost: Vec<String>,
}

/// How the traffic ends for a node that may go away.
pub type Outcome = io::Result<()>;

impl Ledger {
    /// The folders that clients move messages to.
    pub fn make_folders(&self, site: &Site) -> io::Result<()> {
        USERS.iter().try_for_each(|user| site.imap(0, user)?.create(ARCHIVE))
    }

    /// Sends through a node's Postfix to all users in turn, until told to stop.
    pub fn send(&self, site: &Site, node: usize, mail: Mail, stop: &AtomicBool) -> Outcome {
        let mut smtp = site.smtp(node)?;
        for (i, m) in Mailer::new(mail.seed).largest(mail.largest).without_from_lines().enumerate() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let user = USERS[(i + mail.seed as usize) % USERS.len()];
            let floor = self.account.lock().uid_next.get(user).copied().unwrap_or(1);
            smtp.send(&m, &format!("{user}@{}", mail.routes[i % mail.routes.len()]))?;
            self.account.lock().accepted.insert(m.id, Accepted { user, floor });
            std::thread::sleep(mail.pause);
        }
        Ok(())
    }

    /// A client of all mailboxes on a node, until told to stop: brings its share of messages to their fates.
    pub fn work(&self, site: &Site, node: usize, stop: &AtomicBool) -> Outcome {
        let mut clients: Vec<Imap> = USERS.iter().map(|u| site.imap(node, u)).collect::<io::Result<_>>()?;
        while !stop.load(Ordering::Relaxed) {
            for (user, client) in USERS.into_iter().zip(&mut clients) {
                self.visit(client, user, node, site.nodes())?;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn visit(&self, client: &mut Imap, user: &'static str, node: usize, nodes: usize) -> Outcome {
        let selected = client.select("INBOX")?;
        let fetched = client.fetch_ids()?;
        let ids = fetched.iter().map(|f| Ok((header_id(&f.bytes)?, f.flags.clone()))).collect::<io::Result<_>>()?;
        self.account.lock().shown(node, user, selected.uid_next, &ids);
        for f in &fetched {
            let id = header_id(&f.bytes)?;
            self.saw(user, "INBOX", selected.uid_validity, f.uid, &id);
            let (fate, whose) = fate(&id, nodes);
            let own_flag = format!("node{node}");
            match fate {
                Fate::Stay if !f.flags.contains(&own_flag) => {
                    client.add_flags(f.uid, &format!("\\Seen {own_flag}"))?;
                    self.account.lock().flag(node, &id, ["\\Seen".to_owned(), own_flag]);
                }
                Fate::Move if whose == node => {
                    self.account.lock().begun.insert(id.clone());
                    client.move_to(f.uid, ARCHIVE)?;
                    let mut a = self.account.lock();
                    a.begun.remove(&id);
                    a.gone(node, user, f.uid, &id);
                }
                Fate::Expunge if whose == node => {
                    self.account.lock().begun.insert(id.clone());
                    let gone = client.expunge(f.uid)?;
                    let mut a = self.account.lock();
                    a.begun.remove(&id);
                    if gone {
                        a.gone(node, user, f.uid, &id);
                        a.expunged.insert(id);
                    } else {
                        a.undeleted.push(id);
                    }
                }
                _ => {}
            }
        }
        let mut a = self.account.lock();
        let next = a.uid_next.entry(user).or_default();
        *next = selected.uid_next.max(*next);
        Ok(())
    }

    /// A client of a mailbox that waits for news, until told to stop.
    pub fn idle(&self, site: &Site, node: usize, user: &'static str, stop: &AtomicBool) -> Outcome {
        let mut client = site.imap(node, user)?;
        client.select("INBOX")?;
        while !stop.load(Ordering::Relaxed) {
            client.idle_until(u32::MAX, IDLE)?;
        }
        Ok(())
    }

    /// # Panics
    /// If the UID meant another message before, on any node.
    fn saw(&self, user: &'static str, mailbox: &'static str, uid_validity: u32, uid: u32, id: &str) {
        let mut a = self.account.lock();
        let meant = a.meant.entry((user, mailbox, uid_validity, uid)).or_insert_with(|| id.to_owned());
        assert_eq!(meant, id, "{user}'s {mailbox}: UID {uid} has changed its meaning");
    }

    /// One of so many nodes has died, its clients have ended.
    pub fn died(&self, node: usize, nodes: usize) {
        let mut a = self.account.lock();
        let unseen = a.unseen.remove(&node).unwrap_or_default();
        println!("{} flags and {} expunges and moves may be undone", unseen.flags.len(), unseen.gone.len());
        for (id, flag) in unseen.flags {
            if let Some(given) = a.flagged.get_mut(&id) {
                given.remove(&flag);
            }
        }
        let begun: Vec<String> = a.begun.extract_if(.., |id| fate(id, nodes).1 == node).collect();
        for id in begun.into_iter().chain(unseen.gone.into_keys()) {
            a.expunged.remove(&id);
            a.undone.insert(id);
        }
    }

    pub fn accepted(&self) -> usize {
        self.account.lock().accepted.len()
    }

    fn read(&self, site: &Site, node: usize, user: &'static str, mailbox: &'static str) -> io::Result<Seen> {
        let mut client = site.imap(node, user)?;
        let selected = client.select(mailbox)?;
        let mut messages = BTreeMap::new();
        for f in client.fetch_all()? {
            let id =
                verify(&f.bytes).unwrap_or_else(|bad| panic!("node {node}: {user}'s {mailbox}, UID {}: {bad}", f.uid));
            assert!(f.uid < selected.uid_next, "node {node}: {user}'s {mailbox}: UID {} is not below UIDNEXT", f.uid);
            self.saw(user, mailbox, selected.uid_validity, f.uid, &id);
            let twice = messages.insert(f.uid, (id, f.flags));
            assert!(twice.is_none(), "node {node}: {user}'s {mailbox}: UID {} is there twice", f.uid);
        }
        assert_eq!(messages.len(), selected.exists as usize, "node {node}: {user}'s {mailbox}");
        Ok(Seen { uid_validity: selected.uid_validity, messages })
    }

    /// After the traffic, all queues being empty: every node shows the same, and all that was accepted is there exactly once, whole
    /// and with its flags, unless it was expunged. `maybe_twice`: messages whose delivery was interrupted, which mail protocols
    /// allow to be done again.
    ///
    /// # Panics
    /// If not.
    pub fn check(&self, site: &Site, maybe_twice: &BTreeSet<String>) {
        let mut flags = Flags::default();
        for user in USERS {
            let mut found: BTreeMap<String, usize> = BTreeMap::new();
            // Of two copies of a message only the one that was there before has them.
            let mut flagged: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
            for mailbox in BOXES {
                let read = |node| {
                    self.read(site, node, user, mailbox)
                        .unwrap_or_else(|e| panic!("node {node}: {user}'s {mailbox}: {e}"))
                };
                let first = read(0);
                for node in 1..site.nodes() {
                    assert_eq!(first, read(node), "{user}'s {mailbox} on node 0 and node {node}");
                }
                for (uid, (id, has)) in first.messages {
                    self.check_one(user, mailbox, uid, &id);
                    flagged.entry(id.clone()).or_default().extend(has);
                    *found.entry(id).or_default() += 1;
                }
            }
            self.check_counts(site, user, &found, maybe_twice);
            flagged.iter().for_each(|(id, has)| self.count_flags(&mut flags, user, id, has));
            check_pop3(site, user).unwrap_or_else(|e| panic!("{user}: POP3: {e}"));
        }
        flags.lost.extend(self.account.lock().undeleted.iter().map(|id| format!("{id} was to be deleted and was not")));
        println!("{} flags given, {} lost", flags.given, flags.lost.len());
        // Dovecot itself loses flags of an mbox that two processes change, on a local filesystem too.
        assert!(site.store() == Store::Mbox || flags.lost.is_empty(), "{:?}", flags.lost);
    }

    fn check_counts(&self, site: &Site, user: &str, found: &BTreeMap<String, usize>, maybe_twice: &BTreeSet<String>) {
        let (a, nodes) = (self.account.lock(), site.nodes());
        let begun =
            |id: &String, what: Fate| (a.begun.contains(id) || a.undone.contains(id)) && fate(id, nodes).0 == what;
        let here = a.accepted.iter().filter(|(_, m)| m.user == user).map(|(id, _)| id);
        let gone = |id: &&String| a.expunged.contains(*id) || begun(id, Fate::Expunge);
        let lost: Vec<_> = here.filter(|id| !found.contains_key(*id) && !gone(id)).collect();
        let mail = home(&site.cluster.mount_point(0), user);
        let traces: Vec<_> = lost.iter().map(|id| (id, files_with(&mail, id))).collect();
        assert!(lost.is_empty(), "{user}: accepted and neither there nor expunged, but in these files: {traces:?}");
        for (id, n) in found {
            let again = maybe_twice.contains(id) || begun(id, Fate::Move);
            assert!(*n == 1 || again, "{user}: {id} is there {n} times");
            assert!(!a.expunged.contains(id) || again, "{user}: {id} was expunged and is there");
        }
    }

    fn check_one(&self, user: &str, mailbox: &str, uid: u32, id: &str) {
        let a = self.account.lock();
        let Some(m) = a.accepted.get(id) else { return };
        assert_eq!(m.user, user, "{id} is in the wrong mailbox");
        if mailbox == "INBOX" {
            assert!(uid >= m.floor, "{user}: {id} came later than UID {} and has UID {uid}", m.floor - 1);
        }
    }

    fn count_flags(&self, flags: &mut Flags, user: &str, id: &str, has: &BTreeSet<String>) {
        for given in self.account.lock().flagged.get(id).into_iter().flatten() {
            flags.given += 1;
            if !has.contains(given) {
                flags.lost.push(format!("{user}: {id} has {has:?} and was given {given}"));
            }
        }
    }
}

/// Where a message is that no server shows: in `tmp`, in an index, or nowhere.
fn files_with(dir: &Path, id: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()) {
        if path.is_dir() {
            found.append(&mut files_with(&path, id));
        } else if std::fs::read(&path).is_ok_and(|bytes| bytes.windows(id.len()).any(|w| w == id.as_bytes())) {
            found.push(path);
        }
    }
    found
}

/// The same unique ids on all nodes, the first and the last message whole on each.
fn check_pop3(site: &Site, user: &str) -> io::Result<()> {
    let mut all = Vec::new();
    for node in 0..site.nodes() {
        let mut client = site.pop3(node, user)?;
        let ids = client.unique_ids()?;
        for number in ids.keys().next().into_iter().chain(ids.keys().next_back()) {
            verify(&client.retrieve(*number)?)
                .unwrap_or_else(|bad| panic!("node {node}: {user}, message {number}: {bad}"));
        }
        client.quit()?;
        all.push(ids);
    }
    assert!(all.windows(2).all(|w| w[0] == w[1]), "{user}: unique ids differ between nodes: {all:?}");
    Ok(())
}

fn header_id(bytes: &[u8]) -> io::Result<String> {
    let text = String::from_utf8_lossy(bytes);
    let id = text.lines().find_map(|l| l.strip_prefix("Message-ID: "));
    id.map(str::to_owned).ok_or_else(|| super::line::unexpected(format!("no Message-ID: {text}")))
}

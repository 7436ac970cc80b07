//! Mail as a mail server handles it: messages made from a seed, delivery into maildirs and mboxes exactly as delivery
//! agents do it, and readers that know whether a message is whole.
//!
//! Every message carries a checksum of its Message-ID and body in a header, so a reader on another node or after a crash
//! needs nothing but the file to tell whether anything is lost, mixed up or invented.
//!
//! Maildir as in D. J. Bernstein's description (tmp, fsync, rename or link to new, fsync of the directory); mbox in the
//! "mboxrd" form of qmail's mbox(5), where quoting of From_ lines can be undone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const SUM_HEADER: &str = "X-Clusterfs-Sum: ";
/// 2026-01-01, so that dates depend on the seed's sequence only.
const EPOCH: u64 = 1_767_225_600;

const WORDS: &[&str] = &[
    "the", "invoice", "meeting", "Tuesday", "attached", "please", "regards", "server", "backup", "we", "agreed",
    "that", "delivery", "will", "arrive", "after", "lunch", "Grüße", "aus", "Köln", "contract", "number", "project",
    "and", "of", "to", "in", "for", "with", "thanks", "again", "report", "quarter", "budget", "draft", "review",
    "ship", "tomorrow",
];
const PEOPLE: &[&str] = &["anna", "ben", "carla", "deniz", "emil", "farid", "greta", "hugo", "ines", "jonas"];

/// A message as it is stored: LF line ends, headers first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// With angle brackets, unique per seed.
    pub id: String,
    pub from: String,
    pub bytes: Vec<u8>,
}

/// Makes messages; the same seed gives the same ones.
pub struct Mailer {
    rng: StdRng,
    seed: u64,
    next: u64,
    largest: usize,
    from_lines: bool,
}

impl Mailer {
    pub fn new(seed: u64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), seed, next: 0, largest: 8 << 20, from_lines: true }
    }

    /// No body is larger than this many bytes.
    pub fn largest(mut self, bytes: usize) -> Self {
        self.largest = bytes.max(64);
        self
    }

    /// No line starts with From: not every server quotes those in a way that can be undone.
    pub fn without_from_lines(mut self) -> Self {
        self.from_lines = false;
        self
    }

    /// Most messages are a few KiB of text; some are long newsletters, few carry attachments of up to some MiB.
    fn body_size(&mut self) -> (usize, bool) {
        let r = &mut self.rng;
        let (size, attachment) = match r.random_range(0..100) {
            0..52 => (r.random_range(1_500..10_000), false),
            52..78 => (r.random_range(10_000..40_000), false),
            78..92 => (r.random_range(40_000..100_000), false),
            92..98 => (r.random_range(100_000..1_000_000), true),
            _ => (r.random_range(1_000_000..6_000_000), true),
        };
        (size.min(self.largest), attachment && size < self.largest)
    }

    fn person(&mut self) -> &'static str {
        PEOPLE[self.rng.random_range(0..PEOPLE.len())]
    }

    fn text(&mut self, out: &mut Vec<u8>, bytes: usize) {
        let end = out.len() + bytes;
        let mut column = 0;
        while out.len() < end {
            let word = WORDS[self.rng.random_range(0..WORDS.len())];
            if column > 66 {
                out.push(b'\n');
                column = 0;
                // Lines that an mbox must quote.
                match self.rng.random_range(0..60) {
                    0 if self.from_lines => out.extend_from_slice(b"From "),
                    1 if self.from_lines => out.extend_from_slice(b">From "),
                    _ => {}
                }
            } else if column > 0 {
                out.push(b' ');
            }
            out.extend_from_slice(word.as_bytes());
            column += word.len() + 1;
        }
        out.push(b'\n');
    }

    fn base64(&mut self, out: &mut Vec<u8>, bytes: usize) {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        for _ in 0..bytes / 77 {
            for _ in 0..19 {
                let bits: u32 = self.rng.random();
                out.extend([0, 6, 12, 18].map(|shift| DIGITS[(bits >> shift & 63) as usize]));
            }
            out.push(b'\n');
        }
    }

    /// The next message.
    pub fn message(&mut self) -> Message {
        let n = self.next;
        self.next += 1;
        let nonce: u64 = self.rng.random();
        let id = format!("<{:x}.{n}.{nonce:016x}@mail.example>", self.seed);
        let (from, to) = (self.person(), self.person());
        let from = format!("{from}@example.org");
        let (size, attachment) = self.body_size();
        let mut body = Vec::with_capacity(size + 256);
        let boundary = format!("=_{nonce:016x}");
        if attachment {
            body.extend(format!("--{boundary}\nContent-Type: text/plain; charset=utf-8\n\n").bytes());
            self.text(&mut body, 1_000.min(size));
            let head = "Content-Type: application/pdf\nContent-Transfer-Encoding: base64\n\n";
            body.extend(format!("--{boundary}\n{head}").bytes());
            let left = size.saturating_sub(body.len());
            self.base64(&mut body, left);
            body.extend(format!("--{boundary}--\n").bytes());
        } else {
            self.text(&mut body, size);
        }
        let kind = if attachment {
            format!("multipart/mixed; boundary=\"{boundary}\"")
        } else {
            "text/plain; charset=utf-8".to_owned()
        };
        let date = rfc5322_date(EPOCH + n * 37);
        let subject = WORDS[self.rng.random_range(0..WORDS.len())];
        let mut bytes = format!(
            "Return-Path: <{from}>\nReceived: from mx.example.org by mail.example with ESMTPS id {nonce:x};\n\t{date}\n\
             Date: {date}\nFrom: {from}\nTo: {to}@mail.example\nSubject: {subject} {n}\nMessage-ID: {id}\n\
             MIME-Version: 1.0\nContent-Type: {kind}\nContent-Transfer-Encoding: 8bit\n{SUM_HEADER}{}\n\n",
            sum(&id, &body)
        )
        .into_bytes();
        bytes.extend_from_slice(&body);
        Message { id, from, bytes }
    }
}

impl Iterator for Mailer {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        Some(self.message())
    }
}

fn sum(id: &str, body: &[u8]) -> String {
    let mut h = blake3::Hasher::new();
    h.update(id.as_bytes());
    h.update(body);
    h.finalize().to_hex().to_string()
}

/// Days to civil date after H. Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn rfc5322_date(secs: u64) -> String {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    let (days, rest) = (secs / 86_400, secs % 86_400);
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let m = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * m + 2) / 5 + 1;
    let month = if m < 10 { m + 2 } else { m - 10 } as usize;
    let year = year_of_era + era * 400 + u64::from(month < 2);
    let (h, min, s) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{}, {day} {} {year} {h:02}:{min:02}:{s:02} +0000", DAYS[(days % 7) as usize], MONTHS[month])
}

/// What is wrong with a message that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bad {
    NoHeaders,
    NoId,
    /// Headers are there, the body is not the one that was sent: truncated, mixed or holding zeros.
    Body {
        id: String,
        len: usize,
    },
}

impl std::fmt::Display for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoHeaders => write!(f, "not a message"),
            Self::NoId => write!(f, "a message without Message-ID or checksum"),
            Self::Body { id, len } => write!(f, "the body of {id} ({len} bytes) is not what was sent"),
        }
    }
}

impl std::error::Error for Bad {}

/// The Message-ID of a message that is exactly what was sent.
pub fn verify(bytes: &[u8]) -> Result<String, Bad> {
    let end = bytes.windows(2).position(|w| w == b"\n\n").ok_or(Bad::NoHeaders)?;
    let headers = std::str::from_utf8(&bytes[..end]).map_err(|_| Bad::NoHeaders)?;
    let header = |name: &str| headers.lines().find_map(|l| l.strip_prefix(name)).map(str::to_owned);
    let id = header("Message-ID: ").ok_or(Bad::NoId)?;
    let expected = header(SUM_HEADER).ok_or(Bad::NoId)?;
    let body = &bytes[end + 2..];
    if sum(&id, body) != expected {
        return Err(Bad::Body { id, len: body.len() });
    }
    Ok(id)
}

fn invalid(path: &Path, bad: Bad) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{}: {bad}", path.display()))
}

/// How a message gets its name in `new`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MoveBy {
    Rename,
    /// link, then unlink: never overwrites.
    Link,
}

pub fn make_maildir(root: &Path) -> io::Result<()> {
    fs::create_dir_all(root)?;
    for sub in ["tmp", "new", "cur"] {
        match fs::create_dir(root.join(sub)) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// A file name that no other delivery uses: time, process, a counter of the process.
fn unique_name(size: usize) -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("{}.M{}P{}Q{n}.mail,S={size}", now.as_secs(), now.subsec_micros(), std::process::id())
}

/// Delivers as a delivery agent does; once it returns, the message is promised to the sender.
pub fn deliver_maildir(root: &Path, message: &Message) -> io::Result<PathBuf> {
    deliver_maildir_by(root, message, MoveBy::Rename)
}

pub fn deliver_maildir_by(root: &Path, message: &Message, how: MoveBy) -> io::Result<PathBuf> {
    let name = unique_name(message.bytes.len());
    let tmp = root.join("tmp").join(&name);
    let new_dir = root.join("new");
    let new = new_dir.join(&name);
    let mut f = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&tmp)?;
    // In pieces, as it comes off the network.
    for piece in message.bytes.chunks(64 << 10) {
        f.write_all(piece)?;
    }
    f.sync_all()?;
    drop(f);
    match how {
        MoveBy::Rename => fs::rename(&tmp, &new)?,
        MoveBy::Link => {
            fs::hard_link(&tmp, &new)?;
            fs::remove_file(&tmp)?;
        }
    }
    File::open(&new_dir)?.sync_all()?;
    Ok(new)
}

/// As an IMAP server does when a client has seen a message: from `new` to `cur`, with flags.
pub fn mark_seen(path: &Path) -> io::Result<PathBuf> {
    let bad = || io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not in a maildir", path.display()));
    let root = path.parent().and_then(Path::parent).ok_or_else(bad)?;
    let name = path.file_name().and_then(|n| n.to_str()).ok_or_else(bad)?;
    let base = name.split_once(":2,").map_or(name, |(base, _)| base);
    let to = root.join("cur").join(format!("{base}:2,S"));
    fs::rename(path, &to)?;
    Ok(to)
}

/// One message of a maildir.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub path: PathBuf,
    pub id: String,
    pub len: u64,
}

/// Every message in `new` and `cur`, each verified. A message that moves or goes away meanwhile may be left out.
pub fn read_maildir(root: &Path) -> io::Result<Vec<Stored>> {
    let mut all = Vec::new();
    for sub in ["new", "cur"] {
        for entry in fs::read_dir(root.join(sub))? {
            let path = entry?.path();
            let bytes = match fs::read(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            let id = verify(&bytes).map_err(|bad| invalid(&path, bad))?;
            all.push(Stored { path, id, len: bytes.len() as u64 });
        }
    }
    all.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(all)
}

/// How writers of an mbox exclude each other; all of them must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MboxLock {
    Flock,
    /// fcntl record lock over the whole file.
    Fcntl,
    /// `path.lock`, created exclusively.
    Dotlock,
}

/// A lock that ends when it is dropped: with the file, or with the dot file.
struct Locked {
    dot: Option<PathBuf>,
}

impl Drop for Locked {
    fn drop(&mut self) {
        if let Some(p) = &self.dot
            && let Err(e) = fs::remove_file(p)
        {
            eprintln!("{}: cannot be removed: {e}", p.display());
        }
    }
}

fn lock_mbox(path: &Path, file: &File, how: MboxLock) -> io::Result<Locked> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let deadline = Instant::now() + PATIENCE;
    let mut dot = path.as_os_str().to_owned();
    dot.push(".lock");
    let dot = PathBuf::from(dot);
    loop {
        let taken = match how {
            // SAFETY: a plain system call on an open descriptor.
            MboxLock::Flock => match unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } {
                0 => Ok(None),
                _ => Err(io::Error::last_os_error()),
            },
            MboxLock::Fcntl => fcntl_lock(file).map(|()| None),
            MboxLock::Dotlock => OpenOptions::new().write(true).create_new(true).open(&dot).map(|_| Some(dot.clone())),
        };
        match taken {
            Ok(dot) => return Ok(Locked { dot }),
            Err(e) => {
                let again = matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::Interrupted);
                if !again || Instant::now() > deadline {
                    return Err(e);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

fn fcntl_lock(file: &File) -> io::Result<()> {
    // SAFETY: all-zero is a valid flock; length 0 means to the end of the file.
    let mut l: libc::flock = unsafe { std::mem::zeroed() };
    l.l_type = libc::F_WRLCK as libc::c_short;
    l.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: `l` lives through the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLKW, &raw const l) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether an mbox reader would take the line for the start of a message, once its quotes are gone.
fn looks_like_from(line: &[u8]) -> bool {
    let quotes = line.iter().take_while(|b| **b == b'>').count();
    line[quotes..].starts_with(b"From ")
}

/// Appends under the lock and makes it durable; a part that could not be finished is cut off again.
pub fn append_mbox(path: &Path, message: &Message, how: MboxLock) -> io::Result<()> {
    let mut f = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    let _lock = lock_mbox(path, &f, how)?;
    let start = f.seek(SeekFrom::End(0))?;
    let mut out = format!("From {} {}\n", message.from, rfc5322_date(EPOCH)).into_bytes();
    for line in message.bytes.split_inclusive(|b| *b == b'\n') {
        if looks_like_from(line) {
            out.push(b'>');
        }
        out.extend_from_slice(line);
    }
    out.push(b'\n');
    if let Err(e) = f.write_all(&out).and_then(|()| f.sync_all()) {
        // If this fails as well, the next reader finds the damage.
        let _ = f.set_len(start);
        return Err(e);
    }
    Ok(())
}

/// The Message-IDs of an mbox in order, each message verified.
pub fn read_mbox(path: &Path) -> io::Result<Vec<String>> {
    let (ids, bad) = read_torn_mbox(path)?;
    bad.map_or(Ok(ids), |bad| Err(invalid(path, bad)))
}

/// As [`read_mbox`], up to the first message that is not whole: after a crash that may be the one being appended, which
/// nobody was promised.
pub fn read_torn_mbox(path: &Path) -> io::Result<(Vec<String>, Option<Bad>)> {
    let bytes = fs::read(path)?;
    let mut ids = Vec::new();
    let mut message: Option<Vec<u8>> = None;
    let mut finish = |message: Option<Vec<u8>>| -> Result<(), Bad> {
        let Some(mut m) = message else { return Ok(()) };
        // The empty line that separates messages.
        if m.pop() != Some(b'\n') {
            return Err(Bad::NoHeaders);
        }
        ids.push(verify(&m)?);
        Ok(())
    };
    let mut bad = None;
    for line in bytes.split_inclusive(|b| *b == b'\n') {
        if line.starts_with(b"From ") {
            bad = finish(message.replace(Vec::new())).err();
        } else if let Some(m) = &mut message {
            let quoted = line.starts_with(b">") && looks_like_from(line);
            m.extend_from_slice(if quoted { &line[1..] } else { line });
        } else {
            bad = Some(Bad::NoHeaders);
        }
        if bad.is_some() {
            return Ok((ids, bad));
        }
    }
    let bad = finish(message).err();
    Ok((ids, bad))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_mail_and_sizes_are_realistic() {
        let one: Vec<_> = Mailer::new(7).take(300).collect();
        assert!(one == Mailer::new(7).take(300).collect::<Vec<_>>());
        assert_ne!(one[0], Mailer::new(8).message());
        let mut sizes: Vec<usize> = one.iter().map(|m| m.bytes.len()).collect();
        sizes.sort_unstable();
        assert!((2_000..20_000).contains(&sizes[150]), "median {}", sizes[150]);
        assert!(sizes[299] > 1_000_000 && sizes[0] > 1_500, "{} to {}", sizes[0], sizes[299]);
        let ids: std::collections::BTreeSet<_> = one.iter().map(|m| &m.id).collect();
        assert_eq!(ids.len(), 300);
        assert!(Mailer::new(7).largest(4096).take(300).all(|m| m.bytes.len() < 6000));
    }

    #[test]
    fn dates() {
        assert_eq!(rfc5322_date(0), "Thu, 1 Jan 1970 00:00:00 +0000");
        assert_eq!(rfc5322_date(EPOCH + 59 * 86_400 + 3_661), "Sun, 1 Mar 2026 01:01:01 +0000");
        assert_eq!(rfc5322_date(951_782_400), "Tue, 29 Feb 2000 00:00:00 +0000");
    }

    #[test]
    fn every_change_to_a_message_is_seen() {
        let m = Mailer::new(1).largest(2_000).message();
        assert_eq!(verify(&m.bytes), Ok(m.id.clone()));
        let end = m.bytes.windows(2).position(|w| w == b"\n\n").unwrap();
        for at in end + 2..m.bytes.len() {
            let mut bad = m.bytes.clone();
            bad[at] = 0;
            assert!(verify(&bad).is_err());
            assert!(verify(&m.bytes[..at]).is_err());
        }
        assert_eq!(verify(b""), Err(Bad::NoHeaders));
    }

    #[test]
    fn maildir_delivery_and_reading() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("anna");
        make_maildir(&root).unwrap();
        make_maildir(&root).unwrap();
        let mut mail = Mailer::new(3).largest(20_000);
        let mut sent = Vec::new();
        for how in [MoveBy::Rename, MoveBy::Link] {
            for _ in 0..5 {
                let m = mail.message();
                sent.push((deliver_maildir_by(&root, &m, how).unwrap(), m));
            }
        }
        let seen = mark_seen(&sent[0].0).unwrap();
        assert!(seen.ends_with("cur/".to_owned() + sent[0].0.file_name().unwrap().to_str().unwrap() + ":2,S"));
        let stored = read_maildir(&root).unwrap();
        let mut ids: Vec<_> = stored.iter().map(|s| s.id.clone()).collect();
        ids.sort();
        let mut expected: Vec<_> = sent.iter().map(|(_, m)| m.id.clone()).collect();
        expected.sort();
        assert_eq!(ids, expected);
        assert_eq!(fs::read_dir(root.join("tmp")).unwrap().count(), 0);
        fs::write(&sent[1].0, &sent[1].1.bytes[..1000]).unwrap();
        assert_eq!(read_maildir(&root).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn mbox_quoting_comes_off_and_writers_exclude_each_other() {
        let dir = tempfile::tempdir().unwrap();
        for how in [MboxLock::Flock, MboxLock::Dotlock, MboxLock::Fcntl] {
            let path = dir.path().join(format!("{how:?}"));
            // fcntl locks belong to the process: one writer here.
            let writers = if how == MboxLock::Fcntl { 1 } else { 3 };
            std::thread::scope(|s| {
                for w in 0..writers {
                    let path = &path;
                    s.spawn(move || {
                        for m in Mailer::new(w).largest(60_000).take(20) {
                            append_mbox(path, &m, how).unwrap();
                        }
                    });
                }
            });
            let text = fs::read(&path).unwrap();
            assert!(text.windows(7).any(|w| w == b"\n>From "), "something was quoted");
            let mut ids = read_mbox(&path).unwrap();
            ids.sort();
            let mut expected: Vec<_> =
                (0..writers).flat_map(|w| Mailer::new(w).largest(60_000).take(20)).map(|m| m.id).collect();
            expected.sort();
            assert_eq!(ids, expected);
            assert!(!dir.path().join(format!("{how:?}.lock")).exists());
        }
        let torn = dir.path().join("torn");
        append_mbox(&torn, &Mailer::new(9).message(), MboxLock::Flock).unwrap();
        let len = fs::metadata(&torn).unwrap().len();
        File::options().write(true).open(&torn).unwrap().set_len(len - 10).unwrap();
        assert!(read_mbox(&torn).is_err());
    }
}

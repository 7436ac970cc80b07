//! What an IMAP server does with a mailbox of many messages: list it, read messages, flag them by renaming, expunge.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::super::{Done, Scenario, Work, repeat};
use crate::cluster::Result;
use crate::mail::{Mailer, make_maildir, mark_seen};

pub const ALL: &[Scenario] = &[
    Scenario {
        name: "imap-list-cold",
        about: "a mailbox that is not in any cache is listed, with stat of each message",
        limits: "reads of the domain's tree, one after the other",
        unit: "messages",
        nodes: &[1],
        prepare: fill_cold,
        run: list,
    },
    Scenario {
        name: "imap-list-warm",
        about: "the same, listed before",
        limits: "the kernel: no request is made",
        unit: "messages",
        nodes: &[1],
        prepare: |w| {
            fill(w)?;
            list(w).map(drop)
        },
        run: list,
    },
    Scenario {
        name: "imap-read-cold",
        about: "all messages of such a mailbox are listed, opened and read",
        limits: "reads of contents, one after the other",
        unit: "messages",
        nodes: &[1],
        prepare: fill_cold,
        run: read,
    },
    Scenario {
        name: "imap-read-warm",
        about: "the same, read before",
        limits: "an OPEN and a RELEASE per message; the contents are in the kernel",
        unit: "messages",
        nodes: &[1],
        prepare: |w| {
            fill(w)?;
            read(w).map(drop)
        },
        run: read,
    },
    Scenario {
        name: "imap-list-elsewhere",
        about: "a mailbox filled on one node is listed on another, with stat",
        limits: "one handover of the domain, then reads of its tree",
        unit: "messages",
        nodes: &[2],
        prepare: fill,
        run: |w| {
            let begin = Instant::now();
            let found = paths(&w.dirs[1])?;
            for path in &found {
                fs::symlink_metadata(path)?;
            }
            Ok(Done::since(begin, found.len() as f64))
        },
    },
    Scenario {
        name: "imap-flag",
        about: "messages are renamed from new to cur with a flag",
        limits: "the daemon: changes are logged later, together",
        unit: "messages",
        nodes: &[1],
        prepare: fill,
        run: |w| {
            let found = paths(w.dir())?;
            w.on_all(1, |_, _| repeat(found.len(), |n| mark_seen(&found[n]).map(drop)))
        },
    },
    Scenario {
        name: "imap-expunge",
        about: "all messages are removed",
        limits: "the daemon: changes are logged later, together",
        unit: "messages",
        nodes: &[1],
        prepare: fill,
        run: |w| {
            let found = paths(w.dir())?;
            w.on_all(1, |_, _| repeat(found.len(), |n| fs::remove_file(&found[n])))
        },
    },
];

fn mailbox(dir: &Path) -> PathBuf {
    dir.join("box")
}

fn fill(w: &Work) -> Result<()> {
    make_maildir(&mailbox(w.dir()))?;
    let mut mailer = Mailer::new(7).largest(64 << 10);
    for n in 0..w.scale.of(10_000) {
        fs::write(mailbox(w.dir()).join(format!("new/{n}.mail")), mailer.message().bytes)?;
    }
    Ok(())
}

fn fill_cold(w: &Work) -> Result<()> {
    fill(w)?;
    w.place.remount(0)
}

fn paths(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    fs::read_dir(mailbox(dir).join("new"))?.map(|e| e.map(|e| e.path())).collect()
}

fn list(w: &Work) -> Result<Done> {
    let begin = Instant::now();
    let found = paths(w.dir())?;
    for path in &found {
        fs::symlink_metadata(path)?;
    }
    Ok(Done::since(begin, found.len() as f64))
}

fn read(w: &Work) -> Result<Done> {
    let begin = Instant::now();
    let found = paths(w.dir())?;
    let done = w.on_all(1, |_, _| repeat(found.len(), |n| fs::read(&found[n]).map(drop)))?;
    Ok(Done { time: begin.elapsed(), ..done })
}

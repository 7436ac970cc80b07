//! Delivery to maildirs as a delivery agent does it: write to `tmp`, fsync, rename to `new`, fsync of `new`.

use super::super::{Done, Scenario, Work, repeat};
use crate::cluster::Result;
use crate::mail::{Mailer, Message, deliver_maildir, make_maildir};

const ALL_NODES: &[usize] = &[1, 2, 4];
const FSYNC: &str = "the device's flush, once per message";
const SHARED_FSYNC: &str = "the device's flush, shared by those who wait for it";

pub const ALL: &[Scenario] = &[
    deliver("deliver-2k", "one after the other, 2 KiB", FSYNC, ALL_NODES, own_boxes::<1, 2>),
    deliver("deliver-16k", "one after the other, 16 KiB", FSYNC, &[1], own_boxes::<1, 16>),
    deliver("deliver-100k", "one after the other, 100 KiB", FSYNC, &[1], own_boxes::<1, 100>),
    deliver("deliver-mix", "one after the other, sizes as in mail", FSYNC, &[1], own_boxes::<1, 0>),
    deliver("deliver-2k-32", "32 at once per node, 2 KiB", SHARED_FSYNC, ALL_NODES, own_boxes::<32, 2>),
    deliver("deliver-16k-32", "32 at once per node, 16 KiB", SHARED_FSYNC, &[1], own_boxes::<32, 16>),
    deliver("deliver-100k-32", "32 at once per node, 100 KiB", SHARED_FSYNC, &[1], own_boxes::<32, 100>),
    deliver("deliver-mix-32", "32 at once per node, sizes as in mail", SHARED_FSYNC, ALL_NODES, own_boxes::<32, 0>),
    deliver(
        "deliver-one-mailbox",
        "4 at once per node, all to one mailbox, 2 KiB",
        "handovers of the mailbox's domain between the nodes",
        ALL_NODES,
        one_box,
    ),
];

const fn deliver(
    name: &'static str,
    about: &'static str,
    limits: &'static str,
    nodes: &'static [usize],
    run: fn(&Work) -> Result<Done>,
) -> Scenario {
    Scenario { name, about, limits, unit: "messages", nodes, prepare, run }
}

/// A mailbox for each thread of each node.
fn prepare(w: &Work) -> Result<()> {
    (0..32 * w.dirs.len()).try_for_each(|n| make_maildir(&w.dir().join(format!("box{n}"))))?;
    Ok(())
}

/// Made before the clock runs. `kib` 0: sizes as in mail.
fn messages(kib: usize) -> Vec<Message> {
    let mut mailer = Mailer::new(kib as u64).largest(if kib == 0 { 1 << 20 } else { 1 << 10 });
    let mut all: Vec<Message> = (0..64).map(|_| mailer.message()).collect();
    if kib > 0 {
        all.iter_mut().for_each(|m| m.bytes.resize(kib << 10, b'x'));
    }
    all
}

fn own_boxes<const THREADS: usize, const KIB: usize>(w: &Work) -> Result<Done> {
    let (count, messages) = ((w.scale.of(2000) / THREADS).max(2), messages(KIB));
    w.on_all(THREADS, |n, dir| {
        let to = dir.join(format!("box{n}"));
        repeat(count, |i| deliver_maildir(&to, &messages[i % messages.len()]).map(drop))
    })
}

fn one_box(w: &Work) -> Result<Done> {
    let (count, messages) = ((w.scale.of(2000) / 4).max(2), messages(2));
    w.on_all(4, |_, dir| repeat(count, |i| deliver_maildir(&dir.join("box0"), &messages[i % messages.len()]).map(drop)))
}

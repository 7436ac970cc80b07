//! Device commands per operation, in a maildir. Counts repeat exactly where seconds do not: the device is simulated, the
//! clock is paused, and what membership costs (heartbeats) is a class of its own that is left out.

use std::sync::Arc;

use crate::common::{WHO, dir, disk, file, mount};
use blockdev::ClassStats;
use blockdev::sim::SimDisk;
use fs_core::{ROOT_INO, Rename, Volume, WriteOptions};

const MESSAGE: usize = 16 << 10;

struct Maildir {
    tmp: u64,
    new: u64,
}

async fn make_maildir(v: &Volume, name: &str) -> Maildir {
    let top = v.mkdir(WHO, ROOT_INO, name.as_bytes(), dir()).await.expect("mkdir").value.ino;
    let mut at = Vec::new();
    for part in ["tmp", "new", "cur"] {
        at.push(v.mkdir(WHO, top, part.as_bytes(), dir()).await.expect("mkdir").value.ino);
    }
    Maildir { tmp: at[0], new: at[1] }
}

/// A delivery as MTAs do it: written and synced under tmp, renamed to new, new synced.
async fn deliver(v: &Volume, m: &Maildir, name: &str) {
    let name = name.as_bytes();
    let f = v.mknod(WHO, m.tmp, name, file(), true).await.expect("create").value.ino;
    let body: Vec<u8> = (0..MESSAGE).map(|i| i as u8 ^ name[i % name.len()]).collect();
    for (i, part) in body.chunks(8192).enumerate() {
        v.write(f, i as u64 * 8192, part, WriteOptions::default()).await.expect("write");
    }
    v.fsync(f, false).await.expect("fsync of the message");
    v.release(f).await;
    v.rename(m.tmp, name, m.new, name, Rename::NoReplace).await.expect("rename");
    v.fsync(m.new, false).await.expect("fsync of new");
}

/// Lists a directory as READDIRPLUS does; returns the number of entries, all with attributes.
async fn list(v: &Volume, d: u64) -> usize {
    let (mut after, mut seen) = (0, 0);
    loop {
        let batch = v.readdir(d, after, 745, true).await.expect("readdir").value;
        let Some(last) = batch.last() else { return seen };
        assert!(batch.iter().all(|e| e.attr.is_some()));
        after = last.cookie;
        seen += batch.len();
    }
}

/// What `work` costs the device on this node.
async fn cost(v: &Volume, work: impl Future<Output = ()>) -> ClassStats {
    let before = v.device_stats();
    work.await;
    v.device_stats().since(&before).work()
}

async fn mailbox_in_use(disk: &Arc<SimDisk>) -> (Arc<Volume>, Maildir) {
    let v = mount(disk, "a").await;
    let m = make_maildir(&v, "anna").await;
    for i in 0..20 {
        deliver(&v, &m, &format!("early{i}")).await;
    }
    (v, m)
}

#[tokio::test(start_paused = true)]
async fn one_delivery() {
    let disk = disk(256 << 20).await;
    let (v, m) = mailbox_in_use(&disk).await;
    for i in 0..100 {
        // Let what runs in the background finish: this is about what the delivery waits for.
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        let c = cost(&v, deliver(&v, &m, &format!("m{i}"))).await;
        assert!(c.writes <= 3, "delivery {i}: {c:?}");
        assert_eq!((c.reads, c.compare_and_writes), (0, 0), "delivery {i}: {c:?}");
    }
    v.unmount().await.expect("unmount");
}

#[tokio::test(start_paused = true)]
async fn deliveries_at_once_share_their_commits() {
    let disk = disk(256 << 20).await;
    let (v, m) = mailbox_in_use(&disk).await;
    let (at_once, rounds) = (32, 10);
    let c = cost(&v, async {
        let m = Arc::new(m);
        let mut tasks = tokio::task::JoinSet::new();
        for t in 0..at_once {
            let (v, m) = (v.clone(), m.clone());
            tasks.spawn(async move {
                for r in 0..rounds {
                    deliver(&v, &m, &format!("t{t}.{r}")).await;
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.expect("delivered");
        }
    })
    .await;
    let per_message = c.writes as f64 / f64::from(at_once * rounds);
    println!("{at_once} deliveries at once: {per_message:.2} writes each, {c:?}");
    assert!(per_message <= 1.5, "{per_message} writes per message, {c:?}");
    assert_eq!(c.compare_and_writes, 0);
    v.unmount().await.expect("unmount");
}

/// Placing included: everything is in its place at the end.
#[tokio::test(start_paused = true)]
async fn bytes_written() {
    let disk = disk(256 << 20).await;
    let (v, m) = mailbox_in_use(&disk).await;
    let messages = 500;
    let before = v.device_stats();
    for i in 0..messages {
        deliver(&v, &m, &format!("m{i}")).await;
    }
    let device = v.clone();
    v.unmount().await.expect("unmount places everything");
    let c = device.device_stats().since(&before).work();
    let each = c.bytes_written / messages;
    println!("one after the other: {each} bytes written per message of {MESSAGE}, {c:?}");
    assert!(each <= MESSAGE as u64 + (12 << 10), "{each} bytes per message, {c:?}");
}

#[tokio::test(start_paused = true)]
async fn a_cold_mailbox_of_ten_thousand() {
    let disk = disk(1 << 30).await;
    let (a, m) = mailbox_in_use(&disk).await;
    for i in 0..9_980 {
        let name = format!("m{i}");
        let f = a.mknod(WHO, m.new, name.as_bytes(), file(), true).await.expect("create").value.ino;
        a.write(f, 0, &[7; 6000], WriteOptions::default()).await.expect("write");
        a.release(f).await;
    }
    a.sync().await.expect("sync");
    let b = mount(&disk, "b").await;
    let c = cost(&b, async {
        let anna = b.lookup(ROOT_INO, b"anna").await.expect("lookup").value.expect("there").ino;
        let new = b.lookup(anna, b"new").await.expect("lookup").value.expect("there").ino;
        let mailbox = b.device_stats();
        assert_eq!(list(&b, new).await, 10_000);
        let c = b.device_stats().since(&mailbox).work();
        println!("cold listing: {c:?}");
        assert!(c.compare_and_writes <= 2 && c.reads <= 100, "{c:?}");
    })
    .await;
    println!("with the way to it: {c:?}");
    let again = cost(&b, async { assert_eq!(list(&b, m.new).await, 10_000) }).await;
    assert_eq!(again, ClassStats::default(), "a warm listing needs no device");
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
}

/// However many nodes there are, work in one's own mailboxes is nobody else's business.
#[tokio::test(start_paused = true)]
async fn own_mailboxes_cost_no_locks() {
    let disk = disk(256 << 20).await;
    let mut nodes = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let v = mount(&disk, name).await;
        let m = make_maildir(&v, name).await;
        deliver(&v, &m, "early").await;
        nodes.push((v, m));
    }
    // Past the frees that the making of the mailboxes left to others.
    tokio::time::sleep(std::time::Duration::from_secs(60)).await;
    for (v, m) in &nodes {
        deliver(v, m, "warm").await;
    }
    for (v, m) in &nodes {
        let locks = v.lock_stats();
        let c = cost(v, async {
            for i in 0..200 {
                let name = format!("m{i}");
                deliver(v, m, &name).await;
                let seen = v.lookup(m.new, name.as_bytes()).await.expect("lookup").value.expect("there").ino;
                assert_eq!(v.read(seen, 0, 1 << 20).await.expect("read").value.len(), MESSAGE);
                if i % 2 == 0 {
                    v.unlink(m.new, name.as_bytes()).await.expect("unlink");
                }
            }
        })
        .await;
        let after = v.lock_stats();
        assert_eq!(c.compare_and_writes, 0, "{c:?}");
        assert_eq!((after.hints_sent, after.doorbells_written), (locks.hints_sent, locks.doorbells_written));
    }
    for (v, _) in &nodes {
        v.unmount().await.expect("unmount");
    }
}

/// An mbox, one message after the other. Another node's appends in between are not missed.
#[tokio::test(start_paused = true)]
async fn an_append_reads_nothing() {
    const PART: usize = 700;
    let disk = disk(256 << 20).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let mbox = a.mknod(WHO, ROOT_INO, b"mbox", file(), false).await.expect("create").value.ino;
    let mut contents = Vec::new();
    let mut append = async |v: &Volume, byte: u8| {
        let how = WriteOptions { append: true, ..WriteOptions::default() };
        v.write(mbox, 0, &[byte; PART], how).await.expect("append");
        v.fsync(mbox, false).await.expect("fsync");
        contents.extend([byte; PART]);
        let seen = v.read(mbox, 0, 1 << 20).await.expect("read").value;
        assert!(seen == contents, "{} bytes, not {}, or others", seen.len(), contents.len());
    };
    append(&a, 1).await;
    let mut writes = 0;
    for i in 2..100 {
        // The record is durable, and nothing of the contents is in memory for its sake any more.
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        let how = WriteOptions { append: true, ..WriteOptions::default() };
        let c = cost(&a, async {
            a.write(mbox, 0, &[0; PART], how).await.expect("append");
            a.fsync(mbox, false).await.expect("fsync");
        })
        .await;
        assert_eq!((c.reads, c.compare_and_writes), (0, 0), "append {i}: {c:?}");
        writes += c.writes;
        let size = a.getattr(mbox).await.expect("getattr").value.inode.size;
        let cut = fs_core::SetAttr { size: Some(size - PART as u64), ..fs_core::SetAttr::default() };
        a.setattr(mbox, cut).await.expect("truncate");
        if i % 10 == 0 {
            append(&b, i).await;
        }
        // What was cut off is not there again.
        append(&a, i).await;
    }
    // The page and the record, and what a checkpoint places meanwhile.
    assert!(writes <= 98 * 2 + 10, "{writes} writes");
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
}

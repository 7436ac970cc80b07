//! Large directories and full volumes. `CLUSTERFS_SCALE=full` makes the directory of a million entries instead of 60,000
//! (minutes instead of seconds).

use std::collections::BTreeMap;

use crate::common::{WHO, check_clean, dir, disk, file, mount};
use fs_core::{FsError, ROOT_INO, Volume, WriteOptions};

fn entries() -> u32 {
    if std::env::var("CLUSTERFS_SCALE").as_deref() == Ok("full") { 1_000_000 } else { 60_000 }
}

/// A listing in batches; between them `between` changes the directory.
async fn list(v: &Volume, d: u64, mut between: impl AsyncFnMut()) -> BTreeMap<Vec<u8>, u32> {
    let (mut after, mut seen) = (0, BTreeMap::new());
    loop {
        let batch: Vec<_> = v.readdir(d, after, 500, false).await.expect("readdir").value;
        let Some(last) = batch.last() else { return seen };
        assert!(batch.windows(2).all(|w| w[0].cookie < w[1].cookie) && batch[0].cookie > after, "cookies grow");
        after = last.cookie;
        for e in batch {
            *seen.entry(e.name).or_default() += 1;
        }
        between().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_large_directory() {
    let total = entries();
    let disk = disk(if total > 100_000 { 4 << 30 } else { 1 << 30 }).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let free = a.statfs().await.expect("statfs").free;
    let d = a.mkdir(WHO, ROOT_INO, b"large", dir()).await.expect("mkdir").value.ino;
    let name = |i: u32| format!("{i:x}.message,S={i}").into_bytes();
    for i in 0..total {
        a.mknod(WHO, d, &name(i), file(), false).await.expect("create");
    }
    assert_eq!(a.getattr(d).await.expect("getattr").value.inode.links, 2);
    for i in (0..total).step_by(997) {
        assert!(b.lookup(d, &name(i)).await.expect("lookup").value.is_some(), "entry {i}");
    }
    assert!(b.lookup(d, b"no such message").await.expect("lookup").value.is_none());

    // Every third name goes and new ones come while both nodes list: what stays is seen once, what is gone at most once.
    let mut next = 0;
    let seen = list(&b, d, async || {
        for _ in 0..100 {
            if next < total {
                a.unlink(d, &name(next)).await.expect("unlink");
                a.mknod(WHO, d, &name(total + next), file(), false).await.expect("create");
                next += 3;
            }
        }
    })
    .await;
    assert!(seen.values().all(|n| *n == 1), "a name was listed twice");
    for i in (0..total).filter(|i| i % 3 != 0) {
        assert!(seen.contains_key(&name(i)), "entry {i} was there all along");
    }
    let after = list(&a, d, async || {}).await;
    assert_eq!(after.len() as u32, total);
    for name in after.keys() {
        a.unlink(d, name).await.expect("unlink");
    }
    assert!(list(&b, d, async || {}).await.is_empty());
    a.rmdir(ROOT_INO, b"large").await.expect("rmdir");
    b.unmount().await.expect("unmount");
    a.sync().await.expect("sync");
    let left = a.statfs().await.expect("statfs").free;
    assert!(left + 64 >= free, "{free} blocks were free, {left} are now");
    a.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

/// Fills the volume with files of `size` bytes until it says so; returns the names of those that were synced.
async fn fill(v: &Volume, d: u64, prefix: &str, size: usize) -> Vec<Vec<u8>> {
    let mut kept = Vec::new();
    for i in 0.. {
        let name = format!("{prefix}{i}").into_bytes();
        let f = match v.mknod(WHO, d, &name, file(), true).await {
            Ok(made) => made.value.ino,
            Err(FsError::NoSpace) => return kept,
            Err(e) => panic!("create: {e}"),
        };
        let body = vec![i as u8; size];
        let written = match v.write(f, 0, &body, WriteOptions::default()).await {
            Ok(_) => v.fsync(f, false).await,
            Err(e) => Err(e),
        };
        v.release(f).await;
        match written {
            Ok(()) => kept.push(name),
            Err(FsError::NoSpace) => {
                v.unlink(d, &name).await.expect("a full volume lets users delete");
                return kept;
            }
            Err(e) => panic!("write: {e}"),
        }
    }
    unreachable!("the volume is finite")
}

async fn verify(v: &Volume, d: u64, names: &[Vec<u8>], size: usize) {
    for (i, name) in names.iter().enumerate() {
        let f = v.lookup(d, name).await.expect("lookup").value.expect("there").ino;
        assert_eq!(v.read(f, 0, 1 << 20).await.expect("read").value, vec![i as u8; size], "file {i}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_volume_loses_nothing_and_lets_users_delete() {
    const SIZE: usize = 50_000;
    let disk = disk(48 << 20).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let da = a.mkdir(WHO, ROOT_INO, b"a", dir()).await.expect("mkdir").value.ino;
    let db = a.mkdir(WHO, ROOT_INO, b"b", dir()).await.expect("mkdir").value.ino;
    let mut first = 0;
    for round in 0..3 {
        let (ka, kb) = tokio::join!(fill(&a, da, "a", SIZE), fill(&b, db, "b", SIZE));
        let total = ka.len() + kb.len();
        println!("round {round}: {} + {} files of {SIZE} bytes", ka.len(), kb.len());
        // Nearly everything that mkfs calls free can be used.
        assert!(total * SIZE > 20 << 20, "only {total} files fit");
        first = if round == 0 { total } else { first };
        assert!(total * 10 >= first * 9, "round {round}: {total} files fit, {first} did at first");
        verify(&b, da, &ka, SIZE).await;
        verify(&a, db, &kb, SIZE).await;
        for name in &ka {
            b.unlink(da, name).await.expect("unlink");
        }
        for name in &kb {
            a.unlink(db, name).await.expect("unlink");
        }
        // Frees into groups of the other node are carried out in the background.
        tokio::time::sleep(std::time::Duration::from_secs(90)).await;
    }
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

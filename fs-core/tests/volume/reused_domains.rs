//! A domain number is used again as soon as its directory is gone, while somebody may still ask for an inode of before.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::common::{WHO, check_clean, dir, disk, file, mount};
use fs_core::{FsError, ROOT_INO, SetAttr, Volume};

/// Asks for inodes that are gone, over and over: each time their domains' locks are taken for it.
fn keep_asking(v: &Arc<Volume>, gone: &BTreeSet<u64>, pause: u64) -> tokio::task::JoinHandle<()> {
    let (v, gone) = (v.clone(), gone.clone());
    tokio::spawn(async move {
        for i in 0..8 {
            for ino in &gone {
                match v.getattr(*ino).await {
                    // The number may mean the new directory already.
                    Ok(_) | Err(FsError::Stale) => {}
                    Err(e) => panic!("{e}"),
                }
            }
            tokio::time::sleep(Duration::from_micros(300 * (pause + i))).await;
        }
    })
}

async fn directories_come_and_go(seed: u64) -> usize {
    let disk = disk(64 << 20).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let (mut gone, mut again) = (BTreeSet::new(), 0);
    for i in 0..40u64 {
        // As processes do whose working directory was removed, here and on the other node.
        let asking = [keep_asking(&a, &gone, seed % 5), keep_asking(&b, &gone, seed % 3)];
        tokio::time::sleep(Duration::from_micros((seed * 7 + i) % 11 * 700)).await;
        let made = a.mkdir(WHO, ROOT_INO, b"d", dir()).await;
        let d = made.unwrap_or_else(|e| panic!("seed {seed}, mkdir {i}: {e}")).value.ino;
        again += usize::from(gone.contains(&d));
        for (v, name) in [(&a, "of-a"), (&b, "of-b"), (&a, "again-of-a")] {
            let made = v.mknod(WHO, d, name.as_bytes(), file(), false).await;
            made.unwrap_or_else(|e| panic!("seed {seed}, round {i}, {name}: {e}"));
            let names = v.readdir(d, 0, 10, false).await.unwrap_or_else(|e| panic!("seed {seed}, {i}: {e}")).value;
            assert!(names.iter().any(|n| n.name == name.as_bytes()));
        }
        let remover = if i % 4 == seed % 8 { &b } else { &a };
        for name in ["of-a", "of-b", "again-of-a"] {
            remover.unlink(d, name.as_bytes()).await.unwrap_or_else(|e| panic!("seed {seed}, round {i}, {name}: {e}"));
        }
        remover.rmdir(ROOT_INO, b"d").await.unwrap_or_else(|e| panic!("seed {seed}, rmdir {i}: {e}"));
        gone.insert(d);
        for asker in asking {
            asker.await.expect("asks without an error");
        }
    }
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
    check_clean(&disk, seed).await;
    again
}

#[test]
fn a_number_in_use_again_is_not_taken_for_the_old_directory() {
    let mut again = 0;
    for seed in 0..16 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let all = async {
            let done = tokio::time::timeout(Duration::from_secs(600), directories_come_and_go(seed)).await;
            done.unwrap_or_else(|_| panic!("seed {seed} hangs"))
        };
        again += runtime.expect("runtime").block_on(all);
    }
    assert!(again > 100, "numbers were used again {again} times only");
}

/// Its blocks are free, and its lock not yet given back: what the device still has of it must not be found again.
#[tokio::test(start_paused = true)]
async fn a_removed_directory_is_gone_at_once() {
    let disk = disk(64 << 20).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    for i in 0..5 {
        let d = a.mkdir(WHO, ROOT_INO, b"d", dir()).await.expect("mkdir").value.ino;
        a.mknod(WHO, d, b"f", file(), false).await.expect("create");
        // It is in its place before the other node sees it.
        assert_eq!(b.readdir(d, 0, 10, false).await.expect("readdir").value.len(), 1);
        a.unlink(d, b"f").await.expect("unlink");
        a.rmdir(ROOT_INO, b"d").await.expect("rmdir");
        let (seen, changed) =
            tokio::join!(a.getattr(d), a.setattr(d, SetAttr { mode: Some(0o700), ..SetAttr::default() }));
        assert!(matches!(seen, Err(FsError::Stale)), "round {i}: {seen:?}");
        assert!(matches!(changed, Err(FsError::Stale)), "round {i}: {changed:?}");
        assert!(matches!(b.getattr(d).await, Err(FsError::Stale)), "round {i}, elsewhere");
    }
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
    check_clean(&disk, 0).await;
}

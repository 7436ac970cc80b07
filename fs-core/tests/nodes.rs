//! Volumes on a simulated device: one node, then several, on the paused clock.

mod common;

use common::{WHO, dir, disk, file, mount, mount_on};
use fs_core::{Fallocate, ROOT_INO, Rename, SetAttr, Whence, WriteOptions};

#[tokio::test(start_paused = true)]
async fn one_node_keeps_what_it_is_told_over_a_remount() {
    let disk = disk(64 << 20).await;
    let v = mount(&disk, "a").await;
    let d = v.mkdir(WHO, ROOT_INO, b"mail", dir()).await.expect("mkdir").value.ino;
    let f = v.mknod(WHO, d, b"msg", file(), true).await.expect("create").value.ino;
    let body: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
    v.write(f, 0, &body, WriteOptions::default()).await.expect("write");
    v.fsync(f, false).await.expect("fsync");
    assert_eq!(v.read(f, 0, 200_000).await.expect("read").value, body);
    v.rename(d, b"msg", d, b"renamed", Rename::Replace).await.expect("rename");
    v.setxattr(f, b"user.a", &[5; 3000], fs_core::XattrSet::Any).await.expect("setxattr");
    v.symlink(WHO, d, b"link", b"renamed").await.expect("symlink");
    v.link(f, ROOT_INO, b"hard").await.expect("link");
    v.setattr(f, SetAttr { size: Some(50_000), ..Default::default() }).await.expect("truncate");
    v.release(f).await;
    v.unmount().await.expect("unmount");

    let v = mount(&disk, "a").await;
    let a = v.lookup(d, b"renamed").await.expect("lookup").value.expect("exists");
    assert_eq!((a.ino, a.inode.size, a.inode.links), (f, 50_000, 2));
    assert_eq!(v.read(f, 0, 200_000).await.expect("read").value, body[..50_000]);
    assert_eq!(v.getxattr(f, b"user.a").await.expect("getxattr").value, [5; 3000]);
    let l = v.lookup(d, b"link").await.expect("lookup").value.expect("exists");
    assert_eq!(v.readlink(l.ino).await.expect("readlink").value, b"renamed");
    let names: Vec<_> = v.readdir(d, 0, 100, true).await.expect("readdir").value.into_iter().map(|e| e.name).collect();
    assert_eq!(names.len(), 2);
    v.unlink(d, b"renamed").await.expect("unlink");
    v.unlink(d, b"link").await.expect("unlink");
    v.rmdir(ROOT_INO, b"mail").await.expect("rmdir");
    assert!(v.lookup(ROOT_INO, b"mail").await.expect("lookup").value.is_none());
    assert_eq!(v.read(f, 0, 10).await.expect("still there by its other name").value, body[..10]);
    v.unlink(ROOT_INO, b"hard").await.expect("unlink");
    v.unmount().await.expect("unmount");
}

#[tokio::test(start_paused = true)]
async fn what_one_node_does_the_other_sees() {
    let disk = disk(64 << 20).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let d = a.mkdir(WHO, ROOT_INO, b"box", dir()).await.expect("mkdir").value.ino;
    assert_eq!(b.lookup(ROOT_INO, b"box").await.expect("lookup").value.expect("seen").ino, d);
    for i in 0..20u32 {
        let (w, r) = if i % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let name = format!("m{i}");
        let f = w.mknod(WHO, d, name.as_bytes(), file(), true).await.expect("create").value.ino;
        let body = vec![i as u8; 5000 + i as usize * 700];
        w.write(f, 0, &body, WriteOptions::default()).await.expect("write");
        w.release(f).await;
        let seen = r.lookup(d, name.as_bytes()).await.expect("lookup").value.expect("seen");
        assert_eq!(seen.inode.size, body.len() as u64);
        assert_eq!(r.read(f, 0, 1 << 20).await.expect("read").value, body);
        let at = r
            .write(f, 0, b"tail", WriteOptions { append: true, ..WriteOptions::default() })
            .await
            .expect("append")
            .value;
        assert_eq!(at, body.len() as u64);
        assert_eq!(w.getattr(f).await.expect("getattr").value.inode.size, body.len() as u64 + 4);
    }
    assert_eq!(b.readdir(d, 0, 100, true).await.expect("readdir").value.len(), 20);
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
}

#[tokio::test(start_paused = true)]
async fn holes_and_allocation() {
    let disk = disk(64 << 20).await;
    let v = mount(&disk, "a").await;
    let before = v.statfs().await.expect("statfs").free;
    let f = v.mknod(WHO, ROOT_INO, b"sparse", file(), true).await.expect("create").value.ino;
    v.write(f, 1 << 30, b"end", WriteOptions::default()).await.expect("write");
    v.write(f, 5000, &[1; 5000], WriteOptions::default()).await.expect("write");
    assert_eq!(v.seek(f, 0, Whence::Data).await.expect("data"), 4096);
    assert_eq!(v.seek(f, 4096, Whence::Hole).await.expect("hole"), 12288);
    assert_eq!(v.seek(f, 12288, Whence::Data).await.expect("data"), 1 << 30);
    assert_eq!(v.read(f, 4990, 20).await.expect("read").value, [[0; 10], [1; 10]].concat());
    v.fallocate(f, 0, 1 << 20, Fallocate { keep_size: true, ..Default::default() }).await.expect("allocate");
    assert_eq!(v.getattr(f).await.expect("getattr").value.inode.blocks, 257);
    let punch = Fallocate { keep_size: true, punch_hole: true, zero_range: false };
    v.fallocate(f, 6000, 1 << 30, punch).await.expect("punch");
    assert_eq!(v.read(f, 5990, 20).await.expect("read").value, [[1; 10], [0; 10]].concat());
    v.release(f).await;
    v.unlink(ROOT_INO, b"sparse").await.expect("unlink");
    v.sync().await.expect("sync");
    assert!(before - v.statfs().await.expect("statfs").free < 64, "blocks come back");
    v.unmount().await.expect("unmount");
}

#[tokio::test(start_paused = true)]
async fn a_hole_in_contents_that_grew_unwritten() {
    let disk = disk(64 << 20).await;
    let v = mount(&disk, "a").await;
    let f = v.mknod(WHO, ROOT_INO, b"short", file(), true).await.expect("create").value.ino;
    v.write(f, 0, &[7; 300], WriteOptions::default()).await.expect("write");
    v.setattr(f, SetAttr { size: Some(352), ..Default::default() }).await.expect("grow");
    let punch = Fallocate { keep_size: true, punch_hole: true, zero_range: false };
    v.fallocate(f, 100, 250, punch).await.expect("punch");
    assert_eq!(v.read(f, 0, 1000).await.expect("read").value, [vec![7; 100], vec![0; 252]].concat());
    v.release(f).await;
    v.unmount().await.expect("unmount");
}

#[tokio::test(start_paused = true)]
async fn a_dead_node_is_recovered_and_what_it_synced_is_there() {
    let disk = disk(64 << 20).await;
    let dev = disk.open("a");
    let a = mount_on(dev.clone(), "a").await;
    let b = mount(&disk, "b").await;
    let d = a.mkdir(WHO, ROOT_INO, b"box", dir()).await.expect("mkdir").value.ino;
    let f = a.mknod(WHO, d, b"msg", file(), true).await.expect("create").value.ino;
    a.write(f, 0, &[9; 20_000], WriteOptions::default()).await.expect("write");
    a.fsync(f, false).await.expect("fsync");
    a.mknod(WHO, d, b"lost", file(), false).await.expect("create");
    dev.crash();
    let start = tokio::time::Instant::now();
    let seen = b.lookup(d, b"msg").await.expect("lookup").value.expect("there");
    assert!(start.elapsed().as_secs() < 4, "took {:?}", start.elapsed());
    assert_eq!(seen.ino, f);
    assert_eq!(b.read(f, 0, 1 << 20).await.expect("read").value, [9; 20_000]);
    assert!(b.lookup(d, b"lost").await.expect("lookup").value.is_none());
    b.unmount().await.expect("unmount");
}

/// Both nodes hold the file in shared mode when their kernels write mapped pages back: each answer must come at once, and each
/// page must arrive, in the order in which the node that wrote it sees them.
#[tokio::test(start_paused = true)]
async fn pages_of_memory_maps_wait_for_nobody() {
    let disk = disk(64 << 20).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let f = a.mknod(WHO, ROOT_INO, b"map", file(), true).await.expect("create").value.ino;
    a.write(f, 0, &[0; 10_000], WriteOptions::default()).await.expect("write");
    a.fsync(f, false).await.expect("fsync");
    for i in 1..30u8 {
        assert_eq!(b.read(f, 0, 20_000).await.expect("read").value.len(), 10_000);
        assert_eq!(a.read(f, 0, 20_000).await.expect("read").value.len(), 10_000);
        a.write_mapped(f, 0, vec![i; 4096]).expect("taken");
        b.write_mapped(f, 4096, vec![i + 100; 4096]).expect("taken");
        a.write_mapped(f, 8192, vec![i; 4096]).expect("taken, though the file ends in it");
        let seen = a.read(f, 0, 20_000).await.expect("read").value;
        assert_eq!((seen.len(), seen[0], seen[9_999]), (10_000, i, i), "a node sees its own maps");
        a.fsync(f, false).await.expect("fsync");
        b.flush_mapped(f).await.expect("close");
        for v in [&a, &b] {
            let seen = v.read(f, 0, 20_000).await.expect("read").value;
            assert_eq!((seen.len(), seen[0], seen[4096], seen[9_999]), (10_000, i, i + 100, i));
        }
        // A change that comes later stays on top.
        b.write_mapped(f, 0, vec![1; 4096]).expect("taken");
        b.write(f, 0, &[i], WriteOptions::default()).await.expect("write");
        assert_eq!(a.read(f, 0, 2).await.expect("read").value, [i, 1]);
    }
    a.write_mapped(f, 0, vec![77; 4096]).expect("taken");
    a.unmount().await.expect("unmount carries out what waits");
    assert_eq!(b.read(f, 0, 1).await.expect("read").value, [77]);
    b.unmount().await.expect("unmount");
}

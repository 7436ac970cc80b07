//! Volumes on a simulated device: one node, then several, on the paused clock.

use crate::common::{WHO, dir, disk, file, mount, mount_on};
use fs_core::{Fallocate, FsError, ROOT_INO, Rename, SetAttr, Whence, WriteOptions};

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

/// Postfix, procmail and maildrop sync a message, name it by link or rename, and answer for it without a sync of the directory.
#[tokio::test(start_paused = true)]
async fn the_name_that_a_synced_file_gets_first_outlives_the_node() {
    let disk = disk(64 << 20).await;
    let dev = disk.open("a");
    let a = mount_on(dev.clone(), "a").await;
    let b = mount(&disk, "b").await;
    let top = a.mkdir(WHO, ROOT_INO, b"Maildir", dir()).await.expect("mkdir").value.ino;
    let mut dirs = Vec::new();
    for name in [&b"tmp"[..], b"new"] {
        dirs.push(a.mkdir(WHO, top, name, dir()).await.expect("mkdir").value.ino);
    }
    dirs.push(a.mkdir(WHO, ROOT_INO, b"a domain of its own", dir()).await.expect("mkdir").value.ino);
    let [tmp, to @ ..] = &dirs[..] else { panic!("no directories") };
    let mut named = Vec::new();
    for new in to {
        for name in [&b"linked"[..], b"renamed"] {
            let f = a.mknod(WHO, *tmp, name, file(), true).await.expect("create").value.ino;
            a.write(f, 0, &[9; 20_000], WriteOptions::default()).await.expect("write");
            a.fsync(f, false).await.expect("fsync");
            a.release(f).await;
            match name {
                b"linked" => {
                    let held = a.link(f, *new, name).await.expect("link");
                    assert!(held.names_synced);
                    a.commit_name().await.expect("commit");
                    drop(held);
                    a.unlink(*tmp, name).await.expect("unlink");
                }
                _ => {
                    let held = a.rename(*tmp, name, *new, name, Rename::Replace).await.expect("rename");
                    assert!(held.names_synced);
                    a.commit_name().await.expect("commit");
                }
            }
            named.push((*new, name, f));
        }
    }
    // A second name costs no commit: nobody waits for that.
    let held = a.rename(to[0], b"renamed", to[0], b"renamed:2,S", Rename::Replace).await.expect("rename");
    assert!(!held.names_synced);
    drop(held);
    dev.crash();
    for (new, name, f) in named {
        let seen = b.lookup(new, name).await.expect("lookup").value;
        let seen = match seen {
            None if name == b"renamed" && new == to[0] => b.lookup(new, b"renamed:2,S").await.expect("lookup").value,
            seen => seen,
        };
        assert_eq!(seen.expect("there").ino, f);
        assert_eq!(b.read(f, 0, 1 << 20).await.expect("read").value, [9; 20_000]);
    }
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

#[tokio::test(start_paused = true)]
async fn activity_names_the_directories_that_nodes_pass_to_and_fro() {
    let disk = disk(64 << 20).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let top = a.mkdir(WHO, ROOT_INO, b"example.org", dir()).await.expect("mkdir").value.ino;
    for quiet in ["q1", "q2"] {
        a.mkdir(WHO, top, quiet.as_bytes(), dir()).await.expect("mkdir");
    }
    let busy = a.mkdir(WHO, top, b"anna", dir()).await.expect("mkdir").value.ino;
    for i in 0..10 {
        let v = if i % 2 == 0 { &b } else { &a };
        v.mknod(WHO, busy, format!("m{i}").as_bytes(), file(), false).await.expect("create");
    }
    let domain = fs_core::ino_domain(busy);
    let held = |v: &fs_core::Volume| v.activity().iter().find(|d| d.domain == domain).and_then(|d| d.held);
    assert_eq!((held(&a), held(&b)), (Some(cluster::Mode::Exclusive), None));
    for v in [&a, &b] {
        let device = v.device_stats();
        let activity = v.activity();
        assert_eq!(v.device_stats().since(&device).work(), Default::default());
        let hottest = activity.iter().max_by_key(|d| d.usage.given_up).expect("domains were used");
        assert_eq!(hottest.domain, domain, "{activity:?}");
        assert!(hottest.usage.operations >= 5 && hottest.usage.acquired >= 4 && hottest.usage.given_up >= 4);
        assert_eq!(v.path_of_domain(domain).await.expect("path"), b"/example.org/anna");
        assert_eq!(v.path_of_domain(fs_core::ino_domain(ROOT_INO)).await.expect("path"), b"/");
    }
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
}

#[tokio::test(start_paused = true)]
async fn free_space_is_told_right_after_an_unmount_and_a_crash() {
    let disk = disk(64 << 20).await;
    let v = mount(&disk, "a").await;
    let before = v.statfs().await.expect("statfs").free;
    let f = v.mknod(WHO, ROOT_INO, b"large", file(), false).await.expect("create").value.ino;
    v.write(f, 0, &vec![1; 8 << 20], WriteOptions::default()).await.expect("write");
    v.unmount().await.expect("unmount");

    let v = mount(&disk, "a").await;
    let full = v.statfs().await.expect("statfs").free;
    assert!((2048..2200).contains(&(before - full)), "{} blocks are in use", before - full);
    v.unlink(ROOT_INO, b"large").await.expect("unlink");
    v.unmount().await.expect("unmount");

    let other = mount(&disk, "b").await;
    let empty = other.statfs().await.expect("statfs").free;
    assert!(before - empty < 64, "{} blocks did not come back", before - empty);
    other.unmount().await.expect("unmount");
}

/// Contents in memory were promised blocks: when another node takes the group that has them, they are still kept.
#[tokio::test(start_paused = true)]
async fn what_was_accepted_finds_room_though_another_node_takes_the_groups() {
    let disk = disk(30 << 20).await;
    let (a, b) = (mount(&disk, "a").await, mount(&disk, "b").await);
    let mut all = Vec::new();
    let mut refused = [false; 2];
    for (v, name) in [(&a, "a"), (&b, "b")] {
        all.push((v, v.mkdir(WHO, ROOT_INO, name.as_bytes(), dir()).await.expect("mkdir").value.ino, Vec::new()));
    }
    for n in 0..200u32 {
        for (i, (v, dir, files)) in all.iter_mut().enumerate() {
            let Ok(made) = v.mknod(WHO, *dir, format!("f{n}").as_bytes(), file(), false).await.map(|m| m.value.ino)
            else {
                refused[i] = true;
                continue;
            };
            let body = vec![n as u8; 100_000 + i * 37];
            match v.write(made, 0, &body, WriteOptions::default()).await {
                Ok(_) => files.push((made, body)),
                Err(FsError::NoSpace) => refused[i] = true,
                Err(e) => panic!("{e}"),
            }
        }
    }
    assert_eq!(refused, [true; 2], "the volume is too large for this test");
    for (v, ..) in &all {
        v.sync().await.expect("what was accepted is kept");
    }
    for (v, dir, files) in all {
        for (ino, body) in files {
            assert!(v.read(ino, 0, 1 << 20).await.expect("read").value == body);
        }
        let names = v.readdir(dir, 0, 1000, true).await.expect("list").value;
        for e in names {
            v.unlink(dir, &e.name).await.expect("deleting works");
        }
    }
    a.unmount().await.expect("unmount");
    b.unmount().await.expect("unmount");
}

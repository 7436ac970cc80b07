//! Volumes on an iSCSI disk: several nodes, each with its own session. Needs root, the programs and the packages that
//! `cargo xtask setup` installs.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::iscsi_target::Target;
use clusterfs_tests::load::{assert_once, deliver_during, make_boxes, read_when_back, returns};

const LIMIT: Duration = Duration::from_secs(200);
const SIZE: u64 = 1 << 30;
const BOXES: [&str; 3] = ["anna", "ben", "team"];
const LEASE: [&str; 2] = ["--lease", "2s"];
/// Lease, two heartbeats, a look per heartbeat, replay; not the time that a write may be queued (2 min): the dead are fenced.
const TAKEOVER: Duration = Duration::from_secs(8);

fn formatted(target: &Target, slots: usize) -> Cluster {
    Cluster::formatted_on(Path::new(&target.url()), slots, LIMIT, &LEASE).unwrap()
}

fn status(c: &Cluster) -> String {
    c.program("clusterfs", &["status"]).unwrap()
}

/// Every program works on it, and a clean end leaves no registration.
#[test]
fn programs_work_on_it() {
    let target = Target::start(SIZE).unwrap();
    let c = formatted(&target, 3);
    let before = status(&c);
    assert!(before.contains("registered: nobody"), "{before}");
    (0..2).for_each(|n| c.mount(n).unwrap());
    fs::write(c.mount_point(0).join("file"), "of node 0").unwrap();
    assert_eq!(fs::read_to_string(c.mount_point(1).join("file")).unwrap(), "of node 0");
    let during = status(&c);
    assert!(during.contains("Write Exclusive - All Registrants"), "{during}");
    assert!(during.contains("slot 0 life 1, slot 1 life 1"), "{during}");
    let refused = c.program("mkfs.clusterfs", &["-q"]).unwrap_err().to_string();
    assert!(refused.contains("in use by"), "{refused}");
    let refused = c.program("fsck.clusterfs", &["-p"]).unwrap_err().to_string();
    assert!(refused.contains("mounted by"), "{refused}");
    fs::write(c.mount_point(1).join("file"), "of node 1").unwrap();
    assert_eq!(fs::read_to_string(c.mount_point(0).join("file")).unwrap(), "of node 1");
    (0..2).for_each(|n| c.unmount(n).unwrap());
    let after = status(&c);
    assert!(after.contains("registered: nobody") && after.contains("reservation: none"), "{after}");
    c.finish();
}

/// A killed node is fenced and taken over long before its queue time; what it left is cleaned up by mkfs and fsck too.
#[test]
fn a_killed_node_is_fenced() {
    let target = Target::start(SIZE).unwrap();
    let c = formatted(&target, 3);
    (0..2).for_each(|n| c.mount(n).unwrap());
    make_boxes(&c.mount_point(0), &BOXES).unwrap();
    fs::write(c.mount_point(0).join("anna/held"), "by node 0").unwrap();
    fs::File::open(c.mount_point(0).join("anna/held")).unwrap().sync_all().unwrap();
    c.kill9(0).unwrap();
    let started = Instant::now();
    assert_eq!(fs::read_to_string(c.mount_point(1).join("anna/held")).unwrap(), "by node 0");
    println!("what the dead node held was had after {:.1?}", started.elapsed());
    assert!(started.elapsed() < TAKEOVER, "{:?}", started.elapsed());
    assert!(c.log_text(1).contains("fenced: registration"), "{}", c.log_text(1));
    let now = status(&c);
    assert!(now.contains("registered: slot 1 life 1\n"), "{now}");
    // Both die: their registrations and the reservation stay, and are no obstacle.
    c.mount(0).unwrap();
    fs::write(c.mount_point(0).join("anna/last"), "words").unwrap();
    fs::File::open(c.mount_point(0).join("anna/last")).unwrap().sync_all().unwrap();
    (0..2).for_each(|n| c.kill9(n).unwrap());
    let left = status(&c);
    assert!(left.contains("All Registrants"), "{left}");
    let out = c.command("fsck.clusterfs").arg("-p").arg(target.url()).output().unwrap();
    assert_eq!(
        out.status.code(),
        Some(1),
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    c.mount(2).unwrap();
    assert_eq!(fs::read_to_string(c.mount_point(2).join("anna/last")).unwrap(), "words");
    c.kill9(2).unwrap();
    c.program("mkfs.clusterfs", &["-q", "--force"]).unwrap();
    let anew = status(&c);
    assert!(anew.contains("registered: nobody") && anew.contains("reservation: none"), "{anew}");
    c.finish();
}

/// The target is silent, and restarts, under delivery.
#[test]
fn the_target_fails_under_delivery() {
    const NODES: usize = 3;
    let mut target = Target::start(SIZE).unwrap();
    let c = formatted(&target, NODES + 1);
    (0..NODES).for_each(|n| c.mount(n).unwrap());
    make_boxes(&c.mount_point(0), &BOXES).unwrap();
    let all = deliver_during(&c, NODES, &BOXES, 1, || {
        std::thread::sleep(Duration::from_secs(1));
        target.suspend()?;
        std::thread::sleep(Duration::from_secs(5));
        target.resume()?;
        std::thread::sleep(Duration::from_secs(6));
        target.kill()?;
        std::thread::sleep(Duration::from_millis(500));
        target.run()?;
        std::thread::sleep(Duration::from_secs(8));
        Ok(())
    })
    .unwrap();
    println!("{} delivered, {} failed, {} returns", all.ids.len(), all.failed, returns(&c, NODES));
    (0..NODES).for_each(|n| assert_once(&c, n, &BOXES, &all.ids, read_when_back));
    c.finish_after_faults();
}

/// A kernel block device that knows no reservations is for one host. (The other host is a node on the image behind it, whose
/// process cannot be seen through the loop device.)
#[test]
fn a_plain_block_device_is_for_one_host() {
    let c = Cluster::formatted_with(3, SIZE, LIMIT, &["--lease", "2s", "--queue-time", "0"]).unwrap();
    c.mount(0).unwrap();
    let losetup = |args: &[&str]| {
        let out = std::process::Command::new("losetup").args(args).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).trim().to_string()
    };
    let device = losetup(&["--find", "--show", "--direct-io=on", c.image().to_str().unwrap()]);
    let dir = c.path().join("other");
    fs::create_dir(&dir).unwrap();
    let out = c.command("mount.clusterfs").arg(&device).arg(&dir).output();
    losetup(&["-d", &device]);
    let out = out.unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(32), "{said}");
    assert!(
        said.starts_with(&format!("mount.clusterfs: {device}")) && said.contains("cannot keep hosts apart"),
        "{said}"
    );
    c.finish();
}

/// Freed blocks go back to the array (UNMAP), or to the filesystem under the image.
#[test]
fn freed_blocks_are_given_back() {
    const FILE: u64 = 64 << 20;
    let target = Target::start(SIZE).unwrap();
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE).unwrap();
    for (device, backing) in [(target.url().into(), target.lun()), (image.path().to_owned(), image.path().to_owned())] {
        let c = Cluster::formatted_on(&device, 2, LIMIT, &LEASE).unwrap();
        let used = || fs::metadata(&backing).unwrap().blocks() * 512;
        for (options, given_back) in [("nodiscard", false), ("discard", true)] {
            c.mount_with(0, options).unwrap();
            let file = c.mount_point(0).join("large");
            fs::write(&file, vec![7; FILE as usize]).unwrap();
            fs::File::open(&file).unwrap().sync_all().unwrap();
            let before = used();
            fs::remove_file(&file).unwrap();
            c.unmount(0).unwrap();
            let freed = before.saturating_sub(used());
            println!("{}: {options}: {} MiB given back", device.display(), freed >> 20);
            assert_eq!(freed > FILE / 10 * 9, given_back, "{}: {options}: {freed} bytes", device.display());
        }
        c.finish();
    }
}

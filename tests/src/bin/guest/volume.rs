//! Two nodes on one LUN, each by a path of its own, as two hosts would be: they share, one is stopped, fenced, and comes back.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;

use crate::lio::{Lun, Shape};
use crate::machine::{ROOM, load, run as done, wait_for};

const SIZE: u64 = 128 << 20;
const LIMIT: Duration = Duration::from_secs(100);
const PATIENCE: Duration = Duration::from_secs(30);
const LEASE: [&str; 2] = ["--lease", "3s"];
/// Far below lease and queue time, which a node that cannot be fenced is waited out for: two minutes.
const FENCED_WITHIN: Duration = Duration::from_secs(15);

fn write_synced(path: &Path, what: &str) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(what.as_bytes())?;
    file.sync_all()
}

fn settings(bin: &Path) {
    // SAFETY: no other thread is there yet.
    unsafe {
        std::env::set_var("CLUSTERFS_BIN_DIR", bin);
        std::env::set_var("TMPDIR", ROOM);
    }
}

pub fn run(bin: &Path) -> String {
    load("fuse");
    settings(bin);
    let lun = Lun::new(SIZE, 2, Shape::default());
    let told = done(Command::new(bin.join("clusterfs")).args(["probe", "--write"]).arg(lun.device(0)));
    assert!(told.contains("verdict: fit for several hosts; a dead node is fenced"), "{told}");
    let mut c = Cluster::formatted_on(lun.device(0), 4, LIMIT, &LEASE).unwrap();
    for node in 0..2 {
        c.devices.insert(node, lun.device(node).to_owned());
        c.mount_with(node, "nohints").unwrap();
    }
    let (a, b) = (c.mount_point(0), c.mount_point(1));
    fs::create_dir(a.join("held")).unwrap();
    write_synced(&a.join("held/file"), "by node 0").unwrap();
    assert_eq!(fs::read_to_string(b.join("held/file")).unwrap(), "by node 0");
    write_synced(&b.join("held/second"), "by node 1").unwrap();
    assert_eq!(fs::read_to_string(a.join("held/second")).unwrap(), "by node 1");
    one_node_per_path(bin, &c, lun.device(0));
    write_synced(&a.join("held/third"), "before it stood still").unwrap();
    c.suspend(0).unwrap();
    let stopped = Instant::now();
    assert_eq!(fs::read_to_string(b.join("held/third")).unwrap(), "before it stood still");
    write_synced(&b.join("held/third"), "after it was fenced").unwrap();
    let waited = stopped.elapsed();
    assert!(waited < FENCED_WITHIN, "what a stopped node held was had after {waited:?}");
    assert!(c.log_text(1).contains("fenced: registration"), "it was not fenced:\n{}", c.log_text(1));
    c.resume(0).unwrap();
    wait_for("the fenced node comes back", PATIENCE, || {
        c.log_text(0).contains("a member of the volume again").then_some(())
    });
    let read = wait_for("the fenced node reads", PATIENCE, || fs::read_to_string(a.join("held/third")).ok());
    assert_eq!(read, "after it was fenced");
    wait_for("the fenced node writes", PATIENCE, || write_synced(&a.join("held/fourth"), "again").ok());
    assert_eq!(fs::read_to_string(b.join("held/fourth")).unwrap(), "again");
    c.finish_after_faults();
    let told = done(Command::new(bin.join("clusterfs")).arg("probe").arg(lun.device(1)));
    assert!(told.contains("registered: nobody"), "{told}");
    format!("fenced after {waited:.1?}")
}

/// A second mount by the same path, mkfs and a repair are refused while the node lives; who only reads may.
fn one_node_per_path(bin: &Path, c: &Cluster, device: &Path) {
    let dir = c.path().join("other");
    fs::create_dir(&dir).unwrap();
    let programs: [(&str, &[&str]); 4] = [
        ("mount.clusterfs", &[]),
        ("mkfs.clusterfs", &["-q", "--force"]),
        ("fsck.clusterfs", &["-p"]),
        ("clusterfs", &["probe", "--write"]),
    ];
    for (name, args) in programs {
        let mut command = Command::new(bin.join(name));
        command.args(args).arg(device);
        if name == "mount.clusterfs" {
            command.arg(&dir);
        }
        let out = command.output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(
            !out.status.success() && said.contains("in use by this host") | said.contains("this host uses"),
            "{name}: {said}"
        );
    }
    let told = done(Command::new(bin.join("clusterfs")).arg("status").arg(device));
    assert!(told.contains("clusterfs") || !told.is_empty(), "{told}");
}

//! Mounting by mount(8) from an fstab, with the options that it and systemd take there: an image file, and an iSCSI disk. Needs
//! root, the programs and the packages that `cargo xtask setup` installs.
//!
//! mount(8) looks for its helper in /sbin alone. Nothing is installed for this: each test works in a mount namespace of its own,
//! where the programs lie over /sbin.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use clusterfs_tests::cluster::{Cluster, programs};
use clusterfs_tests::iscsi_target::Target;

const LIMIT: Duration = Duration::from_secs(60);

/// A host with the programs installed and an fstab; what it mounts, only it sees.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bin = fs::canonicalize(programs().unwrap()).unwrap();
        fs::create_dir(dir.path().join("sbin")).unwrap();
        for helper in ["mount.clusterfs", "umount.fuse.clusterfs"] {
            symlink(bin.join(helper), dir.path().join("sbin").join(helper)).unwrap();
        }
        Self { dir }
    }

    fn mount_point(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn fstab(&self, lines: &[(&Path, &str, &str)]) {
        let text: String = lines
            .iter()
            .map(|(device, at, options)| {
                format!("{}  {}  clusterfs  {options}  0  0\n", device.display(), self.mount_point(at).display())
            })
            .collect();
        fs::write(self.dir.path().join("fstab"), text).unwrap();
    }

    /// Runs a script in a namespace; whatever it leaves mounted is unmounted.
    fn run(&self, script: &str) -> Output {
        let all = format!(
            "set -eu
            cd {dir}
            trap 'for d in a b c; do ! mountpoint -q $d || umount $d; done' EXIT
            sbin=$(readlink -f /sbin)
            mount -t overlay -o lowerdir=$PWD/sbin:$sbin overlay $sbin
            {script}",
            dir = self.dir.path().display()
        );
        let out = Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", &all]).output();
        out.unwrap()
    }

    fn succeed(&self, script: &str) -> String {
        let out = self.run(script);
        let text = String::from_utf8(out.stdout).unwrap() + &String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{}: {text}", out.status);
        text
    }
}

#[test]
fn an_image_is_mounted_from_fstab() {
    let c = Cluster::formatted_with(4, 256 << 20, LIMIT, &["-L", "mail"]).unwrap();
    let host = Host::new();
    let everything = "defaults,rw,_netdev,nofail,noatime,nosuid,nodev,x-systemd.requires=network-online.target,\
                      x-systemd.mount-timeout=90s,x-systemd.automount,x-systemd.requires-mounts-for=/srv,cache=64M,nohints";
    host.fstab(&[
        (&c.image(), "a", everything),
        (&c.image(), "b", "noauto,users,_netdev"),
        (Path::new("/no/such/device"), "c", "nofail,_netdev"),
    ]);
    let text = host.succeed(
        "mount -a -T fstab || test $? = 64
        echo mail > a/file
        if mountpoint -q b; then exit 9; fi
        if mountpoint -q c; then exit 9; fi
        mount -a -T fstab || test $? = 32
        grep -c \" $PWD/a \" /proc/self/mounts
        mount -T fstab b
        cat b/file
        grep -E \" $PWD/[ab] \" /proc/self/mounts
        umount a
        umount b",
    );
    let lines: Vec<&str> = text.lines().collect();
    // mount(8) goes on after the one that failed, says so, and ends with 64: some were mounted; or 32: none were.
    assert!(text.contains("/no/such/device: no such file"), "{text}");
    assert_eq!(lines[..2], ["1", "mail"], "mounted once, and read through the second mount: {text}");
    let of = |name: &str| lines.iter().find(|l| l.contains(&format!("/{name} "))).unwrap().to_string();
    let (a, b) = (of("a"), of("b"));
    assert!(a.contains(" fuse.clusterfs ") && a.contains("rw,nosuid,nodev"), "{a}");
    // What mount(8) adds for `users`.
    assert!(b.contains("nosuid,nodev,noexec"), "{b}");
    let status = c.program("clusterfs", &["status"]).unwrap();
    assert!(status.contains("0 of 4 nodes") && status.contains("free slots: 4"), "{status}");
    c.finish();
}

/// umount(8) returns when the node has left, not before, unless it is asked not to wait or the volume is mounted elsewhere as well.
#[test]
fn umount_waits_for_the_node_to_leave() {
    let c = Cluster::formatted_with(4, 512 << 20, LIMIT, &[]).unwrap();
    let host = Host::new();
    host.fstab(&[(&c.image(), "a", "noauto")]);
    host.mount_point("b");
    let bin = fs::canonicalize(programs().unwrap()).unwrap();
    let text = host.succeed(&format!(
        "nodes() {{ {status} {image} | grep -o '[0-9] of 4 nodes'; }}
        fill() {{ dd if=/dev/zero of=a/$1 bs=1M count=40 2>/dev/null; }}
        for round in 1 2 3; do
            mount -T fstab a
            fill large$round
            umount a
            nodes
        done
        mount -T fstab a
        mount --bind a b
        umount -v a
        cat b/large1 | wc -c
        nodes
        umount b
        nodes
        mount -T fstab a
        cd a
        umount ../a 2>&1 && exit 9 || echo status $?
        umount -l ../a
        cd ..
        until nodes | grep -q '^0'; do sleep 0.1; done
        umount a 2>&1 && exit 9 || echo status $?",
        status = bin.join("clusterfs").display().to_string() + " status",
        image = c.image().display(),
    ));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..3], ["0 of 4 nodes"; 3], "{text}");
    assert!(lines[4].contains("mounted elsewhere, too"), "{text}");
    assert_eq!(lines[5..8], ["41943040", "1 of 4 nodes", "0 of 4 nodes"], "{text}");
    assert!(lines[8].contains("it is in use") && lines[9] == "status 32", "{text}");
    assert!(text.ends_with("status 32\n"), "{text}");
    c.finish();
}

/// A device that is not a path: mount(8) neither changes nor resolves the name, and finds it again among what is mounted.
#[test]
fn an_iscsi_disk_is_mounted_from_fstab() {
    let target = Target::start(256 << 20).unwrap();
    let url = target.url();
    let c = Cluster::formatted_on(Path::new(&url), 3, LIMIT, &[]).unwrap();
    let host = Host::new();
    host.fstab(&[(Path::new(&url), "a", "_netdev,nofail,noatime,x-systemd.mount-timeout=90s")]);
    let text = host.succeed(
        "mount -a -T fstab
        mount -a -T fstab
        grep -c \" $PWD/a \" /proc/self/mounts
        findmnt -n -o SOURCE -T a
        echo mail > a/file
        umount a
        mount -T fstab a
        cat a/file",
    );
    assert_eq!(text, format!("1\n{url}\nmail\n"));
    let status = c.program("clusterfs", &["status"]).unwrap();
    assert!(status.contains("registered: nobody"), "{status}");
    c.finish();
}

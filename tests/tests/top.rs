//! `clusterfs top` on real mounts: which directories nodes pass to and fro, by path, and what that costs. Needs root and the
//! programs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use clusterfs_tests::cluster::Cluster;
use serde_json::Value;

#[test]
fn the_directory_that_nodes_pass_to_and_fro_is_told_by_its_path() {
    let c = Cluster::start(2);
    let (a, b) = (c.mount_point(0), c.mount_point(1));
    for dir in ["example.org", "example.org/anna", "example.org/ben"] {
        fs::create_dir(a.join(dir)).unwrap();
    }
    fs::write(a.join("example.org/ben/quiet"), "x").unwrap();
    let stop = AtomicBool::new(false);
    let (json, text) = std::thread::scope(|s| {
        for (n, root) in [&a, &b].into_iter().enumerate() {
            let (dir, stop) = (root.join("example.org/anna"), &stop);
            s.spawn(move || {
                for i in 0.. {
                    fs::write(dir.join(format!("{n}-{i}")), "busy").unwrap();
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        let top = |args: &[&str]| {
            let out = c.command("clusterfs").arg("top").args(args).arg(&a).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            String::from_utf8(out.stdout).unwrap()
        };
        let done = (top(&["--json", "-d", "1", "-n", "2"]), top(&["-d", "1"]));
        stop.store(true, Ordering::Relaxed);
        done
    });
    let reports: Vec<Value> = json.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(reports.len(), 2, "{json}");
    for r in &reports {
        let first = &r["domains"][0];
        assert_eq!(first["path"], "/example.org/anna", "{r}");
        assert!(first["given_up"].as_u64().unwrap() >= 2 && first["operations"].as_u64().unwrap() >= 2, "{r}");
        assert!(r["journal"]["size"].as_u64().unwrap() >= 1 << 20, "{r}");
        assert!(r["requests"]["create"].as_u64().unwrap() >= 2, "{r}");
    }
    let total = |r: &Value| r["locks"]["handovers"].as_u64().unwrap();
    assert!(total(&reports[1]) > total(&reports[0]), "{json}");
    assert!(text.contains("/example.org/anna\n") && text.contains("handovers/s"), "{text}");
    assert!(!text.contains('\x1b'), "no control characters in a pipe: {text}");
    // Any other directory of the mount is not the mount point.
    let out = c.command("clusterfs").arg("top").arg(a.join("example.org")).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("no clusterfs volume is mounted here"), "{said}");
    c.finish();
}

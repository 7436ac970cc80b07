//! The command as users call it: options, messages, exit codes.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

fn fsck(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fsck-clusterfs")).args(args).output().unwrap()
}

fn text(o: &Output) -> (String, String) {
    (String::from_utf8_lossy(&o.stdout).into(), String::from_utf8_lossy(&o.stderr).into())
}

fn file(dir: &Path, name: &str, contents: &[u8]) -> String {
    let path = dir.join(name);
    std::fs::write(&path, contents).unwrap();
    path.to_str().unwrap().to_string()
}

#[test]
fn usage_errors_are_16() {
    for args in [&[][..], &["-n", "-y", "x"], &["-p", "-y", "x"], &["-a", "-n", "x"], &["-z", "x"], &["x", "y"]] {
        assert_eq!(fsck(args).status.code(), Some(16), "{args:?}");
    }
    let o = fsck(&["-V"]);
    assert_eq!((o.status.code(), text(&o).0.starts_with("fsck.clusterfs ")), (Some(0), true));
}

#[test]
fn what_is_no_volume_is_8_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let zeros = file(dir.path(), "zeros", &[0; 1 << 20]);
    let noise: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let noise = file(dir.path(), "noise", &noise);
    let small = file(dir.path(), "small", &[1; 100]);
    let missing = dir.path().join("missing").to_str().unwrap().to_string();
    for (device, reason) in [
        (zeros.as_str(), "no clusterfs volume"),
        (noise.as_str(), "no clusterfs volume"),
        (small.as_str(), "too small"),
        (missing.as_str(), "no such file"),
        ("/dev/null", "neither a regular file nor a block device"),
    ] {
        for how in ["-n", "-p", "-a", "-y"] {
            let o = fsck(&[how, device]);
            let (out, err) = text(&o);
            assert_eq!(o.status.code(), Some(8), "{how} {device}: {err}");
            assert!(err.starts_with("fsck.clusterfs: ") && err.contains(reason), "{how} {device}: {err}");
            assert_eq!(out, "");
        }
    }
}

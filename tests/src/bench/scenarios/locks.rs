//! File locks: taken and given back, alone and by all nodes in turn.

use std::fs::File;
use std::os::fd::AsRawFd;

use super::super::{Done, Scenario, Work, repeat};
use crate::cluster::Result;

pub const ALL: &[Scenario] = &[Scenario {
    name: "fcntl-lock",
    about: "F_SETLKW and F_UNLCK of one file, from one process per node",
    limits: "alone: two requests; between nodes: a handover each time",
    unit: "pairs",
    nodes: &[1, 2, 4],
    prepare: |w| Ok(File::create(w.dir().join("file")).map(drop)?),
    run: fcntl_pairs,
}];

fn fcntl(file: &File, kind: libc::c_int) -> std::io::Result<()> {
    // SAFETY: an all-zero flock is valid, and lives through the call.
    unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = kind as libc::c_short;
        match libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLKW, &raw mut lock) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

fn fcntl_pairs(w: &Work) -> Result<Done> {
    let count = (w.scale.of(10_000) / w.dirs.len().pow(2)).max(2);
    w.on_all(1, |_, dir| {
        let file = File::options().read(true).write(true).open(dir.join("file"))?;
        repeat(count, |_| fcntl(&file, libc::F_WRLCK).and_then(|()| fcntl(&file, libc::F_UNLCK)))
    })
}

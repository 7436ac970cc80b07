//! Many small files: made, walked and removed.

use std::fs;
use std::path::Path;
use std::time::Instant;

use super::super::{Done, Scenario, Work, repeat};
use crate::cluster::Result;

pub const ALL: &[Scenario] = &[
    Scenario {
        name: "create",
        about: "empty files in one directory per node",
        limits: "the daemon: two requests per file; changes are logged later, together",
        unit: "files",
        nodes: &[1, 2, 4],
        prepare: own_dirs,
        run: |w| {
            let count = w.scale.of(100_000) / w.dirs.len();
            w.on_all(1, |n, dir| repeat(count, |i| fs::File::create(name(dir, n, i)).map(drop)))
        },
    },
    Scenario {
        name: "remove",
        about: "and removed again",
        limits: "the daemon: one or two requests per file",
        unit: "files",
        nodes: &[1, 2, 4],
        prepare: |w| {
            own_dirs(w)?;
            let count = w.scale.of(100_000) / w.dirs.len();
            w.on_all(1, |n, dir| repeat(count, |i| fs::File::create(name(dir, n, i)).map(drop))).map(drop)
        },
        run: |w| {
            let count = w.scale.of(100_000) / w.dirs.len();
            w.on_all(1, |n, dir| repeat(count, |i| fs::remove_file(name(dir, n, i))))
        },
    },
    Scenario {
        name: "walk-cold",
        about: "a tree of 100 directories is walked with stat of each file, as a backup does; nothing is cached",
        limits: "reads of each directory's tree, one directory after the other",
        unit: "files",
        nodes: &[1],
        prepare: |w| {
            fill(w)?;
            w.place.remount(0)
        },
        run: walk_all,
    },
    Scenario {
        name: "walk-warm",
        about: "the same, walked before",
        limits: "the kernel; directories are opened by request",
        unit: "files",
        nodes: &[1],
        prepare: |w| {
            fill(w)?;
            walk_all(w).map(drop)
        },
        run: walk_all,
    },
];

fn name(dir: &Path, thread: usize, file: usize) -> std::path::PathBuf {
    dir.join(format!("{thread}/file{file:06}"))
}

fn own_dirs(w: &Work) -> Result<()> {
    Ok((0..w.dirs.len()).try_for_each(|n| fs::create_dir(w.dir().join(n.to_string())))?)
}

fn fill(w: &Work) -> Result<()> {
    let each = (w.scale.of(100_000) / 100).max(1);
    for d in 0..100 {
        fs::create_dir(w.dir().join(d.to_string()))?;
        (0..each).try_for_each(|i| fs::write(name(w.dir(), d, i), b"small"))?;
    }
    Ok(())
}

fn walk(dir: &Path) -> std::io::Result<usize> {
    let mut files = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        files += if fs::symlink_metadata(&path)?.is_dir() { walk(&path)? } else { 1 };
    }
    Ok(files)
}

fn walk_all(w: &Work) -> Result<Done> {
    let begin = Instant::now();
    let files = walk(w.dir())?;
    Ok(Done::since(begin, files as f64))
}

//! Shared mappings of files: memory that several nodes look at.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clusterfs_tests::sys::Map;

use crate::{Scenario, bytes, same};

pub const ALL: &[(&str, Scenario)] = &[
    ("reader-sees-writes", reader_sees_writes),
    ("writer-with-msync", writer_with_msync),
    ("written-after-others-looked", written_after_others_looked),
    ("unmapped-and-closed", unmapped_and_closed),
    ("memory-in-turn", memory_in_turn),
    ("memory-and-write-in-turn", memory_and_write_in_turn),
    ("all-at-once", all_at_once),
];

const LEN: usize = 40_960;

fn open(dir: &Path) -> File {
    File::options().read(true).write(true).open(dir.join("f")).unwrap()
}

fn map(dir: &Path, write: bool) -> Map {
    Map::new(&open(dir), LEN, write).unwrap()
}

fn reader_sees_writes(me: &Path, others: &[PathBuf]) {
    let mut data = bytes(1, LEN);
    fs::write(me.join("f"), &data).unwrap();
    let maps: Vec<Map> = others.iter().map(|o| map(o, false)).collect();
    maps.iter().for_each(|m| same("in memory", &m.read(0, LEN), &data));
    let f = open(me);
    for (i, at) in [0, 4095, 4096, 20_000, LEN - 10].into_iter().enumerate() {
        let patch = bytes(i as u64, 10);
        f.write_all_at(&patch, at as u64).unwrap();
        data[at..at + 10].copy_from_slice(&patch);
        maps.iter().for_each(|m| same("in memory", &m.read(0, LEN), &data));
    }
}

fn writer_with_msync(me: &Path, others: &[PathBuf]) {
    let mut data = bytes(2, LEN);
    fs::write(me.join("f"), &data).unwrap();
    let open_before: Vec<File> = others.iter().map(|o| open(o)).collect();
    let maps: Vec<Map> = others.iter().map(|o| map(o, false)).collect();
    maps.iter().for_each(|m| same("in memory", &m.read(0, LEN), &data));
    let mine = map(me, true);
    for (i, at) in [0, 5000, 8190, LEN - 10].into_iter().enumerate() {
        let patch = bytes(100 + i as u64, 10);
        mine.write(at, &patch);
        data[at..at + 10].copy_from_slice(&patch);
        // Seen by this node's other ways at once.
        same("on the writer's node", &fs::read(me.join("f")).unwrap(), &data);
        mine.sync().unwrap();
        for ((o, f), m) in others.iter().zip(&open_before).zip(&maps) {
            let mut got = vec![0; LEN];
            f.read_exact_at(&mut got, 0).unwrap();
            same("opened before", &got, &data);
            same("by name", &fs::read(o.join("f")).unwrap(), &data);
            same("in memory", &m.read(0, LEN), &data);
        }
    }
}

/// The page was writable before the others looked: the next store must be noticed again.
fn written_after_others_looked(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), vec![0; LEN]).unwrap();
    let mine = map(me, true);
    for i in 1..=20u8 {
        mine.write(4096, &[i]);
        mine.sync().unwrap();
        for o in others {
            let mut got = [0];
            open(o).read_exact_at(&mut got, 4096).unwrap();
            assert_eq!(got, [i], "store {i}");
        }
    }
}

fn unmapped_and_closed(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), vec![0; LEN]).unwrap();
    for i in 1..=5u8 {
        let file = open(me);
        let mine = Map::new(&file, LEN, true).unwrap();
        (0..LEN / 4096).for_each(|page| mine.write(page * 4096 + 1, &[i]));
        drop(mine);
        drop(file);
        for o in others {
            let got = fs::read(o.join("f")).unwrap();
            assert!((0..LEN / 4096).all(|page| got[page * 4096 + 1] == i), "round {i}");
        }
    }
}

/// A counter in memory, counted up by each node in turn.
fn memory_in_turn(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), vec![0; LEN]).unwrap();
    let mut maps = vec![map(me, true)];
    maps.extend(others.iter().map(|o| map(o, true)));
    for i in 0..60u8 {
        let m = &maps[usize::from(i) % maps.len()];
        let seen = m.read(10_000, 1)[0];
        assert_eq!(seen, i, "node {} of the scene", usize::from(i) % maps.len());
        m.write(10_000, &[i + 1]);
        m.sync().unwrap();
    }
}

fn memory_and_write_in_turn(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), vec![0; LEN]).unwrap();
    let mine = map(me, true);
    let theirs: Vec<File> = others.iter().map(|o| open(o)).collect();
    for i in 0..40u8 {
        let (at, value) = (usize::from(i) * 1000, [i + 1; 500]);
        mine.write(at, &value);
        mine.sync().unwrap();
        let f = &theirs[usize::from(i) % theirs.len()];
        f.write_all_at(&value, at as u64 + 500).unwrap();
        let mut got = [0; 1000];
        f.read_exact_at(&mut got, at as u64).unwrap();
        assert!(got == [i + 1; 1000], "round {i} by read");
        same("in the writer's memory", &mine.read(at, 1000), &[i + 1; 1000]);
    }
}

/// Stores, writes, reads and truncations from everywhere: nobody waits for ever, nobody loses its own bytes.
fn all_at_once(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), vec![0; LEN]).unwrap();
    let all: Vec<&Path> = std::iter::once(me).chain(others.iter().map(PathBuf::as_path)).collect();
    let started = Instant::now();
    std::thread::scope(|s| {
        for (n, d) in all.iter().enumerate() {
            s.spawn(move || {
                let m = map(d, true);
                let f = open(d);
                // Pages of its own: the kernel writes back whole ones.
                let at = |i: usize| (i % 2 * 4 + n) * 4096;
                for i in 0..30usize {
                    let value = [(i + 1) as u8; 400];
                    m.write(at(i), &value);
                    f.write_all_at(&value, at(i) as u64 + 400).unwrap();
                    if i % 7 == 3 {
                        m.sync().unwrap();
                    }
                    let mut got = [0; 800];
                    f.read_exact_at(&mut got, at(i) as u64).unwrap();
                    assert!(got == [(i + 1) as u8; 800], "node {n} lost bytes of round {i}");
                }
            });
        }
    });
    println!("  30 rounds of {} nodes in {:?}", all.len(), started.elapsed());
    let expected = fs::read(me.join("f")).unwrap();
    for n in 0..all.len() {
        for i in 28..30 {
            let at = (i % 2 * 4 + n) * 4096;
            assert!(expected[at..at + 800] == [(i + 1) as u8; 800], "round {i} of node {n} at the end");
        }
    }
    others.iter().for_each(|o| same("at the end", &fs::read(o.join("f")).unwrap(), &expected));
}

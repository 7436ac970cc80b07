//! Bytes of files.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clusterfs_tests::sys::{self, Copy};

use crate::{Scenario, Warm, bytes, same, warm_all};

pub const ALL: &[(&str, Scenario)] = &[
    ("small", small),
    ("large", large),
    ("patches", patches),
    ("grows-out-of-the-inode", grows_out_of_the_inode),
    ("sparse", sparse),
    ("shrink", shrink),
    ("grow", grow),
    ("shrink-then-grow", shrink_then_grow),
    ("o-trunc", o_trunc),
    ("holes", holes),
    ("zero-range", zero_range),
    ("allocate", allocate),
    ("copies", copies),
    ("follow", follow),
    ("same-page", same_page),
    ("append-in-turn", append_in_turn),
    ("append-at-once", append_at_once),
    ("count-in-turn", count_in_turn),
    ("sync-and-reopen", sync_and_reopen),
];

fn write_at(path: &Path, at: u64, data: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(data, at).unwrap();
}

/// By name, by what was opened before, and by attributes.
fn expect(others: &[PathBuf], warm: &[Warm], expected: &[u8]) {
    for (o, w) in others.iter().zip(warm) {
        let path = o.join("f");
        let what = path.display().to_string();
        assert_eq!(fs::metadata(&path).unwrap().len(), expected.len() as u64, "{what}: size");
        let mut got = vec![0; expected.len() + 1];
        let mut len = 0;
        loop {
            match w.file().read_at(&mut got[len..], len as u64).unwrap() {
                0 => break,
                n => len += n,
            }
        }
        same(&format!("{what}, opened before"), &got[..len], expected);
        same(&what, &fs::read(&path).unwrap(), expected);
    }
}

fn replace(me: &Path, others: &[PathBuf], before: &[u8], after: &[u8]) {
    fs::write(me.join("f"), before).unwrap();
    let warm = warm_all(others, "f");
    write_at(&me.join("f"), 0, after);
    expect(others, &warm, after);
    // The other way, by the one that looked: now the maker's caches are warm.
    write_at(&others[0].join("f"), 0, before);
    same("back on the maker", &fs::read(me.join("f")).unwrap(), before);
    expect(others, &warm, before);
}

fn small(me: &Path, others: &[PathBuf]) {
    for len in [1, 100, 1000] {
        replace(me, others, &bytes(1, len), &bytes(2, len));
    }
}

fn large(me: &Path, others: &[PathBuf]) {
    replace(me, others, &bytes(3, 1_500_017), &bytes(4, 1_500_017));
}

fn patches(me: &Path, others: &[PathBuf]) {
    let mut data = bytes(5, 300_000);
    fs::write(me.join("f"), &data).unwrap();
    let warm = warm_all(others, "f");
    for (i, (at, len)) in
        [(0, 1), (4095, 2), (4096, 4096), (65_000, 70_000), (299_999, 1), (8191, 1)].into_iter().enumerate()
    {
        let patch = bytes(100 + i as u64, len);
        data[at..at + len].copy_from_slice(&patch);
        // Every node in turn, the maker first.
        let by = if i % (others.len() + 1) == 0 { me } else { &others[i % (others.len() + 1) - 1] };
        write_at(&by.join("f"), at as u64, &patch);
        expect(others, &warm, &data);
        same("on the maker", &fs::read(me.join("f")).unwrap(), &data);
    }
}

fn grows_out_of_the_inode(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), bytes(6, 10)).unwrap();
    let warm = warm_all(others, "f");
    let mut data = bytes(6, 10);
    for len in [1000, 1024, 1025, 5000, 100_000] {
        let more = bytes(len as u64, len - data.len());
        OpenOptions::new().append(true).open(me.join("f")).unwrap().write_all(&more).unwrap();
        data.extend(more);
        expect(others, &warm, &data);
    }
    data.truncate(7);
    File::options().write(true).open(me.join("f")).unwrap().set_len(7).unwrap();
    expect(others, &warm, &data);
}

fn sparse(me: &Path, others: &[PathBuf]) {
    const AT: usize = 10 << 20;
    fs::write(me.join("f"), b"head").unwrap();
    let warm = warm_all(others, "f");
    write_at(&me.join("f"), AT as u64, b"tail");
    let mut data = b"head".to_vec();
    data.resize(AT, 0);
    data.extend(b"tail");
    expect(others, &warm, &data);
    for o in others {
        let blocks = sys::stat(&o.join("f")).unwrap().st_blocks;
        assert!((1..=64).contains(&blocks), "a sparse file has {blocks} blocks of 512 bytes");
        let f = File::open(o.join("f")).unwrap();
        let hole = sys::seek(&f, 0, libc::SEEK_HOLE).unwrap();
        assert!((4..=65_536).contains(&hole), "the hole begins at {hole}");
        let data = sys::seek(&f, hole as i64, libc::SEEK_DATA).unwrap();
        assert!((AT - 65_536..=AT).contains(&(data as usize)), "data begins at {data}");
    }
    write_at(&others[0].join("f"), (AT / 2) as u64, b"middle");
    let data = bytes_of(&me.join("f"), AT / 2, 6);
    same("in the former hole", &data, b"middle");
}

fn bytes_of(path: &Path, at: usize, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut data, at as u64).unwrap();
    data
}

fn set_len(path: &Path, len: u64) {
    File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

fn shrink(me: &Path, others: &[PathBuf]) {
    let data = bytes(7, 50_000);
    fs::write(me.join("f"), &data).unwrap();
    let warm = warm_all(others, "f");
    for len in [49_999, 40_960, 5000, 4096, 100, 0] {
        set_len(&me.join("f"), len as u64);
        expect(others, &warm, &data[..len]);
    }
}

fn grow(me: &Path, others: &[PathBuf]) {
    let mut data = bytes(8, 3000);
    fs::write(me.join("f"), &data).unwrap();
    let warm = warm_all(others, "f");
    for len in [3001, 4096, 10_000, 200_000] {
        set_len(&me.join("f"), len as u64);
        data.resize(len, 0);
        expect(others, &warm, &data);
    }
}

/// What was cut off must not come back from any cache.
fn shrink_then_grow(me: &Path, others: &[PathBuf]) {
    let mut data = bytes(9, 20_000);
    fs::write(me.join("f"), &data).unwrap();
    let warm = warm_all(others, "f");
    for (short, long) in [(15_000, 20_000), (10_000, 12_288), (4_097, 30_000), (10, 5_000)] {
        set_len(&me.join("f"), short as u64);
        set_len(&others[0].join("f"), long as u64);
        data.truncate(short);
        data.resize(long, 0);
        expect(others, &warm, &data);
        same("on the maker", &fs::read(me.join("f")).unwrap(), &data);
    }
}

fn o_trunc(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), bytes(10, 30_000)).unwrap();
    let warm = warm_all(others, "f");
    let mut f = File::create(me.join("f")).unwrap();
    expect(others, &warm, b"");
    f.write_all(b"new").unwrap();
    expect(others, &warm, b"new");
    File::create(others[0].join("f")).unwrap();
    same("on the maker", &fs::read(me.join("f")).unwrap(), b"");
    // The maker's position is behind the end now.
    f.write_all(b"more").unwrap();
    expect(others, &warm, b"\0\0\0more");
}

fn holes(me: &Path, others: &[PathBuf]) {
    let mut data = bytes(11, 100_000);
    fs::write(me.join("f"), &data).unwrap();
    let warm = warm_all(others, "f");
    let before = sys::stat(&others[0].join("f")).unwrap().st_blocks;
    let f = File::options().write(true).open(me.join("f")).unwrap();
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    for (at, len) in [(8192, 16_384), (30_001, 10_000), (99_000, 50_000)] {
        sys::fallocate(&f, punch, at, len).unwrap();
        let (from, to) = (at as usize, data.len().min((at + len) as usize));
        data[from..to].fill(0);
        expect(others, &warm, &data);
    }
    let after = sys::stat(&others[0].join("f")).unwrap().st_blocks;
    assert!(after <= before - 32, "{before} blocks before, {after} after");
    let f = File::open(others[0].join("f")).unwrap();
    assert_eq!(sys::seek(&f, 0, libc::SEEK_HOLE).unwrap(), 8192);
    assert_eq!(sys::seek(&f, 8192, libc::SEEK_DATA).unwrap(), 24_576);
}

fn zero_range(me: &Path, others: &[PathBuf]) {
    let mut data = bytes(12, 40_000);
    fs::write(me.join("f"), &data).unwrap();
    let warm = warm_all(others, "f");
    let f = File::options().write(true).open(me.join("f")).unwrap();
    sys::fallocate(&f, libc::FALLOC_FL_ZERO_RANGE, 5000, 20_000).unwrap();
    data[5000..25_000].fill(0);
    expect(others, &warm, &data);
    sys::fallocate(&f, libc::FALLOC_FL_ZERO_RANGE, 39_000, 5000).unwrap();
    data.truncate(39_000);
    data.resize(44_000, 0);
    expect(others, &warm, &data);
}

fn allocate(me: &Path, others: &[PathBuf]) {
    let mut data = b"x".to_vec();
    fs::write(me.join("f"), &data).unwrap();
    let warm = warm_all(others, "f");
    let f = File::options().write(true).open(me.join("f")).unwrap();
    sys::fallocate(&f, libc::FALLOC_FL_KEEP_SIZE, 0, 100_000).unwrap();
    expect(others, &warm, &data);
    sys::fallocate(&f, 0, 0, 100_000).unwrap();
    data.resize(100_000, 0);
    expect(others, &warm, &data);
    write_at(&others[0].join("f"), 50_000, b"into the allocated");
    data[50_000..50_018].copy_from_slice(b"into the allocated");
    expect(others, &warm, &data);
    same("on the maker", &fs::read(me.join("f")).unwrap(), &data);
}

fn copies(me: &Path, others: &[PathBuf]) {
    let data = bytes(13, 70_000);
    fs::write(me.join("from"), &data).unwrap();
    for how in [Copy::Sendfile, Copy::CopyFileRange] {
        fs::write(me.join("f"), b"before").unwrap();
        let warm = warm_all(others, "f");
        // The source is read on another node than it was written on.
        let from = File::open(others[0].join("from")).unwrap();
        let to = File::options().write(true).open(others[0].join("f")).unwrap();
        let mut left = data.len();
        while left > 0 {
            let n = sys::copy(how, &from, &to, left).unwrap_or_else(|e| panic!("{how:?}: {e}"));
            assert!(n > 0, "{how:?} ended early");
            left -= n as usize;
        }
        expect(others, &warm, &data);
        same("on the maker", &fs::read(me.join("f")).unwrap(), &data);
    }
}

/// As `tail -f` does: the end of the file is not the end for ever.
fn follow(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"").unwrap();
    let mut readers: Vec<File> = others.iter().map(|o| File::open(o.join("f")).unwrap()).collect();
    let mut writer = OpenOptions::new().append(true).open(me.join("f")).unwrap();
    for i in 0..20 {
        let line = format!("line {i}\n").into_bytes().repeat(1 + i * 37);
        writer.write_all(&line).unwrap();
        for r in &mut readers {
            let mut got = Vec::new();
            r.read_to_end(&mut got).unwrap();
            same("what was added", &got, &line);
        }
    }
}

/// Every node writes its own bytes of one page, again and again.
fn same_page(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), vec![0; 4096]).unwrap();
    let all: Vec<&Path> = std::iter::once(me).chain(others.iter().map(PathBuf::as_path)).collect();
    let files: Vec<File> =
        all.iter().map(|d| File::options().read(true).write(true).open(d.join("f")).unwrap()).collect();
    std::thread::scope(|s| {
        for (n, f) in files.iter().enumerate() {
            s.spawn(move || {
                for round in 1..=30u8 {
                    let at = (n * 1000) as u64;
                    f.write_all_at(&[round; 1000], at).unwrap();
                    let mut got = [0; 1000];
                    f.read_exact_at(&mut got, at).unwrap();
                    assert!(got == [round; 1000], "node {n} lost its own bytes");
                }
            });
        }
    });
    let mut expected = vec![30; 1000 * all.len()];
    expected.resize(4096, 0);
    for d in &all {
        same("at the end", &fs::read(d.join("f")).unwrap(), &expected);
    }
}

fn append_in_turn(me: &Path, others: &[PathBuf]) {
    let open = |d: &Path| OpenOptions::new().append(true).create(true).open(d.join("f")).unwrap();
    let mut files = vec![open(me)];
    files.extend(others.iter().map(|d| open(d)));
    let mut expected = Vec::new();
    for round in 0..8 {
        for (n, f) in files.iter_mut().enumerate() {
            let record = format!("{round} {n};").repeat(1 + 300 * round);
            f.write_all(record.as_bytes()).unwrap();
            expected.extend(record.bytes());
            same("after an append", &fs::read(others[(round + n) % others.len()].join("f")).unwrap(), &expected);
        }
    }
    same("on the maker", &fs::read(me.join("f")).unwrap(), &expected);
}

/// No record lost, torn or twice, and those of one node in its order.
fn append_at_once(me: &Path, others: &[PathBuf]) {
    const RECORDS: usize = 60;
    let all: Vec<&Path> = std::iter::once(me).chain(others.iter().map(PathBuf::as_path)).collect();
    std::thread::scope(|s| {
        for (n, d) in all.iter().enumerate() {
            s.spawn(move || {
                let mut f = OpenOptions::new().append(true).create(true).open(d.join("f")).unwrap();
                for i in 0..RECORDS {
                    let record = format!("[{n} {i} {}]", "x".repeat(i * 53 % 700));
                    assert_eq!(f.write(record.as_bytes()).unwrap(), record.len());
                }
            });
        }
    });
    let text = fs::read_to_string(others[0].join("f")).unwrap();
    assert_eq!(text, fs::read_to_string(me.join("f")).unwrap());
    let mut next = vec![0; all.len()];
    for record in text.split_inclusive(']') {
        let inner = record.strip_prefix('[').and_then(|r| r.strip_suffix(']'));
        let mut parts = inner.unwrap_or_else(|| panic!("torn: {record:?}")).split(' ');
        let (n, i): (usize, usize) = (parts.next().unwrap().parse().unwrap(), parts.next().unwrap().parse().unwrap());
        assert_eq!(parts.next().unwrap().len(), i * 53 % 700, "torn: {record:?}");
        assert_eq!(i, next[n], "node {n}: record {i} where {} was due", next[n]);
        next[n] += 1;
    }
    assert_eq!(next, vec![RECORDS; all.len()]);
}

/// Read, add one, write, on each node in turn: stale bytes would lose a count.
fn count_in_turn(me: &Path, others: &[PathBuf]) {
    fs::write(me.join("f"), b"0").unwrap();
    let open = |d: &Path| File::options().read(true).write(true).open(d.join("f")).unwrap();
    let mut files = vec![open(me)];
    files.extend(others.iter().map(|d| open(d)));
    for expected in 1..=60 {
        let at = expected % files.len();
        let f = &mut files[at];
        let mut text = String::new();
        f.seek(SeekFrom::Start(0)).unwrap();
        f.read_to_string(&mut text).unwrap();
        let next = text.parse::<usize>().unwrap() + 1;
        assert_eq!(next, expected, "node {at} of the scene read an old count");
        f.write_all_at(next.to_string().as_bytes(), 0).unwrap();
    }
}

fn sync_and_reopen(me: &Path, others: &[PathBuf]) {
    for i in 0..5u64 {
        let data = bytes(20 + i, 10_000);
        let mut f = File::create(me.join("f")).unwrap();
        f.write_all(&data).unwrap();
        f.sync_all().unwrap();
        drop(f);
        let warm = warm_all(others, "f");
        expect(others, &warm, &data);
    }
}

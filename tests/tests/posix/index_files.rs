//! Files that programs keep mapped and change under a lock, as Dovecot does with its indexes (mmap_disable = no): who has the
//! lock sees all that was done under it before, on whichever node, and in memory that was mapped long ago.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::sys::Map;

const PAGE: usize = 4096;
const PAGES: usize = 16;
const LEN: usize = PAGE * PAGES;

/// A dot lock: the file `index.lock` is made by one process at a time.
struct DotLock(PathBuf);

impl DotLock {
    fn take(dir: &Path) -> Self {
        let path = dir.join("index.lock");
        loop {
            match File::options().write(true).create_new(true).open(&path) {
                Ok(_) => return Self(path),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => std::thread::sleep(Duration::from_millis(1)),
                Err(e) => panic!("{}: {e}", path.display()),
            }
        }
    }
}

impl Drop for DotLock {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}

fn index(dir: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(dir.join("index")).unwrap()
}

/// A mailbox with an index of zeros; its directory on each node.
fn mailbox(c: &Cluster, nodes: usize) -> Vec<PathBuf> {
    let dirs: Vec<PathBuf> = (0..nodes).map(|n| c.mount_point(n).join("box")).collect();
    fs::create_dir(&dirs[0]).unwrap();
    index(&dirs[0]).set_len(LEN as u64).unwrap();
    dirs
}

fn word(map: &Map, at: usize) -> u64 {
    u64::from_le_bytes(map.read(at, 8).try_into().unwrap())
}

/// One writer with write and fsync, readers that mapped the file once, read-only, before anything was written.
#[test]
fn a_map_made_long_ago_shows_what_was_written_under_the_lock() {
    let c = Cluster::start(3);
    let dirs = mailbox(&c, 3);
    let maps: Vec<Map> =
        dirs[1..].iter().map(|d| Map::new(&File::open(d.join("index")).unwrap(), LEN, false).unwrap()).collect();
    assert!(maps.iter().all(|m| word(m, 0) == 0));
    let file = index(&dirs[0]);
    for round in 1..=60u64 {
        {
            let _lock = DotLock::take(&dirs[0]);
            for page in 0..PAGES {
                file.write_all_at(&(round * 100 + page as u64).to_le_bytes(), (page * PAGE + 8) as u64).unwrap();
            }
            file.write_all_at(&round.to_le_bytes(), 0).unwrap();
            file.sync_all().unwrap();
        }
        for (dir, map) in dirs[1..].iter().zip(&maps) {
            let _lock = DotLock::take(dir);
            assert_eq!(word(map, 0), round, "the header");
            for page in 0..PAGES {
                assert_eq!(word(map, page * PAGE + 8), round * 100 + page as u64, "round {round}, page {page}");
            }
        }
    }
    drop((file, maps));
    c.finish();
}

/// Writers everywhere, by stores into memory: every one of them counts up what the one before left.
#[test]
fn stores_into_maps_take_turns_under_a_dot_lock() {
    const ROUNDS: u64 = 60;
    let c = Cluster::start(3);
    let dirs = mailbox(&c, 3);
    std::thread::scope(|s| {
        for dir in &dirs {
            s.spawn(move || {
                let map = Map::new(&index(dir), LEN, true).unwrap();
                for _ in 0..ROUNDS {
                    let _lock = DotLock::take(dir);
                    let all: Vec<u64> = (0..PAGES).map(|p| word(&map, p * PAGE)).collect();
                    assert!(all.iter().all(|n| *n == all[0]), "pages of different rounds: {all:?}");
                    // The first and the last pages last, to be torn if anything can be.
                    for page in (1..PAGES - 1).chain([0, PAGES - 1]) {
                        map.write(page * PAGE, &(all[0] + 1).to_le_bytes());
                    }
                    map.sync().unwrap();
                }
            });
        }
    });
    let end = Map::new(&index(&dirs[1]), LEN, false).unwrap();
    assert_eq!(word(&end, 0), ROUNDS * dirs.len() as u64);
    drop(end);
    c.finish();
}

/// An index is cut short and grows again under the eyes of those who have it mapped. A kernel learns of a new size by
/// fstat, which programs do before they touch what lies behind the old one.
#[test]
fn a_mapped_file_is_cut_short_and_grows_again() {
    let c = Cluster::start(2);
    let dirs = mailbox(&c, 2);
    let files: Vec<File> = dirs.iter().map(|d| index(d)).collect();
    let maps: Vec<Map> = files.iter().map(|f| Map::new(f, LEN, true).unwrap()).collect();
    let sizes_are = |len: usize| files.iter().for_each(|f| assert_eq!(f.metadata().unwrap().len(), len as u64));
    for round in 1..=20u8 {
        files[0].write_all_at(&[round; LEN], 0).unwrap();
        assert!(maps.iter().all(|m| m.read(0, LEN) == [round; LEN]), "round {round}, before");
        // Ends within a page: the rest of it must not come back.
        let cut = usize::from(round) * 3000;
        files[usize::from(round) % 2].set_len(cut as u64).unwrap();
        sizes_are(cut);
        let last = cut / PAGE * PAGE;
        assert!(maps.iter().all(|m| m.read(last, cut - last) == vec![round; cut - last]), "round {round}, cut");
        files[0].set_len(LEN as u64).unwrap();
        sizes_are(LEN);
        for m in &maps {
            let got = m.read(0, LEN);
            assert!(got[..cut] == vec![round; cut] && got[cut..] == vec![0; LEN - cut], "round {round}, grown again");
        }
        maps[1].write(LEN - 8, &[round; 8]);
        maps[1].sync().unwrap();
        assert_eq!(maps[0].read(LEN - 8, 8), [round; 8]);
    }
    drop((files, maps));
    c.finish();
}

/// A log that is appended to by write and read by maps made anew as it grows; now and then it is replaced by rename.
#[test]
fn a_log_grows_and_is_replaced() {
    let c = Cluster::start(2);
    let dirs = mailbox(&c, 2);
    let mut expected = Vec::new();
    fs::write(dirs[0].join("log"), b"").unwrap();
    let (mut open, mut replaced) = (File::open(dirs[1].join("log")).unwrap(), 0);
    for round in 0..120usize {
        let writer = &dirs[round % 2];
        {
            let _lock = DotLock::take(writer);
            if round % 40 == 39 {
                expected = b"begun anew".to_vec();
                fs::write(writer.join("log.new"), &expected).unwrap();
                fs::rename(writer.join("log.new"), writer.join("log")).unwrap();
            }
            let record = vec![round as u8; 100 + round * 7];
            let mut log = File::options().append(true).open(writer.join("log")).unwrap();
            log.write_all(&record).unwrap();
            log.sync_data().unwrap();
            expected.extend_from_slice(&record);
        }
        let _lock = DotLock::take(&dirs[1]);
        let there = fs::metadata(dirs[1].join("log")).unwrap();
        if there.ino() != open.metadata().unwrap().ino() {
            open = File::open(dirs[1].join("log")).unwrap();
            replaced += 1;
        }
        assert_eq!(open.metadata().unwrap().len(), expected.len() as u64, "round {round}");
        let map = Map::new(&open, expected.len(), false).unwrap();
        assert!(map.read(0, expected.len()) == expected, "round {round}");
    }
    assert_eq!(replaced, 3);
    drop(open);
    c.finish();
}

const RECORD: [u8; 24] = *b"REC:appended in its turn";

/// The last bytes of the file, through the map and through the kernel's cache.
fn look(reader: &File, map: &Map, at: usize) -> (Vec<u8>, Vec<u8>) {
    let mut read = [0; 4];
    reader.read_exact_at(&mut read, at as u64).unwrap();
    (read.to_vec(), map.read(at, 4))
}

fn size(file: &File) -> usize {
    file.metadata().unwrap().len() as usize
}

/// Threads on two nodes append in turns and look, through maps and the page cache, at what the others appended, while others look at
/// the end of the file all the time and without a turn. Those may see any state between two turns; but nothing of what they
/// bring into the cache, nor of the sizes that they are told, may be in the way of who has the turn, nor a size be told that
/// cannot be mapped.
#[test]
fn who_looks_beside_a_writer_leaves_nothing_old() {
    const HEAD: usize = 16;
    const WORKERS: usize = 4;
    const EACH: usize = 250;
    const LONGEST: usize = HEAD + WORKERS * EACH * RECORD.len();
    let c = Cluster::start(2);
    let path = |n: usize| c.mount_point(n % 2).join("log");
    fs::write(path(0), [b'H'; HEAD]).unwrap();
    let (turn, over) = (Mutex::new(()), AtomicBool::new(false));
    let append = |worker: usize| {
        let writer = File::options().read(true).write(true).open(path(worker)).unwrap();
        let reader = File::open(path(worker)).unwrap();
        let map = Map::new(&writer, LONGEST, false).unwrap();
        let mut seen = HEAD;
        for i in 0..EACH {
            let _mine = turn.lock().unwrap();
            let end = size(&reader);
            for at in (seen..end).step_by(RECORD.len()) {
                let expected = RECORD[..4].to_vec();
                let got = look(&reader, &map, at);
                assert_eq!(got, (expected.clone(), expected), "worker {worker}, turn {i}, byte {at} of {end}");
            }
            writer.write_all_at(&RECORD, end as u64).unwrap();
            seen = end;
        }
    };
    let poll = |node: usize| {
        let reader = File::open(path(node)).unwrap();
        let map = Map::new(&reader, LONGEST, false).unwrap();
        while !over.load(Relaxed) {
            look(&reader, &map, size(&reader) - 4);
        }
    };
    std::thread::scope(|s| {
        (0..4).for_each(|n| drop(s.spawn(move || poll(n))));
        let all: Vec<_> = (0..WORKERS).map(|w| s.spawn(move || append(w))).collect();
        let results: Vec<_> = all.into_iter().map(|t| t.join()).collect();
        over.store(true, Relaxed);
        results.into_iter().for_each(|r| r.unwrap());
    });
    assert_eq!(fs::metadata(path(1)).unwrap().len() as usize, LONGEST);
    c.finish();
}

/// A log that one node appends to is looked up by its names on the other, which has read it, again and again: the kernel must
/// learn each time that it has grown, while the directory goes to and fro. Once a lookup kept the directory while it asked for it
/// again, and both nodes stood still.
#[test]
fn a_log_that_grows_is_looked_up_by_its_name() {
    const APPENDS: usize = 400;
    /// One lookup of a name at a time is all that the kernel asks for.
    const NAMES: usize = 8;
    const STANDSTILL: Duration = Duration::from_secs(10);
    let c = Cluster::start(2);
    let dirs = mailbox(&c, 2);
    let log = |node: usize, name: usize| dirs[node].join(format!("log{name}"));
    fs::write(log(0, 0), RECORD).unwrap();
    (1..NAMES).for_each(|name| fs::hard_link(log(0, 0), log(0, name)).unwrap());
    let (over, looks, appends) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let append = || -> std::io::Result<()> {
        let mut f = File::options().append(true).open(log(1, 0))?;
        while !over.load(Relaxed) {
            f.write_all(&RECORD)?;
            appends.fetch_add(1, Relaxed);
            let seen = looks.load(Relaxed);
            while looks.load(Relaxed) < seen + NAMES && !over.load(Relaxed) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(())
    };
    let look = |name: usize| -> std::io::Result<()> {
        while !over.load(Relaxed) {
            let size = fs::metadata(log(0, name))?.len();
            File::open(log(0, name))?.read_exact_at(&mut [0], size - 1)?;
            looks.fetch_add(1, Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|s| {
        let mut all: Vec<_> = (0..NAMES).map(|name| s.spawn(move || look(name))).collect();
        all.push(s.spawn(append));
        let steps = || (looks.load(Relaxed), appends.load(Relaxed));
        let (mut before, mut moved) = (steps(), Instant::now());
        while before.1 < APPENDS && moved.elapsed() < STANDSTILL {
            std::thread::sleep(Duration::from_millis(20));
            if steps() != before {
                (before, moved) = (steps(), Instant::now());
            }
        }
        over.store(true, Relaxed);
        let stands = before.1 < APPENDS;
        if stands {
            // Or the threads would never end.
            (0..2).for_each(|n| c.kill9(n).unwrap());
        }
        let results: Vec<_> = all.into_iter().map(|t| t.join().unwrap()).collect();
        println!("{} looks, {} appends", before.0, before.1);
        assert!(!stands, "both nodes stand still");
        results.into_iter().for_each(|r| r.unwrap());
    });
    c.finish();
}

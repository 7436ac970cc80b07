//! All nodes want the same name at the same moment: exactly one gets it, and all agree who.
//!
//! This is what dot-locks, maildir names and every lock file rest on. Needs root and the programs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::io::Result;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::sys;

const NODES: usize = 4;
const ROUNDS: usize = 2500;

/// What one node got in one round: the number of the inode that it won with, or the error.
type Outcome = std::result::Result<u64, i32>;

fn outcome(r: Result<u64>) -> Outcome {
    r.map_err(|e| e.raw_os_error().unwrap_or(0))
}

fn ino(path: &Path) -> Result<u64> {
    Ok(sys::stat(path)?.st_ino)
}

/// Plays all rounds, one thread a node, all starting each round together. `attempt` gets the node, its directory and the round.
fn rounds(
    c: &Cluster,
    kind: &str,
    rounds: usize,
    attempt: impl Fn(usize, &Path, usize) -> Result<u64> + Sync,
) -> Vec<Vec<Outcome>> {
    let barrier = Barrier::new(NODES);
    let started = Instant::now();
    let outcomes: Vec<(Vec<Outcome>, Duration)> = std::thread::scope(|s| {
        let threads: Vec<_> = (0..NODES)
            .map(|n| {
                let (dir, barrier, attempt) = (c.mount_point(n).join(kind), &barrier, &attempt);
                s.spawn(move || {
                    let mut longest = Duration::ZERO;
                    let all = (0..rounds)
                        .map(|round| {
                            barrier.wait();
                            let started = Instant::now();
                            let got = outcome(attempt(n, &dir, round));
                            longest = longest.max(started.elapsed());
                            got
                        })
                        .collect();
                    (all, longest)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let wins: Vec<usize> = outcomes.iter().map(|(o, _)| o.iter().filter(|r| r.is_ok()).count()).collect();
    let longest = outcomes.iter().map(|(_, l)| *l).max().unwrap();
    let took = started.elapsed();
    println!(
        "{kind}: {rounds} rounds in {took:.1?} ({:.1?} each, the longest call {longest:.1?}), won by {wins:?}",
        took / rounds as u32
    );
    outcomes.into_iter().map(|(o, _)| o).collect()
}

/// Exactly one winner a round, `lost` for the others; `name` is the winner's on every node, and nothing else is.
fn check(c: &Cluster, kind: &str, all: &[Vec<Outcome>], lost: i32, name: impl Fn(usize, usize) -> String) {
    let rounds = all[0].len();
    let mut winners = Vec::new();
    for round in 0..rounds {
        let got: Vec<Outcome> = all.iter().map(|o| o[round]).collect();
        let won: Vec<usize> = (0..NODES).filter(|n| got[*n].is_ok()).collect();
        assert_eq!(won.len(), 1, "{kind}, round {round}: {got:?}");
        assert!(got.iter().all(|g| g.is_ok() || *g == Err(lost)), "{kind}, round {round}: {got:?}");
        winners.push((won[0], got[won[0]].unwrap()));
    }
    for n in 0..NODES {
        let dir = c.mount_point(n).join(kind);
        for (round, (winner, number)) in winners.iter().enumerate() {
            let name = name(round, *winner);
            let seen = ino(&dir.join(&name)).unwrap_or_else(|e| panic!("node {n}: {name}: {e}"));
            assert_eq!(seen, *number, "{kind}, round {round}: node {n} sees another winner than node {winner}");
        }
    }
}

fn exclusive_create_has_one_winner(c: &Cluster) {
    fs::create_dir(c.mount_point(0).join("create")).unwrap();
    let all = rounds(c, "create", ROUNDS, |_, dir, round| {
        let path = dir.join(round.to_string());
        let f = OpenOptions::new().write(true).create_new(true).open(path)?;
        Ok(f.metadata()?.ino())
    });
    check(c, "create", &all, libc::EEXIST, |round, _| round.to_string());
}

fn link_has_one_winner(c: &Cluster) {
    fs::create_dir(c.mount_point(0).join("link")).unwrap();
    let source = |n: usize| format!("source-{n}");
    let own: Vec<PathBuf> = (0..NODES).map(|n| c.mount_point(n).join("link").join(source(n))).collect();
    own.iter().for_each(|p| fs::write(p, b"").unwrap());
    let numbers: Vec<u64> = own.iter().map(|p| ino(p).unwrap()).collect();
    let all = rounds(c, "link", ROUNDS, |n, dir, round| {
        fs::hard_link(dir.join(source(n)), dir.join(round.to_string()))?;
        Ok(numbers[n])
    });
    check(c, "link", &all, libc::EEXIST, |round, _| round.to_string());
    for (n, p) in own.iter().enumerate() {
        let wins = all[n].iter().filter(|o| o.is_ok()).count();
        assert_eq!(sys::stat(p).unwrap().st_nlink as usize, 1 + wins, "links of node {n}'s file");
    }
}

fn mkdir_has_one_winner(c: &Cluster) {
    fs::create_dir(c.mount_point(0).join("mkdir")).unwrap();
    let all = rounds(c, "mkdir", ROUNDS, |_, dir, round| {
        let path = dir.join(round.to_string());
        fs::create_dir(&path)?;
        ino(&path)
    });
    check(c, "mkdir", &all, libc::EEXIST, |round, _| round.to_string());
}

/// Half of the rounds each: every node moves its own file to one name; every node moves one file to its own name.
fn rename_has_one_winner(c: &Cluster) {
    const HALF: usize = ROUNDS / 2;
    fs::create_dir(c.mount_point(0).join("onto")).unwrap();
    fs::create_dir(c.mount_point(0).join("from")).unwrap();
    let own = |n: usize, round: usize| format!("{round}-of-{n}");
    let mut numbers = vec![Vec::new(); NODES];
    for round in 0..HALF {
        for (n, numbers) in numbers.iter_mut().enumerate() {
            let path = c.mount_point(0).join("onto").join(own(n, round));
            fs::write(&path, b"").unwrap();
            numbers.push(ino(&path).unwrap());
        }
        fs::write(c.mount_point(0).join("from").join(round.to_string()), b"").unwrap();
    }
    let all = rounds(c, "onto", HALF, |n, dir, round| {
        sys::rename2(&dir.join(own(n, round)), &dir.join(round.to_string()), libc::RENAME_NOREPLACE)?;
        Ok(numbers[n][round])
    });
    check(c, "onto", &all, libc::EEXIST, |round, _| round.to_string());

    let sources: Vec<u64> =
        (0..HALF).map(|r| ino(&c.mount_point(1).join("from").join(r.to_string())).unwrap()).collect();
    let all = rounds(c, "from", HALF, |n, dir, round| {
        fs::rename(dir.join(round.to_string()), dir.join(own(n, round)))?;
        Ok(sources[round])
    });
    check(c, "from", &all, libc::ENOENT, |round, winner| own(winner, round));
    for n in 0..NODES {
        let left = fs::read_dir(c.mount_point(n).join("from")).unwrap().count();
        assert_eq!(left, HALF, "node {n} sees other names than one a round");
    }
}

/// The kinds run side by side, in directories of their own: a round takes as long as the lock needs to go round all nodes,
/// which hold it for a minimum time each, so most of the time is spent waiting.
#[test]
fn every_race_has_one_winner() {
    let c = Cluster::start(NODES);
    let started = Instant::now();
    std::thread::scope(|s| {
        for race in [exclusive_create_has_one_winner, link_has_one_winner, mkdir_has_one_winner, rename_has_one_winner]
        {
            let c = &c;
            s.spawn(move || race(c));
        }
    });
    println!("{} rounds in {:.1?}", 4 * ROUNDS, started.elapsed());
    c.finish();
}

/// Root makes a file of its own on one node, users on the others open or make it: they get what they made, and nothing that is
/// root's, however late their kernel learns that it is there.
#[test]
fn an_open_is_judged_by_the_winner() {
    let c = Cluster::start(NODES);
    let dir = c.mount_point(0).join("open");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    let ready = Barrier::new(NODES);
    let all = rounds(&c, "open", ROUNDS / 4, |n, dir, round| {
        // Each has the directory in its turn as a round begins: who had it last would win them all.
        if n == round / 2 % NODES {
            fs::create_dir(dir.join(format!("before-{round}")))?;
        }
        ready.wait();
        let mut how = OpenOptions::new();
        how.read(true).write(true).mode(0o600);
        let f = if n == 0 { how.create_new(true) } else { how.create(true).truncate(true) };
        // Users' nodes have mostly less to do.
        if n > 0 && round % 2 == 0 {
            std::thread::sleep(Duration::from_millis(3));
        }
        let user = if n == 0 { 0 } else { 65534 };
        let f = sys::as_user(user, user, || f.open(dir.join(round.to_string())))?;
        Ok(f.metadata()?.ino())
    });
    let mut roots = 0;
    for round in 0..all[0].len() {
        let got: Vec<Outcome> = all.iter().map(|o| o[round]).collect();
        let file = fs::metadata(dir.join(round.to_string())).unwrap();
        let expected = if file.uid() == 0 {
            roots += 1;
            [Ok(file.ino()), Err(libc::EACCES), Err(libc::EACCES), Err(libc::EACCES)]
        } else {
            [Err(libc::EEXIST), Ok(file.ino()), Ok(file.ino()), Ok(file.ino())]
        };
        assert_eq!(got, expected, "open, round {round}");
    }
    assert!(roots > 0 && roots < all[0].len(), "root won {roots} of {} rounds", all[0].len());
    c.finish();
}

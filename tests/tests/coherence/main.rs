//! What one node does, every other node sees with its very next system call.
//!
//! A scenario is played in a directory of its own: one node makes changes, the others look, after they have filled their
//! caches with everything there was before. Every node is the maker once. Needs root and the programs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

mod attributes;
mod contents;
mod listings;
mod mappings;
mod names;

use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::sys::{self, Map};

/// Gets the scene's directory as the maker sees it, and as each of the others does.
type Scenario = fn(&Path, &[PathBuf]);

/// Plays every scenario with every node as the maker.
fn play(nodes: usize, scenarios: &[(&str, Scenario)]) {
    let c = Cluster::start(nodes);
    let mut longest = (Duration::ZERO, "");
    let all = Instant::now();
    let mut failed = Vec::new();
    for (name, scenario) in scenarios {
        for maker in 0..nodes {
            println!("{name}, made on node {maker} of {nodes}");
            let started = Instant::now();
            let scene = format!("{name}-{maker}");
            let me = c.mount_point(maker).join(&scene);
            fs::create_dir(&me).unwrap();
            let others: Vec<PathBuf> =
                (0..nodes).filter(|n| *n != maker).map(|n| c.mount_point(n).join(&scene)).collect();
            // One failure must not hide others.
            if catch_unwind(AssertUnwindSafe(|| scenario(&me, &others))).is_err() {
                failed.push(scene);
            }
            longest = longest.max((started.elapsed(), name));
        }
    }
    println!("{} scenarios in {:?}, the longest: {} in {:?}", scenarios.len(), all.elapsed(), longest.1, longest.0);
    assert!(failed.is_empty(), "failed: {failed:?}");
    c.finish();
}

/// What a node keeps of a file that it has used.
struct Warm {
    open: Option<File>,
    _map: Option<Map>,
}

/// Uses everything that is there, so that all of it is in this node's caches: the listing, names, missing names,
/// attributes, contents, pages, extended attributes.
fn warm(dir: &Path, name: &str) -> Warm {
    for e in fs::read_dir(dir).unwrap() {
        e.unwrap().metadata().unwrap();
    }
    sys::stat(dir).unwrap();
    let path = dir.join(name);
    assert_eq!(sys::stat(&dir.join("missing")).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    let Ok(st) = sys::stat(&path) else { return Warm { open: None, _map: None } };
    for x in sys::xattrs(&path).unwrap() {
        sys::xattr(&path, &x).unwrap();
    }
    match st.st_mode & libc::S_IFMT {
        libc::S_IFREG => {
            let data = fs::read(&path).unwrap();
            let open = File::options().read(true).write(true).open(&path).unwrap();
            let map = Map::new(&open, (data.len()).max(1), false).unwrap();
            assert!(map.read(0, data.len()) == data, "{} differs in memory", path.display());
            Warm { open: Some(open), _map: Some(map) }
        }
        libc::S_IFDIR => {
            let _ = fs::read_dir(&path).unwrap().count();
            Warm { open: None, _map: None }
        }
        libc::S_IFLNK => {
            fs::read_link(&path).unwrap();
            Warm { open: None, _map: None }
        }
        _ => Warm { open: None, _map: None },
    }
}

fn warm_all(others: &[PathBuf], name: &str) -> Vec<Warm> {
    others.iter().map(|o| warm(o, name)).collect()
}

impl Warm {
    fn file(&self) -> &File {
        self.open.as_ref().unwrap()
    }
}

/// Bytes that differ by position and by seed.
fn bytes(seed: u64, len: usize) -> Vec<u8> {
    use rand::{RngExt, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random()).collect()
}

fn same(what: &str, got: &[u8], expected: &[u8]) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    if let Some(at) = (0..got.len()).find(|i| got[*i] != expected[*i]) {
        panic!("{what}: byte {at} of {} is {:#x}, expected {:#x}", got.len(), got[at], expected[at]);
    }
}

fn missing(path: &Path) {
    assert_eq!(sys::stat(path).map(|s| s.st_ino).unwrap_err().raw_os_error(), Some(libc::ENOENT), "{}", path.display());
    assert_eq!(File::open(path).unwrap_err().raw_os_error(), Some(libc::ENOENT), "{}", path.display());
}

/// Sorted names.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn contents_on_two_nodes() {
    play(2, contents::ALL);
}

#[test]
fn contents_on_four_nodes() {
    play(4, contents::ALL);
}

#[test]
fn names_on_two_nodes() {
    play(2, names::ALL);
}

#[test]
fn names_on_four_nodes() {
    play(4, names::ALL);
}

#[test]
fn attributes_on_two_nodes() {
    play(2, attributes::ALL);
}

#[test]
fn attributes_on_four_nodes() {
    play(4, attributes::ALL);
}

#[test]
fn listings_on_two_nodes() {
    play(2, listings::ALL);
}

#[test]
fn listings_on_four_nodes() {
    play(4, listings::ALL);
}

#[test]
fn mappings_on_two_nodes() {
    play(2, mappings::ALL);
}

#[test]
fn mappings_on_four_nodes() {
    play(4, mappings::ALL);
}

//! Damaged and wrong input: every program says in one line what is wrong, in bounded time and memory, and never panics; a
//! damaged volume gives errors, never wrong contents. Needs root and the programs: `cargo xtask test`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clusterfs_tests::cluster::Cluster;
use clusterfs_tests::sys;
use fs_core::format::superblock::Superblock;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

const PATIENCE: Duration = Duration::from_secs(20);
const MEMORY: u64 = 2 << 30;
const MIB: u64 = 1 << 20;
/// Of so many damaged volumes one is repaired.
const REPAIRED: usize = 5;

struct Outcome {
    /// `None`: ended by a signal.
    code: Option<i32>,
    out: String,
    err: String,
}

/// Reads what a process prints until it ends.
fn text_of(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = Vec::new();
        pipe.unwrap().read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    })
}

/// Runs to the end, or fails when that takes too long.
fn run(c: &Cluster, mut command: Command) -> Outcome {
    let what = format!("{command:?}");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = c.spawn(command).unwrap();
    let (out, err) = (text_of(child.stdout.take()), text_of(child.stderr.take()));
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{what} does not end");
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let o = Outcome { code: status.code(), out: out.join().unwrap(), err: err.join().unwrap() };
    let all = format!("{what}: {status}\n{}{}", o.out, o.err);
    assert!(o.code.is_some(), "ended by a signal: {all}");
    assert!(!all.contains("panicked"), "{all}");
    o
}

fn program(c: &Cluster, name: &str, args: &[&str]) -> Outcome {
    let mut command = c.command(name);
    command.args(args);
    run(c, command)
}

/// Not zero, and one line that names the program and, if given, says `says`.
fn refused(c: &Cluster, name: &str, args: &[&str], says: &str) -> Outcome {
    let o = program(c, name, args);
    let all = format!("{name} {args:?}: {:?}\n{}{}", o.code, o.out, o.err);
    assert_ne!(o.code, Some(0), "{all}");
    let lines: Vec<&str> = o.err.lines().filter(|l| !l.trim().is_empty()).collect();
    assert_eq!(lines.len(), 1, "not one line: {all}");
    assert!(lines[0].starts_with(name), "does not say who speaks: {all}");
    let twice = args.iter().find(|a| lines[0].contains(&format!("{a}: {a}: ")));
    assert!(twice.is_none(), "says it twice: {all}");
    assert!(lines[0].to_lowercase().contains(&says.to_lowercase()), "does not say {says:?}: {all}");
    o
}

fn empty() -> Cluster {
    let mut c = Cluster::new(Duration::from_secs(170)).unwrap();
    c.memory = Some(MEMORY);
    fs::create_dir(c.path().join("mnt")).unwrap();
    c
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// A volume of the size with a little in it, as bytes.
fn small_volume(c: &Cluster, bytes: u64) -> Vec<u8> {
    let path = c.path().join("small.img");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    assert_eq!(program(c, "mkfs.clusterfs", &["-q", "--nodes", "2", &text(&path)]).code, Some(0));
    fs::read(path).unwrap()
}

#[test]
fn images_that_are_no_volumes() {
    let c = empty();
    let mut rng = StdRng::seed_from_u64(7);
    let mut random = vec![0u8; 16 * MIB as usize];
    random.iter_mut().for_each(|b| *b = rng.random());
    let volume = small_volume(&c, 16 * MIB);
    let l = Superblock::decode(&volume[..4096]).unwrap().layout();
    let at = |block: u64| block as usize * BLOCK;
    let without = |from: usize, len: usize| {
        let mut v = volume.clone();
        v[from..from + len].fill(0);
        v
    };
    let images: Vec<(&str, Vec<u8>)> = vec![
        ("empty", vec![]),
        ("one byte", vec![1]),
        ("a sector", vec![0; 512]),
        ("zeros", vec![0; 16 * MIB as usize]),
        ("random", random.clone()),
        ("random and short", random[..1_000_000].to_vec()),
        ("truncated to a block", volume[..4096].to_vec()),
        ("truncated to odd bytes", volume[..5_000_001].to_vec()),
        ("truncated by half", volume[..8 * MIB as usize].to_vec()),
        ("truncated by a block", volume[..volume.len() - 4096].to_vec()),
        ("its second half", volume[8 * MIB as usize..].to_vec()),
        ("without all three superblocks", {
            let mut v = without(0, 8 * 4096);
            let end = v.len();
            v[end - 4096..].fill(0);
            v
        }),
        ("cluster records zeroed", without(at(l.cluster_start), 4096)),
        ("all records and locks zeroed", {
            let mut v = without(at(l.cluster_start), at(l.journals_start - l.cluster_start));
            for g in 0..l.groups {
                v[at(l.group_bitmap(g, l.bitmap_blocks))..at(l.group_extent(g).start)].fill(0);
            }
            v
        }),
    ];
    let (image, mnt) = (text(&c.image()), text(&c.path().join("mnt")));
    for (what, bytes) in &images {
        fs::write(&image, bytes).unwrap();
        let mount = refused(&c, "mount.clusterfs", &[&image, &mnt], "");
        let check = program(&c, "fsck.clusterfs", &["-n", &image]);
        let all = format!("{what}: {:?}\n{}{}", check.code, check.out, check.err);
        assert!(matches!(check.code, Some(4 | 8)), "{all}");
        let status = program(&c, "clusterfs", &["status", &image]);
        println!("{what}: mount: {} fsck: {:?} status: {:?}", mount.err.trim(), check.code, status.code);
        assert!(fs::read(&image).unwrap() == *bytes, "{what}: changed by who only looked");
        for how in ["-p", "-y"] {
            let o = program(&c, "fsck.clusterfs", &[how, &image]);
            let all = format!("{what}, fsck {how}: {:?}\n{}{}", o.code, o.out, o.err);
            let lines = o.err.lines().count();
            match o.code {
                // Not a volume, or one that is not all there: nothing is guessed, nothing is written.
                Some(8) => assert!(lines == 1 && fs::read(&image).unwrap() == *bytes, "{all}"),
                Some(4) if o.out.contains("truncated") => assert!(fs::read(&image).unwrap() == *bytes, "{all}"),
                // -p may have done all there was to do.
                Some(0) if how == "-y" => {}
                Some(1) => assert_eq!(program(&c, "fsck.clusterfs", &["-n", &image]).code, Some(0), "{all}"),
                // -p leaves what costs something.
                code => assert!(how == "-p" && matches!(code, Some(4 | 5)), "{all}"),
            }
        }
        // Over anything a new volume can be made, if that is said twice.
        fs::write(&image, bytes).unwrap();
        let mkfs = program(&c, "mkfs.clusterfs", &["-q", "--nodes", "2", &image]);
        let all = format!("{what}: mkfs: {:?}\n{}{}", mkfs.code, mkfs.out, mkfs.err);
        match mkfs.code {
            Some(0) => {}
            _ => assert!(mkfs.err.lines().count() == 1 && fs::read(&image).unwrap() == *bytes, "{all}"),
        }
        if bytes.len() as u64 >= 16 * MIB {
            assert_eq!(
                program(&c, "mkfs.clusterfs", &["-q", "--force", "--nodes", "2", &image]).code,
                Some(0),
                "{all}"
            );
            assert_eq!(program(&c, "fsck.clusterfs", &["-n", &image]).code, Some(0), "{all}");
        }
    }
    for len in [0, 1, 512, 100_000, MIB] {
        File::create(&image).unwrap().set_len(len).unwrap();
        let o = refused(&c, "mkfs.clusterfs", &[&image], "");
        println!("{len} bytes: {}", o.err.trim());
    }
}

#[test]
fn wrong_arguments() {
    let c = empty();
    let at = |n: &str| text(&c.path().join(n));
    let (mnt, image) = (at("mnt"), at("small.img"));
    small_volume(&c, 16 * MIB);
    for name in ["mount.clusterfs", "mkfs.clusterfs", "fsck.clusterfs"] {
        let more: &[&str] = if name == "mount.clusterfs" { &[&mnt] } else { &[] };
        let with = |device: &str| [&[device], more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>();
        for (device, says) in [(at("nothing"), "no such file"), (at("mnt"), "regular file"), ("/dev/null".into(), "")] {
            let args = with(&device);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            println!("{}", refused(&c, name, &args, says).err.trim());
        }
    }
    refused(&c, "mount.clusterfs", &[&image, &at("no-such-directory")], "no-such-directory");
    refused(&c, "mount.clusterfs", &[&image, &image], "directory");
    refused(&c, "mount.clusterfs", &[&image, &mnt, "-o", "frobnicate"], "frobnicate");
    refused(&c, "mount.clusterfs", &[&image, &mnt, "-o", "cache=lots"], "cache=lots");
    refused(&c, "mount.clusterfs", &["iscsi://host/iqn/0", &mnt], "iscsi");
    refused(&c, "mkfs.clusterfs", &[&image], "--force");
    assert_eq!(program(&c, "mkfs.clusterfs", &["-q", "--force", "--nodes", "2", &image]).code, Some(0));
    for (args, name) in [
        (vec!["--nodes", "0"], "nodes"),
        (vec!["--nodes", "65"], "nodes"),
        (vec!["--journal-size", "x"], "journal-size"),
    ] {
        let o = program(&c, "mkfs.clusterfs", &[&args[..], &["--force", &image]].concat());
        assert!(!matches!(o.code, Some(0)) && o.err.contains(name), "{args:?}: {}", o.err);
    }
    for name in ["mount.clusterfs", "mkfs.clusterfs", "fsck.clusterfs", "clusterfs"] {
        let o = program(&c, name, &["--no-such-option"]);
        assert_ne!(o.code, Some(0));
        assert!(o.err.contains("--no-such-option"), "{}", o.err);
    }
}

#[test]
fn a_volume_in_use() {
    let c = Cluster::formatted(2, 64 * MIB).unwrap();
    let image = text(&c.image());
    (0..2).for_each(|n| c.mount(n).unwrap());
    let mnt = c.path().join("mnt");
    fs::create_dir(&mnt).unwrap();
    for o in [
        refused(&c, "mount.clusterfs", &[&image, &text(&mnt)], "slot"),
        refused(&c, "mkfs.clusterfs", &[&image], "unmount"),
        refused(&c, "fsck.clusterfs", &["-n", &image], "unmount"),
    ] {
        println!("{}", o.err.trim());
    }
    assert_eq!(program(&c, "fsck.clusterfs", &["-n", &image]).code, Some(8));
    fs::write(c.mount_point(0).join("f"), b"unharmed").unwrap();
    assert_eq!(fs::read(c.mount_point(1).join("f")).unwrap(), b"unharmed");
    c.unmount(0).unwrap();
    c.mount(5).unwrap();
    c.finish();
}

/// Every block of contents begins with this: what does not is the volume's own.
const MARK: &[u8; 16] = b"contents of file";
const BLOCK: usize = 4096;

/// What the tree of the volume that gets damaged holds.
struct Expected {
    files: Vec<(String, Vec<u8>)>,
}

fn contents(rng: &mut StdRng, len: usize) -> Vec<u8> {
    let mut data: Vec<u8> = (0..len).map(|_| rng.random()).collect();
    for block in data.chunks_mut(BLOCK) {
        let n = block.len().min(MARK.len());
        block[..n].copy_from_slice(&MARK[..n]);
    }
    data
}

fn fill(root: &Path, rng: &mut StdRng) -> Expected {
    let mut files = Vec::new();
    for d in 0..4 {
        fs::create_dir(root.join(format!("d{d}"))).unwrap();
        for f in 0..25 {
            let len = [0, 20, 700, 3000, 9000, 50_000][rng.random_range(0..6)];
            let (name, data) = (format!("d{d}/f{f}"), contents(rng, len));
            fs::write(root.join(&name), &data).unwrap();
            if f % 5 == 0 {
                sys::set_xattr(&root.join(&name), "user.x", &[7; 300], 0).unwrap();
            }
            files.push((name, data));
        }
        std::os::unix::fs::symlink("f0", root.join(format!("d{d}/link"))).unwrap();
    }
    // Every tree has been changed again after its first writing, and some names are gone.
    for i in [3, 30, 60] {
        let (name, _) = files.remove(i);
        fs::remove_file(root.join(name)).unwrap();
    }
    Expected { files }
}

/// Reads everything. What can be read must be right; the number of files that gave errors is returned.
fn walk(root: &Path, expected: &Expected, what: &str) -> usize {
    let allowed = |e: &std::io::Error| matches!(e.raw_os_error(), Some(libc::EIO | libc::EUCLEAN));
    let mut errors = 0;
    for (name, data) in &expected.files {
        let path = root.join(name);
        let got = sys::stat(&path).and_then(|st| Ok((st, fs::read(&path)?)));
        match got {
            Ok((st, got)) => {
                assert!(got == *data, "{what}: wrong contents of {name}");
                assert_eq!(st.st_size as usize, data.len(), "{what}: wrong size of {name}");
            }
            Err(e) => {
                assert!(allowed(&e), "{what}: {name}: {e}");
                errors += 1;
            }
        }
    }
    for d in 0..4 {
        let wanted = expected.files.iter().filter(|(n, _)| n.starts_with(&format!("d{d}/"))).count() + 1;
        match fs::read_dir(root.join(format!("d{d}"))).and_then(Iterator::collect::<std::io::Result<Vec<_>>>) {
            Ok(list) => assert_eq!(list.len(), wanted, "{what}: names in d{d}"),
            Err(e) => {
                assert!(allowed(&e), "{what}: listing d{d}: {e}");
                errors += 1;
            }
        }
    }
    errors
}

/// The files that can be read and are what they were.
fn readable(root: &Path, expected: &Expected) -> BTreeSet<String> {
    let good = expected.files.iter().filter(|(name, data)| fs::read(root.join(name)).is_ok_and(|d| d == *data));
    good.map(|(name, _)| name.clone()).collect()
}

/// Repairs a damaged volume: a second run finds nothing, and what could be read before can be read after.
fn repair(c: &Cluster, before: &BTreeSet<String>, expected: &Expected, what: &str) {
    let image = text(&c.image());
    let y = program(c, "fsck.clusterfs", &["-y", &image]);
    let told = format!("{what}: fsck -y: {:?}\n{}{}", y.code, y.out, y.err);
    assert!(matches!(y.code, Some(0 | 1)), "{told}");
    let again = program(c, "fsck.clusterfs", &["-y", &image]);
    assert_eq!(again.code, Some(0), "{told}a second run finds something:\n{}", again.out);
    c.mount(0).unwrap_or_else(|e| panic!("{told}{e}"));
    let after = readable(&c.mount_point(0), expected);
    c.unmount(0).unwrap();
    let lost: Vec<_> = before.difference(&after).collect();
    assert!(lost.is_empty(), "{told}can be read no more: {lost:?}");
}

/// Blocks of the volume's own that hold anything, in classes: each class is to be hit as often as the others.
fn metadata_blocks(image: &[u8]) -> Vec<Vec<usize>> {
    let own = |b: &usize| {
        let block = &image[b * BLOCK..(b + 1) * BLOCK];
        block.iter().any(|x| *x != 0) && !block.starts_with(MARK)
    };
    let l = Superblock::decode(&image[..BLOCK]).unwrap().layout();
    let [near, last] = l.superblock_copies();
    let of_groups = |blocks: &dyn Fn(u32) -> std::ops::Range<u64>| (0..l.groups).flat_map(blocks).collect::<Vec<_>>();
    let classes = [
        vec![0],
        vec![near],
        (l.cluster_start..l.locks_start).collect(),
        (l.locks_start..l.journals_start).collect(),
        (l.journals_start..l.groups_start).collect(),
        of_groups(&|g| l.group_header(g)..l.group_extent(g).start),
        of_groups(&|g| l.group_extent(g).start..l.group_extent(g).end()),
        vec![last],
    ];
    let all = classes.map(|c| c.into_iter().map(|b| b as usize).filter(own).collect::<Vec<_>>());
    let all: Vec<Vec<usize>> = all.into();
    assert!(all.iter().all(|c| !c.is_empty()), "{:?}", all.iter().map(Vec::len).collect::<Vec<_>>());
    all
}

fn flips(crashed: bool, count: usize, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    println!("seed {seed}");
    let mut c = Cluster::formatted(2, 16 * MIB).unwrap();
    c.memory = Some(MEMORY);
    c.patience = Duration::from_secs(15);
    c.mount(0).unwrap();
    let expected = fill(&c.mount_point(0), &mut rng);
    if crashed {
        File::open(c.mount_point(0)).unwrap().sync_all().unwrap();
        c.kill9(0).unwrap();
    } else {
        c.unmount(0).unwrap();
    }
    let image = text(&c.image());
    let base = fs::read(&image).unwrap();
    let classes = metadata_blocks(&base);
    let full: Vec<usize> = (0..classes.len()).filter(|k| !classes[*k].is_empty()).collect();
    let (mut reported, mut refused, mut mounts, mut errors) = (0, 0, 0, 0);
    for i in 0..count {
        let class = full[i % full.len()];
        let block = *classes[class].choose(&mut rng).unwrap();
        // Where something is: the rest of a block is often unused.
        let used: Vec<usize> = (0..BLOCK).filter(|b| base[block * BLOCK + b] != 0).collect();
        let (byte, bit) = (*used.choose(&mut rng).unwrap(), rng.random_range(0..8));
        let at = block * BLOCK + byte;
        let what = format!("flip {i}: bit {bit} of byte {byte} of block {block} (class {class})");
        fs::write(&image, &base).unwrap();
        let f = File::options().write(true).open(&image).unwrap();
        f.write_all_at(&[base[at] ^ 1 << bit], at as u64).unwrap();
        drop(f);
        let check = program(&c, "fsck.clusterfs", &["-n", &image]);
        let told = format!("{what}: {:?}\n{}{}", check.code, check.out, check.err);
        assert!(matches!(check.code, Some(0 | 4 | 8)), "{told}");
        assert_eq!(check.code != Some(0), !check.out.contains("clean"), "{told}");
        reported += usize::from(check.code != Some(0));
        let started = Instant::now();
        let mut before = BTreeSet::new();
        if let Err(e) = c.mount(0) {
            let e = e.to_string();
            assert!(!e.contains("panicked"), "{what}: {e}");
            assert_ne!(check.code, Some(0), "{what}: fsck finds nothing, but: {e}");
            assert!(!e.contains("does not get mounted"), "{what}: it hangs: {e}");
            refused += 1;
        } else {
            mounts += 1;
            let root = c.mount_point(0);
            before = readable(&root, &expected);
            if !crashed {
                let bad = walk(&root, &expected, &what);
                assert!(bad == 0 || check.code != Some(0), "{what}: fsck finds nothing, but {bad} files give errors");
                errors += bad;
            } else {
                // The end of a journal may be the part that was hit: only that nothing hangs or breaks.
                for e in fs::read_dir(&root).into_iter().flatten().flatten() {
                    let _ = fs::read_dir(e.path()).map(Iterator::count);
                }
            }
            if c.unmount(0).is_err() {
                // A node that found damage may be unable to leave in order.
                let _ = c.kill9(0);
            }
        }
        assert!(started.elapsed() < PATIENCE, "{what}: took {:?}", started.elapsed());
        let log = c.log_text(0);
        assert!(!log.contains("panicked"), "{what}:\n{log}");
        if i % REPAIRED == 0 {
            // Without what the mount has changed.
            fs::write(&image, &base).unwrap();
            let f = File::options().write(true).open(&image).unwrap();
            f.write_all_at(&[base[at] ^ 1 << bit], at as u64).unwrap();
            repair(&c, &before, &expected, &what);
        }
        fs::write(c.path().join("node0.log"), b"").unwrap();
    }
    println!(
        "{count} flips: fsck reported {reported}; {mounts} mounts went well, {refused} were refused; {errors} reads \
         gave errors"
    );
}

#[test]
fn flipped_bits_in_a_clean_volume() {
    flips(false, 110, 11);
}

#[test]
fn flipped_bits_in_a_crashed_volume() {
    flips(true, 40, 12);
}

//! Random operations on the contents of files on real mounts, each read compared with what must be there.
//!
//! Two kinds. The program `fsx` works on a file of its own on each of two nodes at once: all the ways that one node's kernel
//! has to a file must agree. And [`shared_file`] works on one file through two nodes in turn: what one node did by any way,
//! the other must see by any other. Both follow from a seed.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::cluster::{Cluster, Result};
use crate::sys::{self, Map};

/// A test tool that `cargo xtask setup` installs beside the programs.
pub fn tool(name: &str) -> Result<PathBuf> {
    let path = crate::cluster::programs()?.join("../tools/bin").join(name);
    let missing = || format!("{} does not exist: run `cargo xtask setup`, which installs it", path.display());
    if path.exists() { Ok(path) } else { Err(missing().into()) }
}

/// Configuration files of those tools.
pub fn settings(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// `operations` of fsx on a file of its own on each of the nodes, at once. With an odd seed the stores into memory maps are
/// not followed by msync: the kernel must find them by itself.
pub fn fsx(c: &Cluster, nodes: &[usize], operations: u64, seed: u64) -> Result<()> {
    let started = Instant::now();
    let mut running: Vec<(usize, PathBuf, Child)> = Vec::new();
    let settings = fs::read_to_string(settings("fsx.toml"))?;
    for (i, node) in nodes.iter().enumerate() {
        let seed = seed + i as u64;
        let artifacts = c.path().join(format!("fsx-{node}"));
        fs::create_dir_all(&artifacts)?;
        let own = artifacts.join("fsx.toml");
        fs::write(&own, format!("nomsyncafterwrite = {}\n{settings}", seed % 2 == 1))?;
        let dir = c.mount_point(*node).join(format!("fsx-{node}"));
        fs::create_dir_all(&dir)?;
        let mut command = std::process::Command::new(tool("fsx")?);
        command.arg("-N").arg(operations.to_string()).arg("-S").arg(seed.to_string()).arg("-f").arg(&own);
        command.arg("-P").arg(&artifacts).arg(dir.join("file"));
        let said = artifacts.join("said");
        command.stdin(Stdio::null()).stdout(File::create(&said)?).stderr(File::options().append(true).open(&said)?);
        running.push((*node, said, c.spawn(command)?));
    }
    for (node, said, child) in &mut running {
        let status = child.wait()?;
        let said = fs::read_to_string(said)?;
        if !status.success() || !said.contains("A-OK") {
            let lines: Vec<&str> = said.lines().collect();
            let last = lines[lines.len().saturating_sub(60)..].join("\n");
            return Err(format!("fsx, seed {seed}, on node {node}: {status}\n{last}").into());
        }
    }
    println!("fsx: {operations} operations on each of {} nodes in {:?}", nodes.len(), started.elapsed());
    Ok(())
}

/// Longest the shared file gets.
const LEN_MAX: usize = 160 * 1024;
const PIECE_MAX: usize = 20 * 1024;
const PAGE: usize = 4096;

/// One node's ways to the file.
struct Way {
    path: PathBuf,
    file: File,
    reader: File,
    /// Of the whole file, made anew when it has grown.
    map: Option<(Map, usize)>,
}

impl Way {
    fn open(path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { path: path.into(), file, reader: File::open(path)?, map: None })
    }

    fn map(&mut self, len: usize) -> Result<&Map> {
        if self.map.as_ref().is_none_or(|(_, had)| *had < len) {
            self.map = Some((Map::new(&self.file, len, true)?, len));
        }
        match &self.map {
            Some((map, _)) => Ok(map),
            None => Err("no map".into()),
        }
    }
}

struct Shared {
    ways: Vec<Way>,
    /// What the file must hold.
    model: Vec<u8>,
    rng: StdRng,
    last: String,
}

/// `operations` on one file, each through one of the nodes at random and then looked at through another one.
pub fn shared_file(c: &Cluster, nodes: &[usize], operations: u64, seed: u64) -> Result<()> {
    let name = format!("shared-{seed}/file");
    let paths: Vec<PathBuf> = nodes.iter().map(|n| c.mount_point(*n).join(&name)).collect();
    let (Some(first), Some(dir)) = (paths.first(), paths.first().and_then(|p| p.parent())) else { return Ok(()) };
    fs::create_dir_all(dir)?;
    File::create(first)?;
    let ways = paths.iter().map(|p| Way::open(p)).collect::<Result<_>>()?;
    let mut s = Shared { ways, model: Vec::new(), rng: StdRng::seed_from_u64(seed), last: String::new() };
    let started = Instant::now();
    let mut told = started;
    for n in 0..operations {
        let (by, to) = s.two_nodes();
        s.change(by).and_then(|()| s.look(to)).map_err(|e| {
            format!("seed {seed}, operation {n}: {} by node {}, looked at on {}: {e}", s.last, nodes[by], nodes[to])
        })?;
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            println!("shared file: {n} operations in {:?}", started.elapsed());
        }
    }
    println!("shared file: {operations} operations through {} nodes in {:?}", nodes.len(), started.elapsed());
    Ok(())
}

impl Shared {
    fn two_nodes(&mut self) -> (usize, usize) {
        let count = self.ways.len();
        let by = self.rng.random_range(0..count);
        (by, (by + self.rng.random_range(1..count.max(2))) % count)
    }

    /// A range that begins within the file and may end behind it.
    fn range(&mut self) -> (usize, usize) {
        let at = self.rng.random_range(0..=self.model.len().min(LEN_MAX - 1));
        let len = self.rng.random_range(1..=PIECE_MAX).min(LEN_MAX - at);
        (at, len)
    }

    fn piece(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.rng.random()).collect()
    }

    fn put(&mut self, at: usize, piece: &[u8]) {
        let end = at + piece.len();
        if self.model.len() < end {
            self.model.resize(end, 0);
        }
        self.model[at..end].copy_from_slice(piece);
    }

    fn change(&mut self, by: usize) -> Result<()> {
        let (at, len) = self.range();
        let size = self.model.len();
        let within = len.min(size - at.min(size));
        match self.rng.random_range(0..12) {
            0..3 => {
                self.last = format!("write {at}+{len}");
                let piece = self.piece(len);
                self.ways[by].file.write_all_at(&piece, at as u64)?;
                self.put(at, &piece);
            }
            3 => {
                let len = len.min(LEN_MAX - size);
                self.last = format!("append {len} to {size}");
                let piece = self.piece(len);
                let file = File::options().append(true).open(&self.ways[by].path)?;
                std::io::Write::write_all(&mut &file, &piece)?;
                self.put(size, &piece);
            }
            4..7 if within > 0 => {
                self.last = format!("store {at}+{within}, then msync");
                let piece = self.piece(within);
                let map = self.ways[by].map(size)?;
                map.write(at, &piece);
                map.sync()?;
                self.put(at, &piece);
            }
            7 => {
                let to = self.rng.random_range(0..=LEN_MAX);
                self.last = format!("truncate {size} to {to}");
                self.ways[by].file.set_len(to as u64)?;
                self.model.resize(to, 0);
            }
            8 if within > 0 => {
                self.last = format!("punch {at}+{within}");
                let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                sys::fallocate(&self.ways[by].file, how, at as i64, within as i64)?;
                self.model[at..at + within].fill(0);
            }
            9 => {
                self.last = format!("zero {at}+{len}");
                sys::fallocate(&self.ways[by].file, libc::FALLOC_FL_ZERO_RANGE, at as i64, len as i64)?;
                self.put(at, &vec![0; len]);
            }
            10 => {
                self.last = format!("write {at}+{len} with O_DSYNC and O_DIRECT");
                let flags = libc::O_DSYNC | libc::O_DIRECT;
                let file = File::options().write(true).custom_flags(flags).open(&self.ways[by].path)?;
                let piece = self.piece(len);
                file.write_all_at(&piece, at as u64)?;
                self.put(at, &piece);
            }
            _ => {
                self.last = format!("close and open, size {size}");
                self.ways[by] = Way::open(&self.ways[by].path)?;
            }
        }
        Ok(())
    }

    fn look(&mut self, on: usize) -> Result<()> {
        let (size, choice) = (self.model.len(), self.rng.random_range(0..5));
        let found = self.ways[on].file.metadata()?.len();
        if found != size as u64 {
            return Err(format!("its size is {found}, not {size}").into());
        }
        let (at, len) = match choice {
            0 => (0, size),
            _ => {
                let (at, len) = self.range();
                (at, len.min(size - at.min(size)))
            }
        };
        let way = &mut self.ways[on];
        let got = match choice {
            0 => fs::read(&way.path)?,
            1 | 2 if len > 0 => way.map(size)?.read(at, len),
            3 => read(&way.reader, at, len)?,
            _ => read(&way.file, at, len)?,
        };
        let how = ["read whole", "read in memory", "read in memory", "read", "read where it is written"][choice];
        let expected = &self.model[at..at + len];
        match (0..len).find(|i| got.get(*i) != expected.get(*i)) {
            None if got.len() == len => Ok(()),
            None => Err(format!("{how} gave {} bytes instead of {len}", got.len()).into()),
            Some(i) => {
                let byte = at + i;
                let wrong = got.iter().zip(expected).filter(|(a, b)| a != b).count();
                Err(format!(
                    "{how} {at}+{len}: byte {byte} (page {}) is {:?}, not {}; {wrong} bytes are wrong",
                    byte / PAGE,
                    got.get(i),
                    expected[i]
                )
                .into())
            }
        }
    }
}

fn read(file: &File, at: usize, len: usize) -> Result<Vec<u8>> {
    let mut got = vec![0; len];
    file.read_exact_at(&mut got, at as u64)?;
    Ok(got)
}

//! Random operations on random nodes, one at a time, against a model: every node shows the latest state of all.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::common::{WHO, dir, disk, file, mount};
use fs_core::{Fallocate, FsError, ROOT_INO, Rename, SetAttr, Volume, WriteOptions};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

#[derive(Clone, Debug, PartialEq)]
enum Node {
    File { ino: u64 },
    Dir { ino: u64 },
}

#[derive(Default)]
struct Model {
    /// Directories by inode: their names.
    dirs: BTreeMap<u64, BTreeMap<String, Node>>,
    /// Parent of each directory.
    parents: BTreeMap<u64, u64>,
    files: BTreeMap<u64, Vec<u8>>,
}

impl Model {
    fn links(&self, ino: u64) -> usize {
        self.dirs.values().flat_map(|d| d.values()).filter(|n| **n == Node::File { ino }).count()
    }

    fn inside(&self, mut dir: u64, of: u64) -> bool {
        loop {
            if dir == of {
                return true;
            }
            match self.parents.get(&dir) {
                Some(p) => dir = *p,
                None => return false,
            }
        }
    }
}

fn errno(e: &FsError) -> &'static str {
    match e {
        FsError::NotFound => "ENOENT",
        FsError::Exists => "EEXIST",
        FsError::NotEmpty => "ENOTEMPTY",
        FsError::IsDir => "EISDIR",
        FsError::NotDir => "ENOTDIR",
        FsError::Invalid => "EINVAL",
        FsError::NotPermitted => "EPERM",
        other => panic!("unexpected error: {other}"),
    }
}

async fn run(seed: u64, steps: usize) {
    let mut rng = StdRng::seed_from_u64(seed);
    let disk = disk(48 << 20).await;
    let mut nodes: Vec<Arc<Volume>> = Vec::new();
    for n in 0..3 {
        nodes.push(mount(&disk, &format!("n{n}")).await);
    }
    let mut m = Model::default();
    m.dirs.insert(ROOT_INO, BTreeMap::new());
    for step in 0..steps {
        let v = nodes[rng.random_range(0..nodes.len())].clone();
        let dirs: Vec<u64> = m.dirs.keys().copied().collect();
        let pick = |rng: &mut StdRng| dirs[rng.random_range(0..dirs.len())];
        let name = |rng: &mut StdRng| ["a", "b", "c", "new", "cur", "tmp"][rng.random_range(0..6)].to_string();
        let (d, n) = (pick(&mut rng), name(&mut rng));
        let at = format!("seed {seed} step {step}");
        let op = rng.random_range(0..14);
        if std::env::var_os("TRACE").is_some() {
            eprintln!("{at}: op {op} on {} {d:#x}/{n}", v.node());
        }
        match op {
            0 | 1 => {
                let got = v.mknod(WHO, d, n.as_bytes(), file(), false).await;
                match m.dirs[&d].get(&n) {
                    Some(_) => assert_eq!(got.map(|_| ()).map_err(|e| errno(&e)), Err("EEXIST"), "{at}"),
                    None => {
                        let ino = got.unwrap_or_else(|e| panic!("{at}: create: {e}")).value.ino;
                        m.dirs.get_mut(&d).expect("dir").insert(n, Node::File { ino });
                        m.files.insert(ino, Vec::new());
                    }
                }
            }
            2 if m.dirs.len() < 12 => {
                let got = v.mkdir(WHO, d, n.as_bytes(), dir()).await;
                match m.dirs[&d].get(&n) {
                    Some(_) => assert_eq!(got.map(|_| ()).map_err(|e| errno(&e)), Err("EEXIST"), "{at}"),
                    None => {
                        let ino = got.unwrap_or_else(|e| panic!("{at}: mkdir: {e}")).value.ino;
                        m.dirs.get_mut(&d).expect("dir").insert(n, Node::Dir { ino });
                        m.dirs.insert(ino, BTreeMap::new());
                        m.parents.insert(ino, d);
                    }
                }
            }
            3 => {
                let got = v.unlink(d, n.as_bytes()).await.map(|_| ()).map_err(|e| errno(&e));
                match m.dirs[&d].get(&n).cloned() {
                    None => assert_eq!(got, Err("ENOENT"), "{at}"),
                    Some(Node::Dir { .. }) => assert_eq!(got, Err("EISDIR"), "{at}"),
                    Some(Node::File { ino }) => {
                        assert_eq!(got, Ok(()), "{at}");
                        m.dirs.get_mut(&d).expect("dir").remove(&n);
                        if m.links(ino) == 0 {
                            m.files.remove(&ino);
                        }
                    }
                }
            }
            4 => {
                let got = v.rmdir(d, n.as_bytes()).await.map(|_| ()).map_err(|e| errno(&e));
                match m.dirs[&d].get(&n).cloned() {
                    None => assert_eq!(got, Err("ENOENT"), "{at}"),
                    Some(Node::File { .. }) => assert_eq!(got, Err("ENOTDIR"), "{at}"),
                    Some(Node::Dir { ino }) if !m.dirs[&ino].is_empty() => assert_eq!(got, Err("ENOTEMPTY"), "{at}"),
                    Some(Node::Dir { ino }) => {
                        assert_eq!(got, Ok(()), "{at}");
                        m.dirs.get_mut(&d).expect("dir").remove(&n);
                        m.dirs.remove(&ino);
                        m.parents.remove(&ino);
                    }
                }
            }
            5 | 6 => {
                let (d2, n2) = (pick(&mut rng), name(&mut rng));
                let how = [Rename::Replace, Rename::NoReplace, Rename::Exchange][rng.random_range(0..3)];
                let got = v.rename(d, n.as_bytes(), d2, n2.as_bytes(), how).await.map(|_| ()).map_err(|e| errno(&e));
                let (source, target) = (m.dirs[&d].get(&n).cloned(), m.dirs[&d2].get(&n2).cloned());
                let is_dir = |n: &Option<Node>| matches!(n, Some(Node::Dir { .. }));
                let loops =
                    |m: &Model, n: &Option<Node>, to: u64| matches!(n, Some(Node::Dir { ino }) if m.inside(to, *ino));
                let empty =
                    |m: &Model, n: &Option<Node>| matches!(n, Some(Node::Dir { ino }) if m.dirs[ino].is_empty());
                let want = match (&source, &target, how) {
                    (None, _, _) => Err("ENOENT"),
                    _ if d != d2 && loops(&m, &source, d2) => Err("EINVAL"),
                    _ if d != d2 && how == Rename::Exchange && loops(&m, &target, d) => Err("EINVAL"),
                    (_, Some(_), Rename::NoReplace) => Err("EEXIST"),
                    (_, None, Rename::Exchange) => Err("ENOENT"),
                    (_, _, Rename::Exchange) => Ok(()),
                    (Some(s), Some(t), _) if s == t => Ok(()),
                    (_, Some(_), _) if is_dir(&source) && !is_dir(&target) => Err("ENOTDIR"),
                    (_, Some(_), _) if !is_dir(&source) && is_dir(&target) => Err("EISDIR"),
                    (_, Some(_), _) if is_dir(&target) && !empty(&m, &target) => Err("ENOTEMPTY"),
                    _ => Ok(()),
                };
                assert_eq!(got, want, "{at}: rename {how:?} {source:?} {target:?}");
                if want.is_ok() && !(how != Rename::Exchange && source == target) {
                    let s = source.expect("source");
                    if how == Rename::Exchange {
                        let t = target.expect("target");
                        m.dirs.get_mut(&d).expect("dir").insert(n, t.clone());
                        m.dirs.get_mut(&d2).expect("dir").insert(n2, s.clone());
                        if let Node::Dir { ino } = t {
                            m.parents.insert(ino, d);
                        }
                    } else {
                        m.dirs.get_mut(&d).expect("dir").remove(&n);
                        m.dirs.get_mut(&d2).expect("dir").insert(n2, s.clone());
                        match target {
                            Some(Node::File { ino }) if m.links(ino) == 0 => {
                                m.files.remove(&ino);
                            }
                            Some(Node::Dir { ino }) => {
                                m.dirs.remove(&ino);
                                m.parents.remove(&ino);
                            }
                            _ => {}
                        }
                    }
                    if let Node::Dir { ino } = s {
                        m.parents.insert(ino, d2);
                    }
                }
            }
            7 => {
                if let Some(Node::File { ino }) = m.dirs[&d].get(&n).cloned() {
                    let (d2, n2) = (pick(&mut rng), name(&mut rng));
                    let got = v.link(ino, d2, n2.as_bytes()).await.map(|_| ()).map_err(|e| errno(&e));
                    match m.dirs[&d2].get(&n2) {
                        Some(_) => assert_eq!(got, Err("EEXIST"), "{at}"),
                        None => {
                            assert_eq!(got, Ok(()), "{at}");
                            m.dirs.get_mut(&d2).expect("dir").insert(n2, Node::File { ino });
                        }
                    }
                }
            }
            8..=10 => {
                let inos: Vec<u64> = m.files.keys().copied().collect();
                if inos.is_empty() {
                    continue;
                }
                let ino = inos[rng.random_range(0..inos.len())];
                let body = m.files.get_mut(&ino).expect("file");
                let offset = rng.random_range(0..30_000u64).min(body.len() as u64 + 9000);
                let len = [0usize, 10, 900, 5000, 20_000][rng.random_range(0..5)];
                match rng.random_range(0..4) {
                    0 => {
                        let size = rng.random_range(0..40_000usize);
                        v.setattr(ino, SetAttr { size: Some(size as u64), ..Default::default() })
                            .await
                            .expect("truncate");
                        body.resize(size, 0);
                    }
                    1 if len > 0 => {
                        let punch = Fallocate { keep_size: true, punch_hole: true, zero_range: false };
                        v.fallocate(ino, offset, len as u64, punch).await.expect("punch");
                        let (from, to) = ((offset as usize).min(body.len()), (offset as usize + len).min(body.len()));
                        body[from..to].fill(0);
                    }
                    _ => {
                        let data = vec![rng.random::<u8>(); len];
                        v.write(ino, offset, &data, WriteOptions::default()).await.expect("write");
                        let end = offset as usize + len;
                        if len > 0 && body.len() < end {
                            body.resize(end, 0);
                        }
                        if len > 0 {
                            body[offset as usize..end].copy_from_slice(&data);
                        }
                    }
                }
            }
            11 => {
                for (ino, body) in &m.files {
                    let got = v.read(*ino, 0, 1 << 20).await.unwrap_or_else(|e| panic!("{at}: read: {e}")).value;
                    assert!(got == *body, "{at}: contents of {ino:#x} differ ({} and {} bytes)", got.len(), body.len());
                    let a = v.getattr(*ino).await.expect("getattr").value.inode;
                    assert_eq!((a.size, a.links as usize), (body.len() as u64, m.links(*ino)), "{at}");
                }
            }
            12 => {
                for (ino, names) in &m.dirs {
                    let mut got: Vec<_> = Vec::new();
                    let mut after = 0;
                    loop {
                        let part = v
                            .readdir(*ino, after, 3, true)
                            .await
                            .unwrap_or_else(|e| panic!("{at}: readdir: {e}"))
                            .value;
                        let Some(last) = part.last() else { break };
                        after = last.cookie;
                        got.extend(part.into_iter().map(|e| (String::from_utf8(e.name).expect("utf8"), e.ino)));
                    }
                    got.sort();
                    let want: Vec<_> = names
                        .iter()
                        .map(|(n, c)| {
                            (
                                n.clone(),
                                match c {
                                    Node::File { ino } | Node::Dir { ino } => *ino,
                                },
                            )
                        })
                        .collect();
                    assert_eq!(got, want, "{at}");
                }
            }
            _ => v.sync().await.expect("sync"),
        }
    }
    for v in &nodes {
        v.unmount().await.unwrap_or_else(|e| panic!("seed {seed}: unmount: {e}"));
    }
    let v = mount(&disk, "again").await;
    for (ino, body) in &m.files {
        assert!(v.read(*ino, 0, 1 << 20).await.expect("read").value == *body, "seed {seed}: contents after remount");
    }
    v.unmount().await.expect("unmount");
    crate::common::check_clean(&disk, seed).await;
}

#[test]
fn nodes_agree_with_the_model() {
    let (from, count) = match std::env::var("SEED").ok().and_then(|s| s.parse().ok()) {
        Some(seed) => (seed, 1),
        None => (1, 30),
    };
    for seed in from..from + count {
        let rt =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("runtime");
        // Virtual time: an operation that waits for ever is a failure, not a hanging test.
        let bound = std::time::Duration::from_secs(3600);
        rt.block_on(async {
            tokio::time::timeout(bound, run(seed, 400)).await.unwrap_or_else(|_| panic!("seed {seed} hangs"))
        });
    }
}

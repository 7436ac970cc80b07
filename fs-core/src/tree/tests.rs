//! The tree against a map, in memory.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use cluster::LockId;
use journal::block::{BlockError, BlockHeader, BlockKind, version};
use journal::{BLOCK_SIZE, Block};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::node::{Node, UNDERFULL};
use super::*;
use crate::error::FsError;
use crate::format::item::{Key, Kind, VALUE_MAX};

/// Nodes in memory, as a transaction's overlay would have them.
#[derive(Default, Clone)]
struct Store {
    nodes: BTreeMap<u64, Arc<Block>>,
    next: u64,
    /// Of the operation under way.
    version: u32,
    prefetched: std::cell::RefCell<Vec<Vec<u64>>>,
    /// Nodes read since [`Store::expect_an_end`], which no single call may make many of: a loop fails instead of hanging.
    read: std::cell::Cell<u64>,
}

impl Store {
    fn expect_an_end(&self) {
        self.read.set(0);
    }
}

impl NodeRead for Store {
    fn damaged(&self, block: u64, why: &str) -> FsError {
        FsError::damaged(LockId::Domain(1), format!("block {block}: {why}"))
    }
    async fn node(&self, block: u64) -> Result<Arc<Block>> {
        self.read.set(self.read.get() + 1);
        assert!(self.read.get() < 1_000_000, "the tree is walked without end");
        self.nodes.get(&block).cloned().ok_or_else(|| self.damaged(block, "not there"))
    }
    async fn prefetch(&self, blocks: &[u64]) -> Result<()> {
        self.prefetched.borrow_mut().push(blocks.to_vec());
        Ok(())
    }
}

impl NodeWrite for Store {
    fn version(&self) -> u32 {
        self.version
    }
    async fn node_mut(&mut self, block: u64) -> Result<&mut Block> {
        match self.nodes.get_mut(&block) {
            Some(n) => Ok(Arc::make_mut(n)),
            None => Err(FsError::damaged(LockId::Domain(1), format!("block {block} is not there"))),
        }
    }
    async fn alloc_node(&mut self) -> Result<u64> {
        self.next += 1;
        let mut b = Block::zeroed(BLOCK_SIZE);
        let h = BlockHeader {
            kind: BlockKind::TreeNode,
            owner: LockId::Domain(1),
            volume: 1,
            block: self.next,
            version: 0,
            tenure: 0,
            record: 0,
        };
        h.encode(&mut b);
        self.nodes.insert(self.next, Arc::new(b));
        Ok(self.next)
    }
    fn free_node(&mut self, block: u64) {
        assert!(self.nodes.remove(&block).is_some(), "block {block} freed twice");
    }
}

fn run<T>(f: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(f)
}

fn key(n: u64) -> Key {
    Key::new(n / 7, Kind::Dirent, n % 7)
}

/// Bytes that differ between two states, counting a new node's content as changed.
fn bytes_changed(old: &Store, new: &Store) -> usize {
    let zero = Arc::new(Block::zeroed(BLOCK_SIZE));
    let diff = |(n, b): (&u64, &Arc<Block>)| {
        let o = old.nodes.get(n).unwrap_or(&zero);
        if Arc::ptr_eq(o, b) {
            return 0;
        }
        o.iter().zip(b.iter()).filter(|(x, y)| x != y).count()
    };
    new.nodes.iter().map(diff).sum()
}

/// Whatever an operation changed is of its version, and so is the root then.
fn all_changes_have_the_version(before: &Store, after: &Store, root: Root) {
    let mut any = before.nodes.len() != after.nodes.len();
    for (n, b) in &after.nodes {
        if before.nodes.get(n).is_none_or(|o| o[..] != b[..]) {
            assert_eq!(version(b), after.version, "block {n} changed, its version did not");
            any = true;
        }
    }
    if any && root.block != 0 {
        assert_eq!(root.version, after.version);
    }
}

/// Does the operation of this number to the tree and to the map, which must agree on what it gives.
async fn carry_out(op: &Op, i: usize, s: &mut Store, root: &mut Root, map: &mut BTreeMap<Key, Vec<u8>>) {
    match *op {
        Op::Insert(k, len) => {
            let v = vec![i as u8; len];
            insert(s, root, &key(k), &v).await.unwrap();
            map.insert(key(k), v);
        }
        Op::Remove(k) => {
            assert_eq!(remove(s, root, &key(k)).await.unwrap(), map.remove(&key(k)));
        }
        Op::RemoveRange(a, b, limit) => {
            let got = remove_range(s, root, &key(a), &key(b), limit).await.unwrap();
            let want: Vec<_> = map.range(key(a)..=key(b)).take(limit).map(|(k, v)| (*k, v.clone())).collect();
            assert_eq!(got, want);
            for (k, _) in &want {
                map.remove(k);
            }
        }
    }
}

/// Every invariant of the tree's shape, and that it holds exactly `map`.
async fn verify(s: &Store, root: Root, map: &BTreeMap<Key, Vec<u8>>) {
    let mut levels: BTreeMap<u16, Vec<u64>> = BTreeMap::new();
    let mut seen = 0;
    for_each_node(s, root, &mut |block, b| {
        let level = u16::from_le_bytes([b[64], b[65]]);
        check_node(b, level.into()).unwrap_or_else(|e| panic!("block {block}: {e}"));
        levels.entry(level).or_default().push(block);
        seen += 1;
    })
    .await
    .unwrap();
    assert_eq!(seen, root.nodes);
    assert_eq!(seen, s.nodes.len() as u64, "a node leaked");
    for (level, blocks) in &levels {
        for block in &blocks[..blocks.len() - 1] {
            let n = Node::open(&s.nodes[block], u32::from(*level)).unwrap();
            assert!(n.used() >= UNDERFULL, "block {block} of level {level} is underfull: {}", n.used());
        }
        for block in blocks {
            let n = Node::open(&s.nodes[block], u32::from(*level)).unwrap();
            assert!(*level == 1 || n.count() >= 2, "inner node with {} children", n.count());
        }
    }
    let all = scan(s, root, Key::MIN, Key::MAX, usize::MAX).await.unwrap();
    let want: Vec<_> = map.iter().map(|(k, v)| (*k, v.clone())).collect();
    assert_eq!(all, want);
}

#[derive(Clone, Debug)]
enum Op {
    Insert(u64, usize),
    Remove(u64),
    RemoveRange(u64, u64, usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let n = 0..600u64;
    let len = prop_oneof![0..150usize, 0..=VALUE_MAX, Just(VALUE_MAX), Just(0usize)];
    let op = prop_oneof![
        8 => (n.clone(), len).prop_map(|(k, l)| Op::Insert(k, l)),
        4 => n.clone().prop_map(Op::Remove),
        1 => (n.clone(), 0..80u64, prop_oneof![Just(usize::MAX), 0..20usize]).prop_map(|(a, b, l)| Op::RemoveRange(a, a + b, l)),
    ];
    prop::collection::vec(op, 1..400)
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(150))]
    #[test]
    fn behaves_as_a_map(ops in ops(), probes in prop::collection::vec(0..700u64, 20)) {
        run(async {
            let (mut s, mut root, mut map) = (Store::default(), Root::default(), BTreeMap::new());
            for (i, op) in ops.iter().enumerate() {
                let before = s.clone();
                s.version = s.version.wrapping_add(1);
                carry_out(op, i, &mut s, &mut root, &mut map).await;
                all_changes_have_the_version(&before, &s, root);
                if i % 8 == 0 {
                    verify(&s, root, &map).await;
                }
            }
            verify(&s, root, &map).await;
            for p in probes {
                let k = key(p);
                assert_eq!(get(&s, root, &k).await.unwrap(), map.get(&k).cloned());
                let before = map.range((Bound::Unbounded, Bound::Included(k))).next_back();
                let got = last_at_or_before(&s, root, &k).await.unwrap();
                assert_eq!(got, before.map(|(k, v)| (*k, v.clone())));
                let got = scan(&s, root, k, key(p + 40), 25).await.unwrap();
                let want: Vec<_> = map.range(k..=key(p + 40)).take(25).map(|(k, v)| (*k, v.clone())).collect();
                assert_eq!(got, want);
                warm(&s, root, &k, &key(p + 40)).await.unwrap();
            }
            let rest = remove_range(&mut s, &mut root, &Key::MIN, &Key::MAX, usize::MAX).await.unwrap();
            assert_eq!(rest.len(), map.len());
            assert_eq!(root, Root::default());
            assert!(s.nodes.is_empty());
        });
    }

    /// A write of one node is acknowledged and lost: its place has an older state, sound in itself.
    #[test]
    fn an_older_state_of_a_node_is_never_believed(first in ops(), then in ops(), which in any::<prop::sample::Index>()) {
        run(async {
            let (mut s, mut root) = (Store::default(), Root::default());
            let (mut map, mut before) = (BTreeMap::new(), BTreeMap::new());
            for (i, op) in first.iter().chain(&then).enumerate() {
                if i == first.len() {
                    before = s.nodes.clone();
                }
                s.version += 1;
                carry_out(op, i, &mut s, &mut root, &mut map).await;
            }
            let changed: Vec<u64> =
                s.nodes.iter().filter(|(n, b)| before.get(n).is_some_and(|o| o[..] != b[..])).map(|n| *n.0).collect();
            if changed.is_empty() {
                return;
            }
            let stale = changed[which.index(changed.len())];
            let (now, old) = (version(&s.nodes[&stale]), version(&before[&stale]));
            s.nodes.insert(stale, before[&stale].clone());
            let told = |e: FsError| match e {
                FsError::Block { block, why, .. } => {
                    assert_eq!((block, why), (stale, BlockError::Version { expected: now, found: old }));
                }
                e => panic!("{e}"),
            };
            told(scan(&s, root, Key::MIN, Key::MAX, usize::MAX).await.expect_err("the older state was believed"));
            told(for_each_node(&s, root, &mut |_, _| ()).await.expect_err("the older state was believed"));
            for k in (0..600).map(key) {
                match get(&s, root, &k).await {
                    Ok(v) => assert_eq!(v, map.get(&k).cloned()),
                    Err(e) => told(e),
                }
                // Nor is it made a part of something new.
                let (mut t, mut troot) = (s.clone(), root);
                t.version += 1;
                if let Err(e) = remove(&mut t, &mut troot, &k).await {
                    told(e);
                } else if troot.block != 0 {
                    told(scan(&t, troot, Key::MIN, Key::MAX, usize::MAX).await.expect_err("made new"));
                }
            }
        });
    }

    #[test]
    fn damage_is_an_error_not_a_panic(
        seed in 0..200u64,
        hits in prop::collection::vec((any::<prop::sample::Index>(), 64..4096usize, any::<u8>()), 1..12),
        header in prop::collection::vec((any::<prop::sample::Index>(), 64..90usize, any::<u8>()), 0..4),
        ops in ops(),
    ) {
        run(async {
            let (mut s, mut root) = (Store::default(), Root::default());
            for i in 0..400u64 {
                let k = (i * 7919 + seed) % 600;
                insert(&mut s, &mut root, &key(k), &vec![1; (k % 200) as usize]).await.unwrap();
            }
            let blocks: Vec<u64> = s.nodes.keys().copied().collect();
            for (which, at, value) in hits.iter().chain(&header) {
                let block = blocks[which.index(blocks.len())];
                s.node_mut(block).await.unwrap()[*at] = *value;
            }
            for block in &blocks {
                let _ = check_node(&s.nodes[block], 1);
                let _ = check_node(&s.nodes[block], 2);
            }
            let _ = scan(&s, root, Key::MIN, Key::MAX, usize::MAX).await;
            let _ = warm(&s, root, &Key::MIN, &Key::MAX).await;
            let _ = for_each_node(&s, root, &mut |_, _| ()).await;
            for op in ops.iter().take(60) {
                s.expect_an_end();
                // A store whose node went missing answers with an error too, so every outcome but a panic is fine; a
                // failed change is dropped, as a transaction would be.
                let (mut t, mut troot) = (s.clone(), root);
                let ok = match *op {
                    Op::Insert(k, len) => insert(&mut t, &mut troot, &key(k), &vec![2; len]).await.is_ok(),
                    Op::Remove(k) => remove(&mut t, &mut troot, &key(k)).await.is_ok(),
                    Op::RemoveRange(a, b, l) => remove_range(&mut t, &mut troot, &key(a), &key(b), l).await.is_ok(),
                };
                let _ = last_at_or_before(&s, root, &key(seed)).await;
                if ok {
                    (s, root) = (t, troot);
                }
            }
        });
    }
}

/// Separators out of order lead from a leaf to one further left: a walk that goes on from its upper bound never ends.
#[test]
fn separators_in_disorder_end_every_walk() {
    run(async {
        let (mut whole, mut root) = (Store::default(), Root::default());
        for i in 0..1500 {
            insert(&mut whole, &mut root, &key(i), &[1; 90]).await.unwrap();
        }
        assert_eq!(root.levels, 2);
        let n = Node::open(&whole.nodes[&root.block], 2).unwrap();
        let keys: Vec<_> = (0..n.count()).map(|i| n.key(i).unwrap()).collect();
        let mut refused = 0;
        let mut random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        for _ in 0..2000 {
            let (mut s, root) = (whole.clone(), root);
            for _ in 0..random.random_range(1..8) {
                let (i, j) = (random.random_range(1..keys.len()), random.random_range(0..keys.len()));
                let block = s.node_mut(root.block).await.unwrap();
                super::node::set_key(block, 2, i, &keys[j]).unwrap();
                // and the leaves' first keys follow, so that only the order is wrong
                let leaf = Node::open(&s.nodes[&root.block], 2).unwrap().child(i).unwrap();
                super::node::set_key(s.node_mut(leaf).await.unwrap(), 1, 0, &keys[j]).unwrap();
            }
            for from in (0..1500).step_by(50) {
                s.expect_an_end();
                let _ = scan(&s, root, key(from), Key::MAX, usize::MAX).await;
                let _ = last_at_or_before(&s, root, &key(from)).await;
                let (mut t, mut troot) = (s.clone(), root);
                refused += u32::from(remove_range(&mut t, &mut troot, &key(from), &Key::MAX, 1).await.is_err());
                let _ = remove_range(&mut t, &mut troot, &key(from), &Key::MAX, usize::MAX).await;
            }
        }
        assert!(refused > 0);
    });
}

#[test]
fn a_root_that_cannot_be_is_an_error() {
    run(async {
        let s = Store::default();
        for root in [
            Root { block: 0, version: 0, levels: 1, nodes: 1 },
            Root { block: 5, version: 0, levels: 0, nodes: 1 },
            Root { block: 5, version: 0, levels: 13, nodes: 1 },
        ] {
            assert!(get(&s, root, &key(1)).await.is_err());
        }
    });
}

#[test]
fn ascending_items_fill_leaves() {
    run(async {
        let (mut s, mut root) = (Store::default(), Root::default());
        for i in 0..20_000 {
            insert(&mut s, &mut root, &Key::new(i, Kind::Inode, 0), &[5; 112]).await.unwrap();
        }
        assert_eq!(root.levels, 3);
        // 30 items of 133 bytes fit into 4024
        assert_eq!(root.nodes, 20_000u64.div_ceil(30) + 6 + 1);
        for_each_node(&s, root, &mut |_, b| {
            check_node(b, u16::from_le_bytes([b[64], b[65]]).into()).unwrap();
        })
        .await
        .unwrap();
    });
}

#[test]
fn small_changes_are_few_bytes() {
    run(async {
        let (mut s, mut root) = (Store::default(), Root::default());
        let (mut total, mut large, mut splits) = (0, 0, 0);
        let count = 1500u64;
        for i in 0..count {
            // Delivery: a directory entry at a hash, an inode at the end.
            for (k, v) in [
                (Key::new(1, Kind::Dirent, i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 1), vec![i as u8 | 1; 60]),
                (Key::new(i + 2, Kind::Inode, 0), vec![i as u8 | 1; 112]),
            ] {
                let (before, nodes) = (s.clone(), root.nodes);
                s.version += 1;
                insert(&mut s, &mut root, &k, &v).await.unwrap();
                let n = bytes_changed(&before, &s);
                total += n;
                if root.nodes != nodes {
                    splits += 1;
                } else if n >= 450 {
                    large += 1;
                }
            }
        }
        let mean = total / (2 * count as usize);
        assert!(mean < 350, "mean {mean} bytes per insert");
        assert!(splits < 2 * count / 15, "{splits} splits");
        // Without a split: the item, the slots behind it, the header. The rest is compaction of a node that lost items to a
        // split, once per split.
        assert!(large <= splits, "{large} large changes, {splits} splits");

        // Replacing by the same size touches only the value.
        let k = Key::new(900, Kind::Inode, 0);
        let before = s.clone();
        s.version += 1;
        insert(&mut s, &mut root, &k, &[0xee; 112]).await.unwrap();
        // and the version: two bytes of it in each node on the way and in each pointer
        assert_eq!(root.levels, 2);
        assert!(bytes_changed(&before, &s) <= 112 + 2 * 3);
        // A rename in a mailbox: one entry goes, another comes.
        let gone = scan(&s, root, Key::new(1, Kind::Dirent, 1 << 60), Key::MAX, 1).await.unwrap().remove(0);
        let before = s.clone();
        s.version += 1;
        remove(&mut s, &mut root, &gone.0).await.unwrap();
        assert!(bytes_changed(&before, &s) < 150 + 2 * 3, "{}", bytes_changed(&before, &s));
    });
}

#[test]
fn warming_reads_each_level_once() {
    run(async {
        let (mut s, mut root) = (Store::default(), Root::default());
        for i in 0..20_000 {
            insert(&mut s, &mut root, &Key::new(i, Kind::Inode, 0), &[5; 112]).await.unwrap();
        }
        warm(&s, root, &Key::new(3000, Kind::Inode, 0), &Key::new(12_000, Kind::Inode, 0)).await.unwrap();
        let calls = s.prefetched.borrow();
        assert_eq!(calls.len(), 2, "inner nodes, then leaves");
        assert!((300..=303).contains(&calls[1].len()), "{}", calls[1].len());
    });
}

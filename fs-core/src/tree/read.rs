//! Reading a tree: lookups, ordered scans, warming of a cold range.

use std::ops::ControlFlow;
use std::sync::Arc;

use journal::Block;
use journal::block::{self, BlockHeader};

use super::node::{Bad, Node, RawKey, cooked};
use super::{MAX_LEVELS, NodeRead, Root};
use crate::error::{FsError, Result};
use crate::format::item::Key;

/// A node on the way down, with the keys it may hold.
pub(super) struct Frame {
    pub block: u64,
    pub node: Arc<Block>,
    pub level: u32,
    /// The item whose child the way goes through (of a leaf: unused).
    pub index: usize,
    pub lower: RawKey,
    pub upper: Option<RawKey>,
}

/// Attaches the place to what is wrong with a node.
pub(super) fn at<R: NodeRead, T>(s: &R, block: u64, r: std::result::Result<T, Bad>) -> Result<T> {
    r.map_err(|why| s.damaged(block, &why))
}

impl Frame {
    pub fn open<R: NodeRead>(&self, s: &R) -> Result<Node<'_>> {
        at(s, self.block, Node::open(&self.node, self.level))
    }

    /// Loads and verifies the child at `index`.
    pub async fn child<R: NodeRead>(&self, s: &R, index: usize) -> Result<Frame> {
        let n = self.open(s)?;
        let block = at(s, self.block, n.child(index))?;
        let version = at(s, self.block, n.child_version(index))?;
        let lower = at(s, self.block, n.key(index))?;
        let upper = if index + 1 < n.count() { Some(at(s, self.block, n.key(index + 1))?) } else { self.upper };
        // A walk that goes on from a child's upper bound ends only if bounds grow.
        if upper.is_some_and(|u| u <= lower) {
            return Err(s.damaged(self.block, "keys are not in order"));
        }
        load(s, block, version, self.level - 1, lower, upper).await
    }
}

/// A node of the version that what leads to it says.
pub(super) async fn checked<R: NodeRead>(s: &R, block: u64, version: u32) -> Result<Arc<Block>> {
    let node = s.node(block).await?;
    if let Err(why) = block::check_version(&node, version) {
        let owner = BlockHeader::decode(&node).map_err(|e| s.damaged(block, &e.to_string()))?.owner;
        return Err(FsError::Block { block, owner, why });
    }
    Ok(node)
}

async fn load<R: NodeRead>(
    s: &R,
    block: u64,
    version: u32,
    level: u32,
    lower: RawKey,
    upper: Option<RawKey>,
) -> Result<Frame> {
    if block == 0 {
        return Err(s.damaged(block, "tree node without a block"));
    }
    let node = checked(s, block, version).await?;
    let f = Frame { block, node, level, index: 0, lower, upper };
    at(s, block, f.open(s)?.within(&f.lower, f.upper.as_ref()))?;
    Ok(f)
}

/// The root, `None` for an empty tree.
pub(super) async fn load_root<R: NodeRead>(s: &R, root: Root) -> Result<Option<Frame>> {
    match (root.block, root.levels) {
        (0, 0) => Ok(None),
        (b, l) if b != 0 && (1..=MAX_LEVELS).contains(&l) => {
            Ok(Some(load(s, b, root.version, l, Key::MIN.encode(), None).await?))
        }
        (b, l) => Err(s.damaged(b, &format!("a tree of {l} levels cannot be"))),
    }
}

/// The way from the root to the leaf that covers `key`; empty for an empty tree.
pub(super) async fn descend<R: NodeRead>(s: &R, root: Root, key: &RawKey) -> Result<Vec<Frame>> {
    let mut path = Vec::new();
    let mut next = load_root(s, root).await?;
    while let Some(mut f) = next {
        if f.level == 1 {
            path.push(f);
            break;
        }
        f.index = at(s, f.block, f.open(s)?.covering(key))?;
        let child = f.child(s, f.index).await?;
        if child.upper.is_some_and(|u| u <= *key) {
            return Err(s.damaged(f.block, "keys are not in order"));
        }
        next = Some(child);
        path.push(f);
    }
    Ok(path)
}

/// The value of one item.
pub async fn get<R: NodeRead>(s: &R, root: Root, key: &Key) -> Result<Option<Vec<u8>>> {
    let key = key.encode();
    let path = descend(s, root, &key).await?;
    let Some(leaf) = path.last() else { return Ok(None) };
    let n = leaf.open(s)?;
    match at(s, leaf.block, n.search(&key))? {
        Ok(i) => Ok(Some(at(s, leaf.block, n.value(i))?.to_vec())),
        Err(_) => Ok(None),
    }
}

/// Visits the items of `from..=to` in ascending order until `visit` breaks.
pub async fn scan_with<R: NodeRead>(
    s: &R,
    root: Root,
    from: Key,
    to_inclusive: Key,
    mut visit: impl FnMut(Key, &[u8]) -> ControlFlow<()>,
) -> Result<()> {
    let (from, to) = (from.encode(), to_inclusive.encode());
    if from > to {
        return Ok(());
    }
    let mut path = descend(s, root, &from).await?;
    while let Some(leaf) = path.pop() {
        let n = leaf.open(s)?;
        let start = match at(s, leaf.block, n.search(&from))? {
            Ok(i) | Err(i) => i,
        };
        for i in start..n.count() {
            let key = at(s, leaf.block, n.key(i))?;
            if key > to || visit(cooked(&key), at(s, leaf.block, n.value(i))?).is_break() {
                return Ok(());
            }
        }
        // The next leaf: up to the nearest node with a child to the right, then down its left edge.
        while let Some(mut f) = path.pop() {
            if f.index + 1 >= f.open(s)?.count() {
                continue;
            }
            f.index += 1;
            let mut child = f.child(s, f.index).await?;
            path.push(f);
            while child.level > 1 {
                let below = child.child(s, 0).await?;
                path.push(child);
                child = below;
            }
            if child.lower > to {
                return Ok(());
            }
            path.push(child);
            break;
        }
    }
    Ok(())
}

/// Up to `limit` items of `from..=to`, ascending.
pub async fn scan<R: NodeRead>(
    s: &R,
    root: Root,
    from: Key,
    to_inclusive: Key,
    limit: usize,
) -> Result<Vec<(Key, Vec<u8>)>> {
    let mut out = Vec::new();
    if limit == 0 {
        return Ok(out);
    }
    scan_with(s, root, from, to_inclusive, |k, v| {
        out.push((k, v.to_vec()));
        if out.len() == limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .await?;
    Ok(out)
}

/// The item with the largest key that is not above `key`.
pub async fn last_at_or_before<R: NodeRead>(s: &R, root: Root, key: &Key) -> Result<Option<(Key, Vec<u8>)>> {
    let key = key.encode();
    let mut path = descend(s, root, &key).await?;
    while let Some(leaf) = path.pop() {
        let n = leaf.open(s)?;
        let i = match at(s, leaf.block, n.search(&key))? {
            Ok(i) => Some(i),
            Err(i) => i.checked_sub(1),
        };
        if let Some(i) = i {
            let k = at(s, leaf.block, n.key(i))?;
            return Ok(Some((cooked(&k), at(s, leaf.block, n.value(i))?.to_vec())));
        }
        // All of this leaf is above: the last item of the leaf before, which is not empty.
        while let Some(mut f) = path.pop() {
            let Some(before) = f.index.checked_sub(1) else { continue };
            f.index = before;
            let mut child = f.child(s, before).await?;
            path.push(f);
            while child.level > 1 {
                child.index = child.open(s)?.count() - 1;
                let below = child.child(s, child.index).await?;
                path.push(child);
                child = below;
            }
            path.push(child);
            break;
        }
    }
    Ok(None)
}

/// Brings the nodes that hold `from..=to` into the cache with few large reads: inner nodes level by level, then
/// all leaves at once. For a cold mailbox.
pub async fn warm<R: NodeRead>(s: &R, root: Root, from: &Key, to: &Key) -> Result<()> {
    let (from, to) = (from.encode(), to.encode());
    let Some(top) = load_root(s, root).await? else { return Ok(()) };
    let mut frames = vec![top];
    while frames.first().is_some_and(|f| f.level > 1) {
        // (frame, item) of every child in range, and where they are
        let mut children = Vec::new();
        let mut blocks = Vec::new();
        for (fi, f) in frames.iter().enumerate() {
            let n = f.open(s)?;
            let first = at(s, f.block, n.covering(&from))?;
            for i in first..n.count() {
                if i > first && at(s, f.block, n.key(i))? > to {
                    break;
                }
                children.push((fi, i));
                blocks.push(at(s, f.block, n.child(i))?);
            }
        }
        if blocks.len() as u64 > root.nodes {
            return Err(s.damaged(root.block, "the tree has more nodes than its header counts"));
        }
        s.prefetch(&blocks).await?;
        if frames.first().is_some_and(|f| f.level == 2) {
            return Ok(());
        }
        let mut below = Vec::with_capacity(children.len());
        for (fi, i) in children {
            if let Some(f) = frames.get(fi) {
                below.push(f.child(s, i).await?);
            }
        }
        frames = below;
    }
    Ok(())
}

/// Visits every node, parents before children.
pub async fn for_each_node<R: NodeRead>(s: &R, root: Root, f: &mut impl FnMut(u64, &Block)) -> Result<()> {
    let mut path: Vec<Frame> = Vec::new();
    let mut seen = 0u64;
    let mut next = load_root(s, root).await?;
    loop {
        if let Some(frame) = next.take() {
            seen += 1;
            if seen > root.nodes {
                return Err(s.damaged(frame.block, "the tree has more nodes than its header counts"));
            }
            f(frame.block, &frame.node);
            if frame.level > 1 {
                path.push(frame);
            }
        }
        let Some(mut top) = path.pop() else { return Ok(()) };
        let n = top.open(s)?;
        if top.index >= n.count() {
            continue;
        }
        if top.level == 2 && top.index == 0 {
            let blocks: Vec<u64> = (0..n.count()).filter_map(|i| n.child(i).ok()).collect();
            s.prefetch(&blocks).await?;
        }
        let child = top.child(s, top.index).await?;
        top.index += 1;
        path.push(top);
        next = Some(child);
    }
}

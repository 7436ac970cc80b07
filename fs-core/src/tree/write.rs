//! Changing a tree: inserts with splits, removals with merges.

use journal::block::set_version;

use super::node::{
    self, CAPACITY, MERGE_MAX, Node, RawKey, UNDERFULL, body_key, cooked, cost, inner_body, insert_at, leaf_body,
    rebuild, remove_at, set_child_version, set_key, shrink_value,
};
use super::read::{Frame, at, checked, descend};
use super::{MAX_LEVELS, NodeRead, NodeWrite, Root};
use crate::error::Result;
use crate::format::item::{Key, VALUE_MAX};

/// A step of the way down that a change remembers: the node and the child taken. Holds no node, so that the store can
/// change its own copy in place.
struct Step {
    block: u64,
    level: u32,
    index: usize,
}

/// Takes the nodes of a path over to be changed, before anything else is: they and the pointers to them are of this operation's version
/// from here on, so whatever moves a pointer afterwards moves the right one. Gives the inner steps and the leaf's block.
async fn touch<W: NodeWrite>(s: &mut W, root: &mut Root, path: Vec<Frame>) -> Result<(Vec<Step>, u64)> {
    let version = s.version();
    let mut steps: Vec<Step> =
        path.into_iter().map(|f| Step { block: f.block, level: f.level, index: f.index }).collect();
    let leaf = steps.pop().map_or(0, |s| s.block);
    for step in &steps {
        stamp(s, step.block, version).await?;
        point(s, step.block, step.level, step.index, version).await?;
    }
    stamp(s, leaf, version).await?;
    root.version = version;
    Ok((steps, leaf))
}

async fn stamp<W: NodeWrite>(s: &mut W, block: u64, version: u32) -> Result<()> {
    set_version(s.node_mut(block).await?, version);
    Ok(())
}

/// The pointer at `index` leads to a child of `version`.
async fn point<W: NodeWrite>(s: &mut W, block: u64, level: u32, index: usize, version: u32) -> Result<()> {
    change(s, block, |b| set_child_version(b, level, index, version)).await
}

/// A new node of this operation.
async fn new_node<W: NodeWrite>(s: &mut W) -> Result<u64> {
    let block = s.alloc_node().await?;
    let version = s.version();
    stamp(s, block, version).await?;
    Ok(block)
}

/// Reads a node once more on the way up; it was verified on the way down.
async fn reopen<R: NodeRead, T>(
    s: &R,
    block: u64,
    level: u32,
    f: impl FnOnce(&Node<'_>) -> std::result::Result<T, node::Bad>,
) -> Result<T> {
    let b = s.node(block).await?;
    at(s, block, Node::open(&b, level).and_then(|n| f(&n)))
}

/// Changes a node and attaches the place to what may be wrong with it.
async fn change<W: NodeWrite, T>(
    s: &mut W,
    block: u64,
    f: impl FnOnce(&mut [u8]) -> std::result::Result<T, node::Bad>,
) -> Result<T> {
    let r = f(s.node_mut(block).await?);
    at(s, block, r)
}

/// Inserts an item, or replaces the value of the item with this key.
pub async fn insert<W: NodeWrite>(s: &mut W, root: &mut Root, key: &Key, value: &[u8]) -> Result<()> {
    if value.len() > VALUE_MAX {
        return Err(s.damaged(root.block, &format!("an item of {} bytes is not allowed", value.len())));
    }
    let key = key.encode();
    let path = descend(s, *root, &key).await?;
    let Some(leaf) = path.last() else {
        let block = new_node(s).await?;
        change(s, block, |b| rebuild(b, 1, &[&leaf_body(&key, value)])).await?;
        *root = Root { block, version: s.version(), levels: 1, nodes: 1 };
        return Ok(());
    };
    let n = leaf.open(s)?;
    let found = at(s, leaf.block, n.search(&key))?;
    let old_len = match found {
        Ok(i) => Some(at(s, leaf.block, n.value(i))?.len()),
        Err(_) => None,
    };
    let (mut path, leaf) = touch(s, root, path).await?;
    let i = match found {
        Err(i) => i,
        Ok(i) => {
            if change(s, leaf, |b| shrink_value(b, i, value)).await? {
                return if old_len == Some(value.len()) { Ok(()) } else { refill(s, root, path, leaf, 1).await };
            }
            change(s, leaf, |b| remove_at(b, 1, i..i + 1)).await?;
            i
        }
    };
    // Where a node is full it splits, and an item for the new node goes into the parent, and so on up.
    let (mut block, mut level, mut i, mut body) = (leaf, 1, i, leaf_body(&key, value));
    loop {
        if reopen(s, block, level, |n| Ok(n.used())).await? + cost(&body) <= CAPACITY {
            return change(s, block, |b| insert_at(b, level, i, &body)).await;
        }
        let right_edge = is_right_edge(s, &path).await?;
        let (separator, right) = split(s, root, block, level, i, &body, right_edge).await?;
        let Some(parent) = path.pop() else {
            return grow(s, root, block, separator, right).await;
        };
        (block, level, i, body) =
            (parent.block, parent.level, parent.index + 1, inner_body(&separator, right, s.version()));
    }
}

/// Whether the way down went through the last child everywhere.
async fn is_right_edge<R: NodeRead>(s: &R, path: &[Step]) -> Result<bool> {
    for p in path {
        if reopen(s, p.block, p.level, |n| Ok(n.count())).await? != p.index + 1 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Splits a full node while `body` goes in at `i`. Returns the smallest key of the new right node, and its block.
async fn split<W: NodeWrite>(
    s: &mut W,
    root: &mut Root,
    block: u64,
    level: u32,
    i: usize,
    body: &[u8],
    right_edge: bool,
) -> Result<(RawKey, u64)> {
    let old = s.node(block).await?;
    let mut bodies = at(s, block, Node::open(&old, level).and_then(|n| n.bodies()))?;
    if i > bodies.len() || bodies.len() < 2 {
        return Err(s.damaged(block, "too few items for a full node"));
    }
    let at_end = right_edge && i == bodies.len();
    bodies.insert(i, body);
    let k = match (at_end, level) {
        (true, 1) => bodies.len() - 1,
        // An inner node keeps two children, so that each has a neighbour to merge with.
        (true, _) => bodies.len() - 2,
        (false, _) => middle(&bodies),
    };
    let separator = bodies.get(k).map(|b| body_key(b)).unwrap_or_default();
    let right = new_node(s).await?;
    root.nodes += 1;
    change(s, right, |b| rebuild(b, level, &bodies[k..])).await?;
    let count = bodies.len() - 1;
    drop(bodies);
    drop(old);
    // The left node keeps its bodies where they are: it only loses slots, and perhaps gains the new item.
    if i < k {
        change(s, block, |b| remove_at(b, level, k - 1..count)).await?;
        change(s, block, |b| insert_at(b, level, i, body)).await?;
    } else if k < count {
        change(s, block, |b| remove_at(b, level, k..count)).await?;
    }
    Ok((separator, right))
}

/// The position that divides items most evenly by bytes, at least one on each side.
fn middle(bodies: &[&[u8]]) -> usize {
    let total: usize = bodies.iter().map(|b| cost(b)).sum();
    let (mut left, mut best, mut k) = (0, usize::MAX, 1);
    for (i, b) in bodies.iter().enumerate().take(bodies.len().saturating_sub(1)) {
        left += cost(b);
        let apart = (2 * left).abs_diff(total);
        if apart < best {
            (best, k) = (apart, i + 1);
        }
    }
    k
}

/// A new root above the old one and its new right neighbour.
async fn grow<W: NodeWrite>(s: &mut W, root: &mut Root, left: u64, separator: RawKey, right: u64) -> Result<()> {
    if root.levels >= MAX_LEVELS {
        return Err(s.damaged(root.block, "the tree is too deep"));
    }
    let levels = root.levels + 1;
    let block = new_node(s).await?;
    let version = s.version();
    let items = [inner_body(&Key::MIN.encode(), left, version), inner_body(&separator, right, version)];
    change(s, block, |b| rebuild(b, levels, &[&items[0], &items[1]])).await?;
    *root = Root { block, version, levels, nodes: root.nodes + 1 };
    Ok(())
}

/// Removes one item; returns its value.
pub async fn remove<W: NodeWrite>(s: &mut W, root: &mut Root, key: &Key) -> Result<Option<Vec<u8>>> {
    let mut gone = remove_range(s, root, key, key, 1).await?;
    Ok(gone.pop().map(|(_, v)| v))
}

/// Removes up to `limit` items of `from..=to`, in ascending order; returns them.
pub async fn remove_range<W: NodeWrite>(
    s: &mut W,
    root: &mut Root,
    from: &Key,
    to_inclusive: &Key,
    limit: usize,
) -> Result<Vec<(Key, Vec<u8>)>> {
    let (mut from, to) = (from.encode(), to_inclusive.encode());
    let mut gone = Vec::new();
    while gone.len() < limit && from <= to {
        let path = descend(s, *root, &from).await?;
        let Some(leaf) = path.last() else { break };
        let n = leaf.open(s)?;
        let start = match at(s, leaf.block, n.search(&from))? {
            Ok(i) | Err(i) => i,
        };
        let mut end = start;
        while end < n.count() && gone.len() < limit {
            let key = at(s, leaf.block, n.key(end))?;
            if key > to {
                break;
            }
            gone.push((cooked(&key), at(s, leaf.block, n.value(end))?.to_vec()));
            end += 1;
        }
        // What follows in the tree, if anything may: taken before the leaf's bounds change.
        let next = leaf.upper.filter(|_| end == n.count());
        if end > start {
            let (path, leaf) = touch(s, root, path).await?;
            change(s, leaf, |b| remove_at(b, 1, start..end)).await?;
            refill(s, root, path, leaf, 1).await?;
        }
        match next {
            Some(upper) => from = upper,
            None => break,
        }
    }
    Ok(gone)
}

/// After a node lost bytes: merges it with a neighbour or fills it from one if it is underfull, and so on up; an empty
/// tree loses its root.
async fn refill<W: NodeWrite>(s: &mut W, root: &mut Root, mut path: Vec<Step>, leaf: u64, level: u32) -> Result<()> {
    let (mut block, mut level) = (leaf, level);
    loop {
        let used = reopen(s, block, level, |n| Ok(n.used())).await?;
        let Some(parent) = path.pop() else { break };
        if used >= UNDERFULL {
            return Ok(());
        }
        if !join(s, root, &parent, level).await? {
            return Ok(());
        }
        (block, level) = (parent.block, parent.level);
    }
    shrink_root(s, root).await
}

/// Joins the child that `parent` leads to with its left neighbour (the first child: with its right one). Returns true if they were
/// merged, so that the parent lost an item; false if their items were divided anew.
async fn join<W: NodeWrite>(s: &mut W, root: &mut Root, parent: &Step, level: u32) -> Result<bool> {
    let li = parent.index.saturating_sub(1);
    let (left, right, separator, versions) = reopen(s, parent.block, parent.level, |n| {
        Ok((n.child(li)?, n.child(li + 1)?, n.key(li + 1)?, (n.child_version(li)?, n.child_version(li + 1)?)))
    })
    .await?;
    if left == right {
        return Err(s.damaged(parent.block, "two items have the same child"));
    }
    let (l, r) = (checked(s, left, versions.0).await?, checked(s, right, versions.1).await?);
    let version = s.version();
    let ln = at(s, left, Node::open(&l, level))?;
    let rn = at(s, right, Node::open(&r, level))?;
    if ln.used() + rn.used() <= MERGE_MAX {
        let count = ln.count();
        let bodies: Vec<Vec<u8>> = at(s, right, rn.bodies())?.into_iter().map(<[u8]>::to_vec).collect();
        drop((l, r));
        stamp(s, left, version).await?;
        point(s, parent.block, parent.level, li, version).await?;
        for (k, body) in bodies.iter().enumerate() {
            change(s, left, |b| insert_at(b, level, count + k, body)).await?;
        }
        s.free_node(right);
        root.nodes = root.nodes.saturating_sub(1);
        change(s, parent.block, |b| remove_at(b, parent.level, li + 1..li + 2)).await?;
        return Ok(true);
    }
    let mut bodies = at(s, left, ln.bodies())?;
    bodies.extend(at(s, right, rn.bodies())?);
    if bodies.len() < 2 {
        return Err(s.damaged(left, "too few items for a full node"));
    }
    let k = middle(&bodies);
    let new_separator = bodies.get(k).map_or(separator, |b| body_key(b));
    for (i, child, bodies) in [(li, left, &bodies[..k]), (li + 1, right, &bodies[k..])] {
        change(s, child, |b| rebuild(b, level, bodies)).await?;
        stamp(s, child, version).await?;
        point(s, parent.block, parent.level, i, version).await?;
    }
    change(s, parent.block, |b| set_key(b, parent.level, li + 1, &new_separator)).await?;
    Ok(false)
}

/// A root without items is no tree; an inner root with one child gives way to it.
async fn shrink_root<W: NodeWrite>(s: &mut W, root: &mut Root) -> Result<()> {
    loop {
        let level = root.levels;
        let (count, child) = reopen(s, root.block, level, |n| {
            Ok((n.count(), if level > 1 && n.count() == 1 { n.child(0)? } else { 0 }))
        })
        .await?;
        let nodes = root.nodes.saturating_sub(1);
        match (count, level) {
            (0, 1) => {
                s.free_node(root.block);
                *root = Root::default();
                return Ok(());
            }
            (0, _) => return Err(s.damaged(root.block, "node without items")),
            (1, 2..) => {
                s.free_node(root.block);
                *root = Root { block: child, levels: level - 1, nodes, ..*root };
            }
            _ => return Ok(()),
        }
    }
}

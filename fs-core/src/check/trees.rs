//! Reads the trees of many domains at once, level by level, so that a volume of many small domains needs few large reads.

use cluster::LockId;
use journal::block::{BlockKind, check_version};

use super::domain::{DomainCheck, Shared};
use super::reader::Reader;
use crate::format::domain::DomainHeader;
use crate::format::item::Key;
use crate::tree::MAX_LEVELS;
use crate::tree::node::{Node, RawKey, cooked};

/// Domains whose trees are read together.
pub(crate) const DOMAINS: usize = 256;
/// Nodes in memory at once: 16 MiB.
const NODES: usize = 4096;

/// A node to be read, with what its parent says about it.
struct Todo {
    domain: usize,
    block: u64,
    version: u32,
    level: u32,
    lower: RawKey,
    upper: Option<RawKey>,
}

/// A domain being checked.
struct Run {
    domain: u32,
    header: DomainHeader,
    nodes: u64,
    whole: bool,
    check: DomainCheck,
}

/// Checks up to [`DOMAINS`] domains, given with their header blocks.
pub(super) async fn check(r: &Reader, domains: &[(u32, u64)], nodes: u16, s: &mut Shared<'_>) {
    let headers = r.many(&domains.iter().map(|d| d.1).collect::<Vec<_>>()).await;
    let mut runs = Vec::new();
    let mut todo = Vec::new();
    for (domain, block) in domains {
        let place = format!("domain {domain}, header in block {block}");
        let before = s.report.violation_count;
        s.report.domains += 1;
        s.space.claim(*block, 1, s.report, &|| place.clone());
        let header = match headers.get(block) {
            Some(Ok(b)) => match r.verify(*block, b, LockId::Domain(*domain), BlockKind::DomainHeader) {
                Ok(()) => DomainHeader::decode(b).map_err(|e| e.to_string()).and_then(|h| {
                    let least = r.least_versions.get(domain).copied().unwrap_or(0);
                    h.check_age(least).map_err(|e| e.to_string()).map(|()| h)
                }),
                Err(e) => Err(e.to_string()),
            },
            Some(Err(e)) => Err(e.clone()),
            None => Err("could not be read".into()),
        };
        let header = match header {
            Ok(h) => h,
            Err(e) => {
                s.report.violation(place, e);
                s.report.damaged.insert(*domain);
                s.links.broken.insert(*domain);
                continue;
            }
        };
        if header.reserve_len > 0 {
            let who = || format!("domain {domain}, blocks reserved for its tree");
            s.space.claim(header.reserve_next, header.reserve_len.into(), s.report, &who);
        }
        let mut whole = true;
        match (header.root, header.levels) {
            (0, 0) => {}
            (root, levels) if root != 0 && (1..=MAX_LEVELS).contains(&levels) => todo.push(Todo {
                domain: runs.len(),
                block: root,
                version: header.root_version(),
                level: levels,
                lower: Key::MIN.encode(),
                upper: None,
            }),
            (root, levels) => {
                s.report.violation(place, format!("a tree of {levels} levels with its root in block {root} cannot be"));
                whole = false;
            }
        }
        s.mark(before, *domain);
        runs.push(Run { domain: *domain, header, nodes: 0, whole, check: DomainCheck::new(*domain, nodes) });
    }

    // Inner nodes level by level. Leaves come up at different levels, but in the order of keys within a domain.
    let mut leaves = Vec::new();
    while !todo.is_empty() {
        let mut below = Vec::new();
        let (l, inner): (Vec<Todo>, Vec<Todo>) = todo.into_iter().partition(|t| t.level == 1);
        leaves.extend(l);
        for batch in inner.chunks(NODES) {
            visit(r, batch, &mut runs, s, &mut |t, n, _, _| {
                for i in 0..n.count() {
                    let upper = if i + 1 < n.count() { Some(n.key(i + 1)?) } else { t.upper };
                    let (block, version, lower) = (n.child(i)?, n.child_version(i)?, n.key(i)?);
                    below.push(Todo { domain: t.domain, block, version, level: t.level - 1, lower, upper });
                }
                Ok(())
            })
            .await;
        }
        todo = below;
    }
    leaves.sort_by_key(|t| t.domain);
    for batch in leaves.chunks(NODES) {
        visit(r, batch, &mut runs, s, &mut |_, n, run, s| {
            for i in 0..n.count() {
                run.check.item(cooked(&n.key(i)?), n.value(i)?, s);
            }
            Ok(())
        })
        .await;
    }

    for run in runs {
        let before = s.report.violation_count;
        let domain = run.domain;
        s.report.tree_nodes += run.nodes;
        if !run.whole {
            s.links.broken.insert(run.domain);
        } else if run.nodes != run.header.nodes {
            let text = format!("its header counts {} tree nodes, it has {}", run.header.nodes, run.nodes);
            s.report.violation(format!("domain {}", run.domain), text);
        }
        run.check.finish(&run.header, run.whole, s);
        s.mark(before, domain);
    }
}

type Visitor<'v> = dyn FnMut(&Todo, &Node<'_>, &mut Run, &mut Shared<'_>) -> Result<(), String> + Send + 'v;

/// Reads nodes and hands those that verify to `f`, in the order given.
async fn visit(r: &Reader, batch: &[Todo], runs: &mut [Run], s: &mut Shared<'_>, f: &mut Visitor<'_>) {
    let blocks = r.many(&batch.iter().map(|t| t.block).collect::<Vec<_>>()).await;
    for t in batch {
        let Some(run) = runs.get_mut(t.domain) else { continue };
        let before = s.report.violation_count;
        let place = || format!("block {}, tree of domain {}", t.block, run.domain);
        // A node met twice is not followed twice: that bounds the work, whatever the trees say.
        if !s.space.claim(t.block, 1, s.report, &place) {
            run.whole = false;
            s.mark(before, run.domain);
            continue;
        }
        let node = match blocks.get(&t.block) {
            Some(Ok(b)) => b,
            other => {
                let why = other.and_then(|o| o.as_ref().err()).map_or("could not be read", |e| e.as_str());
                s.report.violation(place(), why);
                run.whole = false;
                s.mark(before, run.domain);
                continue;
            }
        };
        let sound = r.verify(t.block, node, LockId::Domain(run.domain), BlockKind::TreeNode);
        if let Err(e) = sound.and_then(|()| check_version(node, t.version)) {
            s.report.violation(place(), e);
            run.whole = false;
            s.mark(before, run.domain);
            continue;
        }
        run.nodes += 1;
        let done = Node::open(node, t.level).and_then(|n| {
            n.check()?;
            n.within(&t.lower, t.upper.as_ref())?;
            f(t, &n, run, s)
        });
        if let Err(e) = done {
            s.report.violation(format!("block {}, tree of domain {}", t.block, run.domain), e);
            run.whole = false;
        }
        s.mark(before, run.domain);
    }
}

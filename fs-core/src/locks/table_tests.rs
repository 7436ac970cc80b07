//! The lock table against a model that knows bytes instead of ranges.

use std::collections::{BTreeMap, BTreeSet};

use cluster::NodeId;
use proptest::prelude::*;

use super::table::*;

const BYTES: u64 = 12;

fn owner(n: u64) -> Owner {
    Owner { node: NodeId { slot: (n % 2) as u16, incarnation: 1 }, id: n }
}

fn lock(n: u64, first: u64, last: u64, exclusive: bool) -> Lock {
    Lock { file: 5, space: Space::Record, owner: owner(n), first, last, exclusive, pid: n as u32 }
}

/// Of each byte: who holds it, exclusively or not.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    bytes: BTreeMap<u64, BTreeMap<Owner, bool>>,
    waits: Vec<(u64, Lock)>,
}

impl Model {
    fn conflict(&self, want: &Lock) -> bool {
        (want.first..=want.last).any(|b| {
            let at = self.bytes.get(&b).into_iter().flatten();
            at.into_iter().any(|(o, x)| *o != want.owner && (*x || want.exclusive))
        })
    }

    fn set(&mut self, l: &Lock) {
        for b in l.first..=l.last {
            self.bytes.entry(b).or_default().insert(l.owner, l.exclusive);
        }
    }

    fn clear(&mut self, o: Owner, first: u64, last: u64) {
        for b in first..=last {
            self.bytes.entry(b).or_default().remove(&o);
        }
    }

    fn of(t: &LockTable) -> Self {
        let mut m = Self::default();
        for (n, e) in t.entries() {
            if e.waits { m.waits.push((n, e.lock)) } else { m.set(&e.lock) }
        }
        m
    }

    fn trimmed(mut self) -> Self {
        self.bytes.retain(|_, o| !o.is_empty());
        self
    }
}

/// The representation is canonical, nothing held conflicts, and what could be granted has been.
fn check(t: &LockTable) {
    let entries = t.entries();
    let held: Vec<Lock> = entries.values().filter(|e| !e.waits).map(|e| e.lock).collect();
    for (i, a) in held.iter().enumerate() {
        for b in &held[i + 1..] {
            assert!(!a.conflicts(b), "{a:?} and {b:?} are both held");
            if a.owner == b.owner {
                assert!(a.last < b.first || b.last < a.first, "{a:?} overlaps {b:?}");
                let touch = a.last + 1 == b.first || b.last + 1 == a.first;
                assert!(!(touch && a.exclusive == b.exclusive), "{a:?} and {b:?} are one lock");
            }
        }
    }
    assert!(t.ready().is_empty(), "not granted: {:?}", t.ready());
    assert_eq!(LockTable::from_entries(&entries).entries(), entries);
}

/// Grants what can be granted, as the holder of a domain does; checks the order.
fn settle(t: &mut LockTable, m: &mut Model) {
    while let Some((n, _)) = t.ready().first().copied() {
        let want = *t.waiting(n).unwrap();
        assert!(!m.conflict(&want), "granted against a holder: {want:?}");
        for (earlier, w) in m.waits.iter().filter(|(e, _)| *e < n) {
            let for_me = m.clone().held_by(want.owner).iter().any(|l| l.conflicts(w));
            assert!(!w.conflicts(&want) || for_me, "{n} overtook {earlier}");
        }
        t.grant(n);
        m.waits.retain(|(w, _)| *w != n);
        m.set(&want);
    }
}

impl Model {
    fn held_by(self, o: Owner) -> Vec<Lock> {
        let at =
            |(b, owners): (u64, BTreeMap<Owner, bool>)| owners.get(&o).map(|x| Lock { owner: o, ..lock(0, b, b, *x) });
        self.bytes.into_iter().filter_map(at).collect()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Ask { o: u64, first: u64, len: u64, exclusive: bool, wait: bool },
    Unlock { o: u64, first: u64, len: u64 },
    Cancel { which: usize },
    Die { slot: u16 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (0..BYTES, 1..=BYTES);
    let step = prop_oneof![
        6 => (0..5u64, range.clone(), any::<bool>(), any::<bool>())
            .prop_map(|(o, (first, len), exclusive, wait)| Step::Ask { o, first, len, exclusive, wait }),
        4 => (0..5u64, range).prop_map(|(o, (first, len))| Step::Unlock { o, first, len }),
        1 => (0..8usize).prop_map(|which| Step::Cancel { which }),
        1 => (0..2u16).prop_map(|slot| Step::Die { slot }),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #[test]
    fn behaves_like_a_table_of_bytes(steps in steps()) {
        let (mut t, mut m) = (LockTable::default(), Model::default());
        for step in steps {
            match step {
                Step::Ask { o, first, len, exclusive, wait } => {
                    let want = lock(o, first, (first + len - 1).min(BYTES - 1), exclusive);
                    let obstacles = t.obstacles(&want, None);
                    prop_assert_eq!(!obstacles.holders.is_empty(), m.conflict(&want));
                    prop_assert_eq!(t.in_the_way(&want).is_none(), obstacles.none());
                    if obstacles.none() {
                        t.set(want);
                        m.set(&want);
                    } else if wait {
                        let n = t.wait(want);
                        m.waits.push((n, want));
                    }
                }
                Step::Unlock { o, first, len } => {
                    let last = (first + len - 1).min(BYTES - 1);
                    t.clear(&lock(o, 0, 0, false), first, last);
                    m.clear(owner(o), first, last);
                }
                Step::Cancel { which } => {
                    if let Some((n, _)) = m.waits.get(which).copied() {
                        prop_assert!(t.end_wait(n).is_some());
                        m.waits.remove(which);
                    }
                }
                Step::Die { slot } => {
                    t.retain(|_, e| e.lock.owner.node.slot != slot);
                    m.waits.retain(|(_, w)| w.owner.node.slot != slot);
                    for o in (0..5).map(owner).filter(|o| o.node.slot == slot) {
                        m.clear(o, 0, BYTES);
                    }
                }
            }
            settle(&mut t, &mut m);
            check(&t);
            prop_assert_eq!(Model::of(&t).trimmed(), m.clone().trimmed());
        }
    }
}

#[test]
fn a_new_lock_splits_and_joins_the_old_ones() {
    let mut t = LockTable::default();
    t.set(lock(1, 0, TO_THE_END, false));
    t.set(lock(1, 10, 19, true));
    let ranges = |t: &LockTable| {
        let mut all: Vec<_> = t.entries().values().map(|e| (e.lock.first, e.lock.last, e.lock.exclusive)).collect();
        all.sort_unstable();
        all
    };
    assert_eq!(ranges(&t), [(0, 9, false), (10, 19, true), (20, TO_THE_END, false)]);
    t.set(lock(1, 10, 19, false));
    assert_eq!(ranges(&t), [(0, TO_THE_END, false)]);
    assert!(t.clear(&lock(1, 0, 0, false), 5, 5));
    assert_eq!(ranges(&t), [(0, 4, false), (6, TO_THE_END, false)]);
    assert!(t.clear(&lock(1, 0, 0, false), 0, TO_THE_END));
    assert!(t.is_empty());
}

#[test]
fn readers_do_not_overtake_a_writer_but_its_obstacle_may() {
    let mut t = LockTable::default();
    t.set(lock(1, 0, 9, false));
    let writer = t.wait(lock(2, 0, 19, true));
    assert_eq!(t.obstacles(&lock(3, 0, 0, false), None).ahead, BTreeSet::from([owner(2)]));
    assert_eq!(t.in_the_way(&lock(3, 15, 15, false)).map(|l| l.owner), Some(owner(2)));
    // The writer waits for this one, which must not wait for the writer.
    assert!(t.obstacles(&lock(1, 10, 19, false), None).none());
    t.clear(&lock(1, 0, 0, false), 0, 9);
    assert_eq!(t.ready(), [(writer, owner(2))]);
}

#[test]
fn the_two_kinds_do_not_meet() {
    let mut t = LockTable::default();
    t.set(lock(1, 0, TO_THE_END, true));
    let flock = Lock { space: Space::Flock, ..lock(2, 0, TO_THE_END, true) };
    assert!(t.obstacles(&flock, None).none());
    let other_file = Lock { file: 6, ..lock(2, 0, TO_THE_END, true) };
    assert!(t.obstacles(&other_file, None).none());
}

#[test]
fn circles_are_found_across_files_and_domains() {
    let mut t = LockTable::default();
    let on = |file, l: Lock| Lock { file, ..l };
    t.set(on(1, lock(1, 0, 0, true)));
    t.set(on(2, lock(2, 0, 0, true)));
    let nowhere = |_| Vec::new();
    assert!(!t.deadlock(&on(2, lock(1, 0, 0, true)), nowhere));
    t.wait(on(2, lock(1, 0, 0, true)));
    assert!(t.deadlock(&on(1, lock(2, 0, 0, true)), nowhere));
    assert!(!t.deadlock(&on(1, lock(3, 0, 0, true)), nowhere));
    // 3 waits for 2 in another domain.
    t.set(on(3, lock(3, 0, 0, true)));
    assert!(t.deadlock(&on(3, lock(2, 0, 0, false)), |o| if o == owner(3) { vec![owner(2)] } else { vec![] }));
}

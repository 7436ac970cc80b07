//! Model check of locking without compare-and-write ([`crate::plain`]): the exclusion in one row, and bidding for a slot.
//!
//! Every cell is read by itself, writes arrive any time after they were submitted, nodes crash or lapse at any point and leave a
//! write under way, and are taken for dead by each other node by itself, once nothing of them can arrive. Time matters for bids
//! only, in steps; a write arrives however late.

use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::Slot;
use crate::plain::{Next, may_raise, next};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    /// Takes a node for dead while a write of it is under way.
    JudgesEarly,
    /// Reads the row once, before it raises its cell.
    LooksFirst,
    /// Takes a write of unknown outcome for done.
    UnknownIsDone,
    /// Counts a bid that took long to arrive.
    TakesItsTime,
    /// Believes its bid as soon as it is written.
    DoesNotWait,
    /// Bids again over any bid of its own, which may have arrived late.
    TrustsItsOwn,
    /// Begins to live long after its bid.
    UsesItLate,
}

/// What a node does next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum At {
    Out,
    Raise,
    /// Reads the row: cells read so far, and who was raised.
    Asking(u8, Vec<Slot>),
    Lower,
    Back(u8, Vec<Slot>),
    /// Has the right to change the sector.
    In,
    Changing,
    Done,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Write {
    Cell(bool),
    /// The value, in place of the one before it.
    Sector(u8),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    at: At,
    /// Under way, and whether its outcome was reported as unknown.
    write: Option<(Write, bool)>,
    /// Whom it takes for dead.
    dead: Vec<bool>,
    /// Changes it will still make.
    left: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Row {
    cells: Vec<bool>,
    sector: u8,
    nodes: Vec<Node>,
    crashes: u8,
    unknowns: u8,
    /// A change replaced something else than it was compared with.
    lost: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Go(usize),
    Arrive(usize),
    Unknown(usize),
    Crash(usize),
    Judge(usize, usize),
}

#[derive(Clone, Debug)]
struct Exclusion {
    nodes: usize,
    changes: u8,
    crashes: u8,
    unknowns: u8,
    mutant: Option<Mutant>,
}

impl Exclusion {
    fn others(&self, node: &Node, me: usize, raised: &[Slot]) -> Vec<Slot> {
        raised.iter().copied().filter(|s| usize::from(*s) != me && !node.dead[usize::from(*s)]).collect()
    }

    /// Reads one more cell; `None`: all have been read.
    fn read(&self, row: &Row, count: u8, seen: &[Slot]) -> Option<(u8, Vec<Slot>)> {
        let mut seen = seen.to_vec();
        let cell = *row.cells.get(usize::from(count))?;
        seen.extend(cell.then_some(Slot::from(count)));
        Some((count + 1, seen))
    }

    fn go(&self, row: &mut Row, i: usize) {
        let node = row.nodes[i].clone();
        let me = i as Slot;
        let looks_first = self.mutant == Some(Mutant::LooksFirst);
        let mut write = None;
        let at = match node.at {
            At::Out if looks_first => At::Asking(0, Vec::new()),
            At::Out | At::Raise => {
                write = Some(Write::Cell(true));
                if looks_first { At::In } else { At::Asking(0, Vec::new()) }
            }
            At::Asking(n, ref seen) => match self.read(row, n, seen) {
                Some((n, seen)) => At::Asking(n, seen),
                None => match next(me, self.others(&node, i, seen)) {
                    Next::Enter if looks_first => At::Raise,
                    Next::Enter => At::In,
                    Next::Wait => At::Asking(0, Vec::new()),
                    Next::StepBack => {
                        write = Some(Write::Cell(false));
                        At::Back(0, Vec::new())
                    }
                },
            },
            At::Back(n, ref seen) => match self.read(row, n, seen) {
                Some((n, seen)) => At::Back(n, seen),
                None if may_raise(me, self.others(&node, i, seen)) => At::Raise,
                None => At::Back(0, Vec::new()),
            },
            At::In => {
                write = Some(Write::Sector(row.sector + 1));
                At::Changing
            }
            At::Changing => At::Lower,
            At::Lower => {
                write = Some(Write::Cell(false));
                At::Done
            }
            At::Done => At::Out,
            At::Dead => At::Dead,
        };
        let n = &mut row.nodes[i];
        if n.at == At::Out {
            n.left -= 1;
        }
        n.at = at;
        n.write = write.map(|w| (w, false));
    }
}

impl Model for Exclusion {
    type State = Row;
    type Action = Action;

    fn init_states(&self) -> Vec<Row> {
        let node = Node { at: At::Out, write: None, dead: vec![false; self.nodes], left: self.changes };
        vec![Row {
            cells: vec![false; self.nodes],
            sector: 0,
            nodes: vec![node; self.nodes],
            crashes: self.crashes,
            unknowns: self.unknowns,
            lost: false,
        }]
    }

    fn actions(&self, row: &Row, actions: &mut Vec<Action>) {
        for (i, n) in row.nodes.iter().enumerate() {
            let assumes = self.mutant == Some(Mutant::UnknownIsDone) && n.write.is_some_and(|w| w.1);
            if n.at != At::Dead {
                // Nothing is done before the last write has its certain outcome.
                if (n.write.is_none() || assumes) && !(n.at == At::Out && n.left == 0) {
                    actions.push(Action::Go(i));
                }
                if row.crashes > 0 {
                    actions.push(Action::Crash(i));
                }
                if row.unknowns > 0 && n.write.is_some_and(|w| !w.1) {
                    actions.push(Action::Unknown(i));
                }
            }
            if n.write.is_some() {
                actions.push(Action::Arrive(i));
            }
            for (j, victim) in row.nodes.iter().enumerate() {
                let over = victim.write.is_none() || self.mutant == Some(Mutant::JudgesEarly);
                if n.at != At::Dead && victim.at == At::Dead && over && !n.dead[j] {
                    actions.push(Action::Judge(i, j));
                }
            }
        }
    }

    fn next_state(&self, row: &Row, action: Action) -> Option<Row> {
        let mut row = row.clone();
        match action {
            Action::Go(i) => self.go(&mut row, i),
            Action::Arrive(i) => match row.nodes[i].write.take()?.0 {
                Write::Cell(raised) => row.cells[i] = raised,
                Write::Sector(value) => {
                    row.lost |= row.sector + 1 != value;
                    row.sector = value;
                }
            },
            Action::Unknown(i) => {
                row.unknowns -= 1;
                row.nodes[i].write.as_mut()?.1 = true;
            }
            Action::Crash(i) => {
                row.crashes -= 1;
                row.nodes[i].at = At::Dead;
            }
            Action::Judge(i, j) => row.nodes[i].dead[j] = true,
        }
        Some(row)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("I4: one changes the sector", |_, row: &Row| {
                row.nodes.iter().filter(|n| matches!(n.at, At::In | At::Changing)).count() <= 1
            }),
            Property::always("I9: a change replaces what it was compared with", |_, row: &Row| !row.lost),
            Property::always("nobody waits for ever", |model: &Self, row: &Row| {
                let mut row = row.clone();
                // In turns, with nothing but what happens by itself: all must come to their end.
                for _ in 0..200 {
                    let mut actions = Vec::new();
                    model.actions(&row, &mut actions);
                    actions.retain(|a| !matches!(a, Action::Crash(_) | Action::Unknown(_)));
                    if actions.is_empty() {
                        return true;
                    }
                    for a in actions {
                        let mut enabled = Vec::new();
                        model.actions(&row, &mut enabled);
                        if enabled.contains(&a)
                            && let Some(next) = model.next_state(&row, a)
                        {
                            row = next;
                        }
                    }
                }
                false
            }),
            Property::sometimes("all change it", |model: &Self, row: &Row| {
                usize::from(row.sector) == model.nodes * usize::from(model.changes)
            }),
        ]
    }
}

/// In steps of time: how long a bid may take, when it is read back, until when it must be used, and for how long a bid must stand
/// still to be a dead node's.
const TAKES: u8 = 1;
const SETTLED: u8 = TAKES + 1;
const LEASE: u8 = 6;
const SILENT: u8 = LEASE + 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Bidder {
    Idle,
    /// Has read, at this time.
    Read(u8),
    /// Its bid is submitted; when it had read.
    Bids(u8),
    /// When it had read, and when the write was seen to have ended.
    Waits(u8, u8),
    /// Has the slot, since it read.
    Won(u8),
    /// Lives there.
    Lives,
    Dead,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Auction {
    now: u8,
    /// Whose bid is there, if it may not be replaced by everybody, and which of its.
    bid: Option<(usize, u8)>,
    /// Since when it has stood there.
    since: u8,
    /// With the bids that they may still make.
    bidders: Vec<(Bidder, u8)>,
    /// By which of its bids each had the slot.
    won: Vec<Option<u8>>,
    /// Bids on their way: they may outlast their bidder's patience.
    under_way: Vec<(usize, u8)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Move {
    Tick,
    Read(usize),
    Submit(usize),
    Arrive(usize),
    /// The bid has arrived, and its bidder sees how long it took.
    Told(usize),
    /// Its outcome is unknown.
    GivesUp(usize),
    ReadsBack(usize),
    /// Changes the slot's block, after its first heartbeat.
    Lives(usize),
    /// Has the slot and gives it up: somebody else has changed its block.
    LetsGo(usize),
    Dies(usize),
    /// The bid is found to be a dead node's.
    Judge,
}

#[derive(Clone, Debug)]
struct Bidding {
    bidders: usize,
    tries: u8,
    until: u8,
    mutant: Option<Mutant>,
}

impl Model for Bidding {
    type State = Auction;
    type Action = Move;

    fn init_states(&self) -> Vec<Auction> {
        let bidders = vec![(Bidder::Idle, self.tries); self.bidders];
        vec![Auction { now: 0, bid: None, since: 0, won: vec![None; self.bidders], bidders, under_way: Vec::new() }]
    }

    fn actions(&self, a: &Auction, moves: &mut Vec<Move>) {
        if a.now < self.until {
            moves.push(Move::Tick);
        }
        let lives = a.bidders.iter().any(|b| b.0 == Bidder::Lives);
        if a.bid.is_some() && !lives && a.now >= a.since + SILENT {
            moves.push(Move::Judge);
        }
        for (i, (b, left)) in a.bidders.iter().enumerate() {
            let on_its_way = a.under_way.contains(&(i, *left));
            let trusts = self.mutant == Some(Mutant::TrustsItsOwn);
            let own = a.bid.is_some_and(|(of, bid)| of == i && (trusts || a.won[i] == Some(bid)));
            match b {
                // Once the slot lives, its block says so.
                Bidder::Idle if *left > 0 && !lives && (a.bid.is_none() || own) => moves.push(Move::Read(i)),
                Bidder::Read(_) => moves.push(Move::Submit(i)),
                Bidder::Bids(_) => moves.push(if on_its_way { Move::GivesUp(i) } else { Move::Told(i) }),
                Bidder::Waits(_, told) if a.now >= told + SETTLED || self.mutant == Some(Mutant::DoesNotWait) => {
                    moves.push(Move::ReadsBack(i));
                }
                Bidder::Won(_) => moves.extend([Move::Lives(i), Move::LetsGo(i)]),
                _ => {}
            }
            if *b != Bidder::Dead && *b != Bidder::Idle && *b != Bidder::Lives {
                moves.push(Move::Dies(i));
            }
            if a.under_way.iter().any(|w| w.0 == i) {
                moves.push(Move::Arrive(i));
            }
        }
    }

    fn next_state(&self, a: &Auction, action: Move) -> Option<Auction> {
        let mut a = a.clone();
        match action {
            Move::Tick => a.now += 1,
            Move::Read(i) => a.bidders[i] = (Bidder::Read(a.now), a.bidders[i].1 - 1),
            Move::Submit(i) => {
                let Bidder::Read(at) = a.bidders[i].0 else { return None };
                let permitted = a.now < at + LEASE;
                a.bidders[i].0 = if permitted { Bidder::Bids(at) } else { Bidder::Idle };
                if permitted {
                    a.under_way.push((i, a.bidders[i].1));
                    a.under_way.sort_unstable();
                }
            }
            Move::Arrive(i) => {
                let first = a.under_way.iter().position(|w| w.0 == i)?;
                (a.bid, a.since) = (Some(a.under_way.remove(first)), a.now);
            }
            Move::Told(i) => {
                let Bidder::Bids(at) = a.bidders[i].0 else { return None };
                let in_time = a.now - at <= TAKES || self.mutant == Some(Mutant::TakesItsTime);
                a.bidders[i].0 = if in_time { Bidder::Waits(at, a.now) } else { Bidder::Idle };
            }
            Move::GivesUp(i) => a.bidders[i].0 = Bidder::Idle,
            Move::ReadsBack(i) => {
                let Bidder::Waits(at, _) = a.bidders[i].0 else { return None };
                let bid = a.bidders[i].1;
                let won = a.bid == Some((i, bid));
                a.won[i] = if won { Some(bid) } else { a.won[i] };
                a.bidders[i].0 = if won { Bidder::Won(at) } else { Bidder::Idle };
            }
            Move::Lives(i) => {
                let Bidder::Won(at) = a.bidders[i].0 else { return None };
                let in_time = a.now < at + LEASE || self.mutant == Some(Mutant::UsesItLate);
                a.bidders[i].0 = if in_time { Bidder::Lives } else { Bidder::Idle };
            }
            Move::LetsGo(i) => a.bidders[i].0 = Bidder::Idle,
            Move::Dies(i) => a.bidders[i].0 = Bidder::Dead,
            Move::Judge => a.bid = None,
        }
        Some(a)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one has the slot", |model: &Self, a: &Auction| {
                let late = model.mutant == Some(Mutant::UsesItLate);
                let has = |b: &Bidder| match b {
                    Bidder::Lives => true,
                    Bidder::Won(at) => late || a.now < at + LEASE,
                    _ => false,
                };
                a.bidders.iter().filter(|b| has(&b.0)).count() <= 1
            }),
            Property::sometimes("one lives there", |_, a: &Auction| a.bidders.iter().any(|b| b.0 == Bidder::Lives)),
            Property::sometimes("an owner's bid is overwritten", |_, a: &Auction| {
                a.bidders.iter().enumerate().any(|(i, b)| b.0 == Bidder::Lives && a.bid.is_some_and(|of| of.0 != i))
            }),
            Property::sometimes("a dead node's bid is replaced", |_, a: &Auction| {
                a.bidders.iter().any(|b| b.0 == Bidder::Lives) && a.bidders.iter().any(|b| b.0 == Bidder::Dead)
            }),
        ]
    }
}

fn check<M>(name: &str, model: M)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + std::hash::Hash + Send + Sync + PartialEq + std::fmt::Debug + 'static,
    M::Action: std::fmt::Debug + Clone + PartialEq,
{
    let checker = model.checker().threads(2).spawn_bfs().join();
    println!("{name}: {} states, depth {}", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
}

fn breaks<M>(model: M, property: &'static str)
where
    M: Model + std::fmt::Debug + Send + Sync + 'static,
    M::State: Clone + std::hash::Hash + Send + Sync + PartialEq + std::fmt::Debug + 'static,
    M::Action: std::fmt::Debug + Clone + PartialEq,
{
    let checker = model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let states = checker.unique_state_count();
    assert!(checker.discovery(property).is_some(), "{:?}: not noticed, {states} states", checker.model());
}

#[test]
fn one_node_at_a_time_changes_a_sector() {
    let base = Exclusion { nodes: 2, changes: 2, crashes: 1, unknowns: 1, mutant: None };
    check("plain, two nodes, a crash", base.clone());
    let (changes, crashes, unknowns) = if super::full() { (1, 1, 1) } else { (1, 0, 0) };
    check("plain, three nodes", Exclusion { nodes: 3, changes, crashes, unknowns, ..base.clone() });
    let lost = "I9: a change replaces what it was compared with";
    for mutant in [Mutant::JudgesEarly, Mutant::UnknownIsDone] {
        breaks(Exclusion { mutant: Some(mutant), ..base.clone() }, lost);
    }
    let first = Exclusion { crashes: 0, unknowns: 0, mutant: Some(Mutant::LooksFirst), ..base };
    breaks(first, "I4: one changes the sector");
}

#[test]
fn one_node_gets_a_slot() {
    let base = Bidding { bidders: 2, tries: 2, until: 10, mutant: None };
    check("bids of two", Bidding { tries: if super::full() { 2 } else { 1 }, ..base.clone() });
    if super::full() {
        check("bids of three", Bidding { bidders: 3, tries: 1, ..base.clone() });
    }
    use Mutant::{DoesNotWait, TakesItsTime, TrustsItsOwn, UsesItLate};
    for mutant in [TakesItsTime, DoesNotWait, TrustsItsOwn, UsesItLate] {
        breaks(Bidding { mutant: Some(mutant), ..base.clone() }, "one has the slot");
    }
}

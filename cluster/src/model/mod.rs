//! Model check of the protocol of slots, incarnations, lock blocks, takeover and handover (`docs/MODEL.md`).
//!
//! [stateright] explores every order of events within the bounds of a [`Config`], with the transition functions that the
//! nodes run. Each [`Mutant`] breaks one rule; the check must notice.

mod device;
mod normal;
mod plain;
mod properties;
mod world;

use stateright::{Checker, HasDiscoveries, Model, Property};

use world::{Action, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    /// Takes over although writes of the victim are on their way and not refused.
    TakeoverUnfenced,
    /// Takes over while the victim's lease lasts.
    LeaseIgnored,
    /// Ends an incarnation without replaying its journal.
    EndsUnreplayed,
    /// A free slot's next life has the number of its last.
    IncarnationReused,
    /// Lets go in memory only when the release is on disk.
    MemoryAfterDisk,
    /// Takes a compare-and-write of unknown outcome for done.
    UnknownIsDone,
    /// Never gives back what it was granted after it had stopped waiting.
    NeverSettles,
    /// Does not note which incarnation a dead adopter took.
    AdopterForgotten,
    /// Drops the entries of incarnations that have not ended.
    PurgesTheLiving,
}

/// A property that is broken by a step rather than by a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Broken {
    EndedWrite,
    Backwards,
    IncarnationReused,
    OldRecordReplayed,
    RecordNotReplayed,
}

#[derive(Clone, Debug)]
struct Config {
    name: &'static str,
    hosts: usize,
    /// So many have joined at the start.
    live: usize,
    slots: u16,
    locks: u32,
    /// Acquires of each host for each lock.
    asks: u8,
    shared: bool,
    joins: u8,
    leaves: u8,
    /// Slots that each host may claim to have the volume to itself.
    repairs: u8,
    crashes: u8,
    unknowns: u8,
    abandons: u8,
    /// The device has reservations; otherwise a takeover waits out what the victim submitted.
    fencing: bool,
    /// Only the order of sequence numbers counts, see [`normal`].
    close_up: bool,
    mutant: Option<Mutant>,
}

const BASE: Config = Config {
    name: "base",
    hosts: 3,
    live: 3,
    slots: 3,
    locks: 1,
    asks: 1,
    shared: true,
    joins: 1,
    leaves: 0,
    repairs: 0,
    crashes: 0,
    unknowns: 0,
    abandons: 0,
    fencing: true,
    close_up: false,
    mutant: None,
};

impl Model for Config {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![normal::normal(World::new(self), self.close_up)]
    }

    fn actions(&self, state: &World, actions: &mut Vec<Action>) {
        // What follows a broken invariant says nothing.
        if state.ghost.broken.is_none() {
            state.actions(self, actions);
        }
    }

    fn next_state(&self, state: &World, action: Action) -> Option<World> {
        state.next(self, &action).map(|w| normal::normal(w, self.close_up))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}

/// Explores all of it; every invariant must hold.
fn check(cfg: Config) {
    let name = cfg.name;
    let checker = cfg.checker().threads(2).spawn_bfs().join();
    println!("{name}: {} states, depth {}", checker.unique_state_count(), checker.max_depth());
    for (property, path) in checker.discoveries() {
        let holds = checker
            .model()
            .properties()
            .iter()
            .any(|p| p.name == property && p.expectation == stateright::Expectation::Sometimes);
        assert!(holds, "{name}: {property} does not hold after {:#?}", path.into_actions());
    }
}

/// The mutant must break one of these.
fn breaks(cfg: Config, one_of: &[&str]) {
    let checker = cfg.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    println!("{:?}: {} states, depth {}", checker.model().mutant, checker.unique_state_count(), checker.max_depth());
    let found: Vec<_> = checker.discoveries().into_keys().filter(|p| one_of.contains(p)).collect();
    assert!(!found.is_empty(), "{:?} was not noticed", checker.model().mutant);
}

fn full() -> bool {
    std::env::var("CLUSTERFS_SCALE").is_ok_and(|s| s == "full")
}

/// `more` where there is time, else `few`.
fn bound(few: u8, more: u8) -> u8 {
    if full() { more } else { few }
}

#[test]
fn three_contend_for_a_lock() {
    check(Config { name: "contention", asks: bound(1, 2), ..BASE });
}

#[test]
fn two_contend_again_and_stop_waiting_and_know_no_outcome() {
    let two = Config { hosts: 2, live: 2, slots: 2, ..BASE };
    check(Config { name: "unknown outcomes", asks: bound(1, 2), unknowns: 1, abandons: 1, ..two.clone() });
    check(Config { name: "abandoned waits", shared: full(), asks: 2, abandons: 1, ..two });
}

#[test]
fn a_holder_dies() {
    for (name, fencing) in [("takeover, fenced", true), ("takeover, waited out", false)] {
        let nodes = usize::from(bound(2, 3));
        let slots = u16::from(bound(2, 3));
        check(Config { name, hosts: nodes, live: nodes, slots, crashes: 1, unknowns: bound(1, 0), fencing, ..BASE });
    }
}

/// Three hosts, one of which dies while it holds the lock or waits for it.
#[test]
fn one_of_three_dies() {
    let dies = Config { shared: full(), crashes: 1, joins: 1, close_up: true, ..BASE };
    for (name, fencing) in [("three and a death, fenced", true), ("three and a death, waited out", false)] {
        check(Config { name, fencing, ..dies.clone() });
    }
}

/// Three hosts, one of which does not know what became of a compare-and-write; at full scale one dies, too.
#[test]
fn one_of_three_knows_no_outcome() {
    let unknown = Config { unknowns: 1, close_up: true, ..BASE };
    check(Config { name: "three and an unknown outcome", ..unknown.clone() });
    if full() {
        check(Config { name: "three, a death and an unknown outcome", shared: false, crashes: 1, ..unknown });
    }
}

/// An adopter dies, then its recoverer.
const DEATHS: Config =
    Config { name: "deaths", hosts: 2, live: 2, slots: 2, locks: 0, asks: 0, joins: 3, crashes: 3, ..BASE };

#[test]
fn slots_are_adopted_and_recovered() {
    check(Config { crashes: bound(2, 3), joins: bound(2, 3), unknowns: bound(1, 0), ..DEATHS });
}

#[test]
fn slots_are_left_and_claimed() {
    for fencing in [true, false] {
        check(Config { name: "leaving", joins: 2, leaves: 1, crashes: bound(1, 2), unknowns: 1, fencing, ..DEATHS });
    }
}

/// Two hosts that each want the volume for themselves, and a third that joins; a claimer may die.
#[test]
fn a_volume_is_claimed_for_repair() {
    let claims = Config { hosts: 3, live: 2, slots: 3, locks: 0, asks: 0, repairs: 2, close_up: true, ..BASE };
    check(Config { name: "claims", joins: 1, leaves: bound(0, 1), ..claims.clone() });
    check(Config {
        name: "a claimer dies",
        live: usize::from(bound(1, 2)),
        hosts: usize::from(bound(2, 3)),
        crashes: 1,
        ..claims
    });
}

#[test]
fn a_dead_holders_slot_is_adopted() {
    let few = Config { name: "adoption", hosts: 2, live: 2, slots: 2, joins: 2, ..BASE };
    check(Config { shared: full(), asks: bound(1, 2), crashes: bound(1, 2), ..few });
}

#[test]
fn the_check_notices_what_is_broken() {
    use Mutant::*;
    let two = Config { hosts: 2, live: 2, slots: 2, shared: false, ..BASE };
    let dies = Config { crashes: 1, joins: 2, ..two.clone() };
    let leaves = Config { leaves: 1, joins: 2, ..two.clone() };
    let unknown = Config { unknowns: 1, ..two.clone() };
    let abandons = Config { abandons: 1, ..two.clone() };
    let said = ["I4: one writer", "memory never says more than the disk"];
    for (cfg, mutant, one_of) in [
        (&dies, TakeoverUnfenced, &["I12: no write of an ended incarnation takes effect"][..]),
        (&two, LeaseIgnored, &["I4: one writer", "a lock is held by the living only"]),
        (&dies, EndsUnreplayed, &["nothing is used before it was replayed"]),
        (&leaves, IncarnationReused, &["I8: no incarnation comes back", "I8: nothing goes backwards"]),
        (&unknown, MemoryAfterDisk, &said),
        (&unknown, UnknownIsDone, &said),
        (&abandons, NeverSettles, &["no wake-up is lost"]),
        (&two, PurgesTheLiving, &said),
        (&DEATHS, AdopterForgotten, &["I8: no incarnation comes back", "I9: what is over has no effect any more"]),
    ] {
        breaks(Config { mutant: Some(mutant), ..cfg.clone() }, one_of);
    }
}

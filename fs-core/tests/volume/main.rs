//! Volumes on the simulated device, by what `fs_core` offers to others. One program: each would compile all of it anew.

mod budgets;
mod common;
mod deferred;
mod discard;
mod grow;
mod limits;
mod locks;
mod misdirected;
mod nodes;
mod orphans;
mod random;
mod repair;
mod reused_domains;
mod scale;
mod stale;
mod times;

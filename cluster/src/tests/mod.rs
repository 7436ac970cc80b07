//! Scenarios with several nodes on a simulated device and a paused clock.

mod contention;
mod harness;
mod locking;
mod membership;
mod one_host;
mod plain;
mod takeover;
mod transitions;

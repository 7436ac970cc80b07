//! Scenarios with several nodes on a simulated device and a paused clock.

mod harness;
mod locking;

//! Appending to one mbox under a dot lock, as a delivery agent does it.

use super::super::{Scenario, repeat};
use crate::mail::{Mailer, MboxLock, append_mbox};

pub const ALL: &[Scenario] = &[Scenario {
    name: "mbox-append",
    about: "2 processes per node append to one mbox under a dot lock, with fsync",
    limits: "the device's flush and, between nodes, handovers of the directory",
    unit: "messages",
    nodes: &[1, 2, 4],
    prepare: |_| Ok(()),
    run: |w| {
        let (count, message) = (w.scale.of(1000), Mailer::new(1).largest(8 << 10).message());
        w.on_all(2, |_, dir| repeat(count, |_| append_mbox(&dir.join("mbox"), &message, MboxLock::Dotlock)))
    },
}];

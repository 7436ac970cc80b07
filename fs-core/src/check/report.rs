//! What a check found.

use std::collections::BTreeSet;
use std::fmt;

use cluster::NodeId;

/// Violations kept with their text; the rest is counted.
pub const MAX_VIOLATIONS: usize = 1000;
const MAX_NOTES: usize = 100;
pub(crate) const ADVICE: &str = ": run fsck.clusterfs";

/// Something on the volume that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Block, domain, inode or name.
    pub place: String,
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

/// The outcome of a check that could be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The first [`MAX_VIOLATIONS`].
    pub violations: Vec<Violation>,
    /// All of them.
    pub violation_count: u64,
    /// What is worth knowing and no violation.
    pub notes: Vec<String>,
    /// Nodes that ended without unmounting and were not recovered.
    pub dead: Vec<NodeId>,
    /// Whether each of their journals can be replayed.
    pub replayable: bool,
    /// Slots whose blocks are damaged, with the last incarnation that left a trace (0: none).
    pub lost_slots: Vec<NodeId>,
    /// Domains in which something has to be corrected, or of which something is missing.
    pub damaged: BTreeSet<u32>,
    /// Slots whose journals cannot be used.
    pub bad_journals: Vec<cluster::Slot>,
    /// The device is smaller than the volume: nothing but superblocks was looked at.
    pub truncated: bool,
    /// Features that an older program, as this is one, may only read.
    pub read_only_features: u64,
    pub label: String,
    pub files: u64,
    pub dirs: u64,
    pub symlinks: u64,
    /// Device nodes, sockets, fifos.
    pub specials: u64,
    /// Unlinked files and directories that wait to be freed.
    pub orphans: u64,
    /// Sum of the sizes of regular files.
    pub bytes: u64,
    pub domains: u64,
    pub tree_nodes: u64,
    /// Blocks in the allocation groups, as their bitmaps say.
    pub blocks_used: u64,
    pub blocks_free: u64,
}

impl Report {
    pub fn is_clean(&self) -> bool {
        self.violation_count == 0
    }

    pub(super) fn violation(&mut self, place: impl fmt::Display, text: impl fmt::Display) {
        self.violation_count += 1;
        if self.violations.len() < MAX_VIOLATIONS {
            let text = text.to_string();
            // Said by what finds the damage; here it would be advice to do what is being done.
            let text = text.trim_end_matches(ADVICE).to_string();
            self.violations.push(Violation { place: place.to_string(), text });
        }
    }

    pub(super) fn note(&mut self, text: impl fmt::Display) {
        if self.notes.len() < MAX_NOTES {
            self.notes.push(text.to_string());
        }
    }

    /// Whether one more violation would still be kept with its text: saves look-ups that only serve the text.
    pub(super) fn has_room(&self) -> bool {
        self.violations.len() < MAX_VIOLATIONS
    }
}

/// What the check is doing, for a progress line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub phase: &'static str,
    pub done: u64,
    pub total: u64,
}

/// A name as text, whatever bytes it has.
pub(crate) fn name_text(name: &[u8]) -> String {
    format!("\"{}\"", String::from_utf8_lossy(name).escape_debug())
}

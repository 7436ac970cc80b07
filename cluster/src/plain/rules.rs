//! The rules of the exclusion, as pure functions: the device and the model check run the same.

use crate::Slot;

/// What a node whose cell is raised does next, by a reading of the row that began after the cell was raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Next {
    /// Nobody else is in: the sector may be changed.
    Enter,
    /// Someone in a higher slot is in or will step back: read again, staying raised.
    Wait,
    /// Someone in a lower slot goes first: lower, and begin again when no lower slot is raised.
    StepBack,
}

/// `others`: the slots of other nodes that are raised and count.
pub(crate) fn next(me: Slot, others: impl IntoIterator<Item = Slot>) -> Next {
    let mut next = Next::Enter;
    for other in others {
        if other < me {
            return Next::StepBack;
        }
        next = Next::Wait;
    }
    next
}

/// Whether who stepped back may raise its cell again.
pub(crate) fn may_raise(me: Slot, others: impl IntoIterator<Item = Slot>) -> bool {
    next(me, others) != Next::StepBack
}

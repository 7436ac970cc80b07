//! A witness of everything that changes the simulated device: rules that hold between nodes can only be checked where all of
//! them meet.

use tokio::time::Instant;

/// A change of the contents, or the request for one.
pub struct Change<'a> {
    /// Who asked for it, as named when it was opened.
    pub node: &'a str,
    /// When it was called for, which may be long before it is submitted: a node may hang in between.
    pub issued: Instant,
    pub offset: u64,
    /// By compare-and-write.
    pub compared: bool,
    /// Empty for a discard.
    pub new: &'a [u8],
}

/// Told of changes; `Err` says which rule was broken. It must not call the device.
pub trait Audit: Send + Sync {
    /// About to be sent to the device.
    fn submitted(&self, change: &Change<'_>) -> Result<(), String>;
    /// It takes effect; `old` is what it replaces. Of a torn write only parts arrive, which is not told.
    fn arrives(&self, change: &Change<'_>, old: &[u8]) -> Result<(), String>;
}

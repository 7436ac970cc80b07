//! The operations of a volume, one file per kind: names, attributes, contents, extended attributes.

mod attr;
mod create;
mod dir;
mod entry;
mod remove;
mod rename;
mod xattr;

pub use entry::later;

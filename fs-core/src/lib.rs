//! the volume

//! fsck.clusterfs as a library.

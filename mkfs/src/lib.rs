//! mkfs.clusterfs as a library.

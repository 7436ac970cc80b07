//! clusterfs on FUSE: see main.rs.

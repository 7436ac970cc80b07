//! Real mail servers on the nodes of a test cluster: each node has a Dovecot and a Postfix of its own, on an address of its own, with
//! its own configuration, sockets and logs; what they share is the volume.
//!
//! Debian's packages are used (`cargo xtask setup` installs them). Servers run in the foreground, in a process group of their own,
//! and are ended by its id, also when a test fails; the services of the host are not touched.

pub mod accounts;
pub mod agents;
pub mod dovecot;
pub mod imap;
pub mod line;
pub mod pop3;
pub mod postfix;
pub mod process;
pub mod site;
pub mod smtp;
pub mod traffic;

//! The FUSE session layer: kernel ABI, mount, requests, replies and notifications.

//! Whole-system tests: what they share.

pub mod bench;
pub mod cluster;
pub mod exercise;
pub mod faulty;
pub mod fuzz;
pub mod golden;
pub mod inotify;
pub mod iscsi_target;
pub mod load;
pub mod loop_device;
pub mod mail;
pub mod netns;
pub mod servers;
pub mod sim;
pub mod sys;
pub mod uml;

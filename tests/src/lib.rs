//! Whole-system tests: what they share.

pub mod cluster;
pub mod golden;
pub mod mail;
pub mod sim;
pub mod sys;

//! Whole-system tests.

pub mod mail;
pub mod sim;

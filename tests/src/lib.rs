//! Whole-system tests.

pub mod mail;

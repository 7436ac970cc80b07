//! The simulated shared device of the tests.

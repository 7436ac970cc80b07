//! An image file as the shared device.

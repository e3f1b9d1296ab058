//! Restores.

mod options;

pub use options::RestoreOptions;

//! What several tests of this folder need.

pub(super) mod write_recorder;

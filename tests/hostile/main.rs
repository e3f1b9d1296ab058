//! Frontends that break the rules.

mod armed;
mod bad_input;
mod frontend;
mod logs;
mod memory_files;
mod memory_traps;
mod messages;
mod namespaces;
mod paths;
mod peer_descriptors;
mod printing;
mod resources;
mod ring_bounds;
mod signals;
mod state_files;

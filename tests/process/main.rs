//! The process and the library together: launching, capabilities, spawning, the gate, restores, the
//! examples, the time page.

mod access;
mod armed_log;
mod capabilities;
mod examples;
mod gate;
mod last_metre;
mod launch;
mod life;
mod log_levels;
mod log_lines;
mod polling;
mod restore_object;
mod spawned;
mod stragglers;
mod supervised;
mod time_page_library;
mod wrong_starts;

//! The process and the library together: launching, the gate, restores, the examples, the time
//! page.

mod examples;
mod gate;
mod launch;
mod polling;
mod restore_object;
mod stragglers;
mod time_page_library;

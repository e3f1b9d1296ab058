//! The process and the library together: launching, the gate, stragglers, the time page.

mod gate;
mod launch;
mod polling;
mod restore_object;
mod stragglers;
mod time_page_library;

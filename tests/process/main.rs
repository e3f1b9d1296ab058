//! The process and the library together: launching, the gate, stragglers, the time page.

mod gate;
mod launch;
mod polling;
mod stragglers;
mod time_page_library;

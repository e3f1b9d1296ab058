//! A real Linux guest moves between two QEMUs, and programs in it watch its time.

mod judge;
mod refusals;
mod stock;

//! A real Linux guest moves between two QEMUs, and programs in it watch its time.

mod clock;
mod judge;
mod life;
mod links;
mod moves;
mod refusals;
mod stock;

//! A real Linux guest moves between two QEMUs, and programs in it watch its time.

mod clock;
mod faults;
mod judge;
mod life;
mod links;
mod missing;
mod moves;
mod oracle;
mod refusals;
mod stock;

//! A real guest under a stock QEMU.

mod clock;
mod clock_life;
mod environment;
mod gate;

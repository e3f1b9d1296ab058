//! The backend is killed and started again.

mod crash_safety;
mod restart;

//! The judge: the VMM of contrib/vmm and the backend on a real KVM/arm64.

mod kernels;
mod library;
mod lifecycle;
mod machine;
mod registers;
mod restores;

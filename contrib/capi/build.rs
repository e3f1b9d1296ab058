//! Names the shared library: a program that is linked with `libvhost_user_timer.so` looks for
//! `libvhost_user_timer.so.0` when it starts.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libvhost_user_timer.so.0");
}

//! The committed header is what cbindgen makes of the crate.

use std::fs;
use std::path::Path;

const HEADER: &str = "include/vhost_user_timer.h";

fn made() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let bindings = cbindgen::Builder::new()
        .with_crate(root)
        .with_config(config)
        .generate()
        .expect("cbindgen");
    let mut header = Vec::new();
    bindings.write(&mut header);
    String::from_utf8(header).expect("UTF-8")
}

#[test]
fn the_committed_header_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(HEADER);
    let made = made();
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, &made).expect(HEADER);
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == made,
        "{HEADER} is not what the crate says: \
         UPDATE=1 cargo test -p vhost-user-timer-capi --test header"
    );
}

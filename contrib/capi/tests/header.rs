//! The committed header is what cbindgen makes of the crate, and complete.

use std::collections::HashSet;
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

/// The words of a text that begin with this.
fn words<'a>(text: &'a str, start: &'a str) -> impl Iterator<Item = &'a str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && !"_:-".contains(c));
    words.filter_map(move |word| word.strip_prefix(start))
}

#[test]
fn the_header_names_every_error_that_the_library_makes() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let header = made();
    let named: HashSet<_> = words(&header, "-").collect();
    let mut made = 0;
    for source in fs::read_dir(sources).expect("src") {
        let text = fs::read_to_string(source.expect("a file").path()).expect("UTF-8");
        for errno in words(&text, "libc::").filter(|name| name.starts_with('E')) {
            assert!(named.contains(errno), "{errno}");
            made += 1;
        }
    }
    assert!(made > 20, "{made}");
}

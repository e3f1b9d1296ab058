//! Writes the manual pages and the shells' completions into `contrib`: `make manual`.

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use vhost_user_timer_manual::{files, root};

fn main() -> ExitCode {
    for (path, content) in files() {
        let path = root().join(path);
        if let Err(error) = write(&path, &content) {
            eprintln!("manual: writing {} failed: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn write(path: &Path, content: &str) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, content)
}

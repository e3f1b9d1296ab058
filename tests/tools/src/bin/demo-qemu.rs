//! Boots a Linux guest under a stock QEMU, with the backend as its clock, and shows the clock.

use std::process::ExitCode;

use vhost_user_timer_kit::qemu::Environment;
use vhost_user_timer_tools::qemu_demo as demo;

fn main() -> ExitCode {
    let shown = Environment::find()
        .map_err(|error| error.to_string())
        .and_then(|environment| demo::show(&environment));
    match shown {
        Ok(()) => {
            println!("demo-qemu: OK");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("demo-qemu: FAILED {error}");
            ExitCode::FAILURE
        }
    }
}

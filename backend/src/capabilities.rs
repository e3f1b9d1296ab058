//! What `--print-capabilities` prints (QEMU, docs/interop/vhost-user.rst, "Backend program
//! conventions").

use clap::CommandFactory;

use crate::args::Args;

/// What the program is. QEMU's schema has no type for a timer, and none for a virtio-rtc device.
const TYPE: &str = "timer";

/// Features that no option is named for: parts of the protocol, and what an option's value or the
/// launcher's environment can ask for. `contrib/qemu/DISCOVERY.md` describes each.
const PARTS: [&str; 9] = [
    "confirm",
    "counter-source-auto",
    "device-state",
    "done",
    "notify",
    "one-offset",
    "rtc",
    "socket-activation",
    "time-page",
];

/// Options that every backend has by QEMU's conventions, and those that every program has.
const CONVENTIONAL: [&str; 5] = ["fd", "help", "print-capabilities", "socket-path", "version"];

/// The program's type and features as JSON. Each option beyond QEMU's conventions is a feature, so
/// that a launcher can ask for one that an earlier version lacks.
pub fn capabilities() -> String {
    let command = Args::command();
    let options = command.get_arguments().filter_map(|arg| arg.get_long());
    let options = options.filter(|option| !CONVENTIONAL.contains(option));
    let mut features: Vec<_> = options.chain(PARTS).collect();
    features.sort_unstable();
    let features: Vec<_> = features
        .iter()
        .map(|name| format!("    \"{name}\""))
        .collect();
    format!(
        "{{\n  \"type\": \"{TYPE}\",\n  \"features\": [\n{}\n  ]\n}}",
        features.join(",\n")
    )
}

//! Copies of the environment's Debian roots, and the package in them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use vhost_user_timer_kit::qemu::{Environment, environment, timer_library};

/// The exit status of a script that cannot do its work on this machine.
const SKIPPED: i32 = 77;

/// A Debian root of which each command has a copy of its own, without a network.
pub(crate) struct Root {
    name: &'static str,
    pub(crate) environment: Environment,
    mounts: Vec<String>,
}

/// This crate's folder.
pub(crate) fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The package of the programs that are built, or `None` where it cannot be made; that has been
/// said.
fn package() -> Option<&'static Path> {
    static PACKAGE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let package = PACKAGE.get_or_init(|| {
        let output = Command::new(folder().join("../.ci/deb"))
            .stderr(Stdio::inherit())
            .output()
            .expect(".ci/deb");
        if output.status.code() == Some(SKIPPED) {
            let is_ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty());
            assert!(!is_ci, "no package; with CI set, that is a failure");
            eprintln!("skipped: the package cannot be made here");
            return None;
        }
        assert!(output.status.success(), ".ci/deb: {}", output.status);
        let paths = String::from_utf8(output.stdout).expect("UTF-8");
        Some(PathBuf::from(paths.lines().last().expect("a path")))
    });
    package.as_deref()
}

impl Root {
    /// The root of this name and the package, or `None` where the test is to return: this machine
    /// cannot have one, and that has been said.
    pub(crate) fn find(name: &'static str) -> Option<Self> {
        let environment = environment()?;
        let package = package()?;
        let root = Root {
            name,
            environment,
            mounts: Vec::new(),
        };
        Some(root.mount(package, "/package.deb"))
    }

    /// With a file or folder of this machine at a path.
    pub(crate) fn mount(mut self, from: &Path, to: &str) -> Self {
        self.mounts.push(format!("{}:{to}", from.display()));
        self
    }

    /// With the environment's stock QEMU as the root's own.
    pub(crate) fn with_qemu(self) -> Self {
        let tools = self.environment.directory().with_file_name("tools");
        let wrapper = folder().join("package/qemu");
        self.mount(&tools, "/tools")
            .mount(&wrapper, "/usr/bin/qemu-system-aarch64")
    }

    /// With the environment's QEMU that has the device vhost-user-timer, where an administrator
    /// would install it.
    pub(crate) fn with_patched_qemu(self) -> Self {
        let library = timer_library().expect("the library for C");
        let patched = self.environment.directory().with_file_name("patched");
        let builder = self.environment.directory().with_file_name("builder");
        let wrapper = folder().join("package/patched-qemu");
        self.mount(&library, "/library")
            .mount(&patched, "/patched")
            .mount(&builder.join("tools"), "/builder")
            .mount(&wrapper, "/usr/local/bin/qemu-system-aarch64")
    }

    /// Runs a script of bash in a copy of the root. Returns what it prints; fails if it does.
    #[track_caller]
    pub(crate) fn run(&self, script: &str) -> String {
        let output = Command::new(folder().join("package/in_root"))
            .arg(self.name)
            .args(&self.mounts)
            .args(["--", "bash", "-euo", "pipefail", "-c", script])
            .stdin(Stdio::null())
            .output()
            .expect("in_root");
        let printed = String::from_utf8(output.stdout).expect("UTF-8");
        assert!(
            output.status.success(),
            "{}: {}\n{printed}{}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        printed
    }

    /// The same, once the package is installed.
    #[track_caller]
    pub(crate) fn run_installed(&self, script: &str) -> String {
        self.run(&format!("{INSTALL}\n{script}"))
    }
}

/// Functions for scripts: `serve OPTION…` starts the installed backend and waits until it serves
/// both devices at $timer and $clock; `end` ends it, and prints its log.
pub(crate) const BACKEND: &str = r#"
timer=/run/vhost-user-timer/vm1/timer.sock
clock=/run/vhost-user-timer/vm1/clock.sock
serve() {
    mkdir -p /run/vhost-user-timer/vm1
    coproc backend { exec vhost-user-timer --socket-path $timer --rtc-socket-path $clock $* 2>&1; }
    pid=$backend_PID
    # A descriptor that is there when the backend has ended.
    exec {log}<&${backend[0]}
    local device line= said=
    for device in $timer $clock; do
        until [[ $line == *Ready*$device* ]]; do
            read -r -u $log line || { echo "ended before it served $device: $said" >&2; exit 1; }
            said+=$line$'\n'
        done
    done
}
end() {
    kill $pid
    wait $pid
    cat <&$log
}
"#;

/// Installs the package as a user does, with apt.
pub(crate) const INSTALL: &str = "apt-get -qq install -y /package.deb >/dev/null";

//! A guest that moves from one QEMU to another, over a socket or by way of a file.

use std::mem;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Error, Guest, Qmp};

/// A migration that reports nothing for so long may have its guest stand still for longer.
const STEP: Duration = Duration::from_secs(10);

/// How long a guest may stand still at the end of its migration, ms: QEMU's default, and at most.
const STANDSTILL: [u64; 2] = [300, 300_000];

/// Bytes a second. QEMU's default is made for a network.
const BANDWIDTH: u64 = 4 << 30;

impl Qmp {
    /// Has migrations reported as events. With `answers` the source waits until the destination
    /// has loaded everything, and its guest continues there if the destination has not; a
    /// file cannot answer.
    ///
    /// # Errors
    ///
    /// Those of [`command`](Self::command).
    pub fn prepare_migration(&mut self, answers: bool) -> Result<(), Error> {
        let capability = |name, state| json!({ "capability": name, "state": state });
        let capabilities = [
            capability("events", true),
            capability("return-path", answers),
        ];
        self.command_with(
            "migrate-set-capabilities",
            json!({ "capabilities": capabilities }),
        )?;
        self.command_with(
            "migrate-set-parameters",
            json!({ "max-bandwidth": BANDWIDTH }),
        )?;
        Ok(())
    }

    /// Waits until the migration under way has ended, on either side.
    ///
    /// # Errors
    ///
    /// If it fails, with QEMU's reason, or no news of it comes.
    pub fn await_migration(&mut self) -> Result<(), Error> {
        let [mut standstill, most] = STANDSTILL;
        loop {
            let event = match self.event_within("MIGRATION", STEP) {
                // A guest that writes to its memory faster than a busy host sends it would never
                // leave.
                Err(Error::Late { .. }) if standstill < most => {
                    standstill *= 2;
                    let parameters = json!({ "downtime-limit": standstill });
                    self.command_with("migrate-set-parameters", parameters)?;
                    continue;
                }
                event => event?,
            };
            match event.data["status"].as_str().unwrap_or_default() {
                "completed" => return Ok(()),
                "failed" | "cancelled" => {
                    let state = self.command("query-migrate")?;
                    return Err(Error::Refused {
                        command: "migrate".to_owned(),
                        class: text(&state["status"]),
                        description: text(&state["error-desc"]),
                    });
                }
                _ => {}
            }
        }
    }

    /// Sends the guest there, and waits until it has left. Its vCPUs are stopped afterwards.
    ///
    /// # Errors
    ///
    /// Those of [`await_migration`](Self::await_migration).
    pub fn migrate(&mut self, uri: &str) -> Result<(), Error> {
        self.command_with("migrate", json!({ "uri": uri }))?;
        self.await_migration()
    }

    /// How long the guest stood still at the end of its migration from here, as QEMU measured it.
    ///
    /// # Errors
    ///
    /// Those of [`command`](Self::command).
    pub fn downtime(&mut self) -> Result<Duration, Error> {
        let state = self.command("query-migrate")?;
        let milliseconds = state["downtime"].as_u64();
        let milliseconds = milliseconds.ok_or_else(|| Error::Malformed {
            what: "a migration with a downtime",
            text: state.to_string(),
        })?;
        Ok(Duration::from_millis(milliseconds))
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("none given").to_owned()
}

impl Guest {
    /// Moves the guest to another QEMU, which was started for that
    /// ([`Options::incoming`](super::Options::incoming)) and is what this value holds afterwards.
    /// Returns the previous QEMU, in which the guest does not run any more.
    ///
    /// # Errors
    ///
    /// Those of [`send_to`](Self::send_to): this value is the same as before.
    pub fn migrate_to(&mut self, mut destination: Guest) -> Result<Guest, Error> {
        self.send_to(&mut destination)?;
        Ok(mem::replace(self, destination))
    }

    /// Moves the guest from this QEMU to another, and keeps both.
    ///
    /// Nothing may be printed by the guest during that time.
    ///
    /// # Errors
    ///
    /// [`Error::Migration`] where it does not succeed: the guest is still here.
    pub fn send_to(&mut self, destination: &mut Guest) -> Result<(), Error> {
        let uri = format!(
            "unix:{}",
            destination.directory().join("migration").display()
        );
        self.qmp().prepare_migration(true)?;
        destination.qmp().prepare_migration(true)?;
        destination.listen(&uri)?;
        let sent = self.qmp().migrate(&uri);
        match (sent, destination.qmp().await_migration()) {
            (Ok(()), Ok(())) => Ok(()),
            (sent, arrived) => Err(failure(sent, arrived, destination)),
        }
    }

    /// Writes the guest to a file. Its vCPUs are stopped afterwards.
    ///
    /// # Errors
    ///
    /// Those of [`Qmp::migrate`].
    pub fn save(&mut self, file: &Path) -> Result<(), Error> {
        self.qmp().prepare_migration(false)?;
        self.qmp().migrate(&format!("file:{}", file.display()))
    }

    /// Loads a guest that was saved into this QEMU, which was started for that
    /// ([`Options::incoming`](super::Options::incoming)).
    ///
    /// # Errors
    ///
    /// [`Error::Migration`] where it does not succeed.
    pub fn load(&mut self, file: &Path) -> Result<(), Error> {
        self.qmp().prepare_migration(false)?;
        self.listen(&format!("file:{}", file.display()))?;
        let arrived = self.qmp().await_migration();
        arrived.map_err(|error| failure(Ok(()), Err(error), self))
    }

    /// Opens this QEMU's end of a migration.
    fn listen(&mut self, uri: &str) -> Result<(), Error> {
        self.qmp()
            .command_with("migrate-incoming", json!({ "uri": uri }))?;
        Ok(())
    }
}

fn failure(sent: Result<(), Error>, arrived: Result<(), Error>, destination: &Guest) -> Error {
    let reason = |side, result: Result<(), Error>| Some(format!("{side}: {}", result.err()?));
    let reasons = [
        reason("the source", sent),
        reason("the destination", arrived),
    ];
    let reasons: Vec<_> = reasons.into_iter().flatten().collect();
    Error::Migration {
        reason: reasons.join("; "),
        log: destination.qemu_log(),
    }
}

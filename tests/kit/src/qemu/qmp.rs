//! QEMU's control channel, QMP.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::channel::{Channel, Deadline};
use super::{Error, PATIENCE};

/// An event.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Event {
    /// `STOP`, `RESUME`, `RESET`, `SHUTDOWN` and so on.
    #[serde(rename = "event")]
    pub name: String,
    /// The event's data.
    #[serde(default)]
    pub data: Value,
}

/// The answer to `query-status`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// Whether the vCPUs run.
    pub running: bool,
    /// `running`, `paused`, `inmigrate` and so on.
    pub status: String,
}

/// A message from QEMU.
#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Greeting {
        #[serde(rename = "QMP")]
        _qmp: Value,
    },
    Return {
        #[serde(rename = "return")]
        value: Value,
    },
    Error {
        error: Refusal,
    },
    Event(Event),
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

/// The control channel of a running QEMU.
#[derive(Debug)]
pub struct Qmp {
    channel: Channel,
    /// Events that have arrived and were not taken yet.
    events: VecDeque<Event>,
}

impl Qmp {
    /// Takes the greeting, and enters command mode.
    pub(super) fn new(mut channel: Channel) -> Result<Self, Error> {
        let line = channel.line(&Deadline::after(PATIENCE), "greeting")?;
        let Message::Greeting { .. } = parse(&line)? else {
            let what = "a greeting of QMP";
            return Err(Error::Malformed { what, text: line });
        };
        let mut qmp = Qmp {
            channel,
            events: VecDeque::new(),
        };
        qmp.command("qmp_capabilities")?;
        Ok(qmp)
    }

    /// Runs a command without arguments. Returns its result.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if QEMU refuses it; another error if no answer comes.
    pub fn command(&mut self, name: &str) -> Result<Value, Error> {
        self.command_with(name, json!({}))
    }

    /// Runs a command with these arguments. Returns its result.
    ///
    /// # Errors
    ///
    /// Those of [`command`](Self::command).
    pub fn command_with(&mut self, name: &str, arguments: Value) -> Result<Value, Error> {
        self.send(name, arguments)?;
        self.answer(name, PATIENCE)
    }

    /// Sends a command. Take its [`answer`](Self::answer) before you send another.
    ///
    /// # Errors
    ///
    /// If QEMU does not take it.
    pub fn send(&mut self, name: &str, arguments: Value) -> Result<(), Error> {
        let request = json!({ "execute": name, "arguments": arguments });
        self.channel.send(request)
    }

    /// The answer to a command that was sent.
    ///
    /// # Errors
    ///
    /// Those of [`command`](Self::command).
    pub fn answer(&mut self, name: &str, limit: Duration) -> Result<Value, Error> {
        let deadline = Deadline::after(limit);
        let what = format!("answer to {name}");
        loop {
            let line = self.channel.line(&deadline, &what)?;
            match parse(&line)? {
                Message::Return { value } => return Ok(value),
                Message::Event(event) => self.events.push_back(event),
                Message::Error { error } => {
                    return Err(Error::Refused {
                        command: name.to_owned(),
                        class: error.class,
                        description: error.desc,
                    });
                }
                Message::Greeting { .. } => {
                    let what = "an answer of QMP";
                    return Err(Error::Malformed { what, text: line });
                }
            }
        }
    }

    /// The next event with this name, which may have arrived before. Earlier events with other
    /// names are dropped.
    ///
    /// # Errors
    ///
    /// If it does not come.
    pub fn event(&mut self, name: &str) -> Result<Event, Error> {
        self.event_within(name, PATIENCE)
    }

    /// [`event`](Self::event), within this time.
    pub(super) fn event_within(&mut self, name: &str, limit: Duration) -> Result<Event, Error> {
        let deadline = Deadline::after(limit);
        loop {
            while let Some(event) = self.events.pop_front() {
                if event.name == name {
                    return Ok(event);
                }
            }
            let line = self.channel.line(&deadline, &format!("event {name}"))?;
            match parse(&line)? {
                Message::Event(event) => self.events.push_back(event),
                _ => {
                    let what = "an event";
                    return Err(Error::Malformed { what, text: line });
                }
            }
        }
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    ///
    /// Those of [`command`](Self::command).
    pub fn stop(&mut self) -> Result<(), Error> {
        self.command("stop").map(drop)
    }

    /// Lets the vCPUs continue.
    ///
    /// # Errors
    ///
    /// Those of [`command`](Self::command).
    pub fn cont(&mut self) -> Result<(), Error> {
        self.command("cont").map(drop)
    }

    /// A property of an object, such as of `/machine/peripheral/ID`, a device with that id.
    ///
    /// # Errors
    ///
    /// Those of [`command`](Self::command).
    pub fn property(&mut self, object: &str, name: &str) -> Result<Value, Error> {
        self.command_with("qom-get", json!({ "path": object, "property": name }))
    }

    /// The VM's run state.
    ///
    /// # Errors
    ///
    /// Those of [`command`](Self::command).
    pub fn status(&mut self) -> Result<Status, Error> {
        let value = self.command("query-status")?;
        decode(value.clone()).ok_or_else(|| Error::Malformed {
            what: "a status of QMP",
            text: value.to_string(),
        })
    }
}

fn decode<T: DeserializeOwned>(value: Value) -> Option<T> {
    serde_json::from_value(value).ok()
}

fn parse(line: &str) -> Result<Message, Error> {
    serde_json::from_str(line).map_err(|_| Error::Malformed {
        what: "a message of QMP",
        text: line.to_owned(),
    })
}

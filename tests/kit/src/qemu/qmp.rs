//! QEMU's control channel, QMP.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Error;
use super::channel::{Channel, Deadline};

/// Something that QEMU told without being asked.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Event {
    /// `STOP`, `RESUME`, `RESET`, `SHUTDOWN` and so on.
    #[serde(rename = "event")]
    pub name: String,
    /// What belongs to it.
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

/// What QEMU says.
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
    /// How long an answer may take.
    limit: Duration,
    /// Events that have come and have not been asked for.
    events: VecDeque<Event>,
}

impl Qmp {
    /// Takes the greeting, and enters command mode.
    pub(super) fn new(mut channel: Channel, limit: Duration) -> Result<Self, Error> {
        let line = channel.line(&Deadline::after(limit), "greeting")?;
        let Message::Greeting { .. } = parse(&line)? else {
            let what = "a greeting of QMP";
            return Err(Error::Malformed { what, text: line });
        };
        let mut qmp = Qmp {
            channel,
            limit,
            events: VecDeque::new(),
        };
        qmp.command("qmp_capabilities")?;
        Ok(qmp)
    }

    /// Carries out a command without arguments, and gives what it returns.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] where QEMU refuses it, or where no answer comes.
    pub fn command(&mut self, name: &str) -> Result<Value, Error> {
        self.command_with(name, json!({}))
    }

    /// Carries out a command with those arguments, and gives what it returns.
    ///
    /// # Errors
    ///
    /// As [`command`](Self::command).
    pub fn command_with(&mut self, name: &str, arguments: Value) -> Result<Value, Error> {
        self.send(name, arguments)?;
        self.answer(name, self.limit)
    }

    /// Sends a command, whose [`answer`](Self::answer) is to be taken before the next one's.
    ///
    /// # Errors
    ///
    /// Where QEMU does not take it.
    pub fn send(&mut self, name: &str, arguments: Value) -> Result<(), Error> {
        let request = json!({ "execute": name, "arguments": arguments });
        self.channel.send(request)
    }

    /// The answer to a command that was sent.
    ///
    /// # Errors
    ///
    /// As [`command`](Self::command).
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

    /// The next event of that name, which may have come before. Events of other names before
    /// it are forgotten.
    ///
    /// # Errors
    ///
    /// Where it does not come within the limit.
    pub fn event(&mut self, name: &str, limit: Duration) -> Result<Event, Error> {
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
    /// As [`command`](Self::command).
    pub fn stop(&mut self) -> Result<(), Error> {
        self.command("stop").map(drop)
    }

    /// Has the vCPUs go on.
    ///
    /// # Errors
    ///
    /// As [`command`](Self::command).
    pub fn cont(&mut self) -> Result<(), Error> {
        self.command("cont").map(drop)
    }

    /// Resets the machine. The guest is [ready](super::Guest::await_ready) again later.
    ///
    /// # Errors
    ///
    /// As [`command`](Self::command).
    pub fn reset(&mut self) -> Result<(), Error> {
        self.command("system_reset").map(drop)
    }

    /// Whether the vCPUs run, and what else they are about.
    ///
    /// # Errors
    ///
    /// As [`command`](Self::command).
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

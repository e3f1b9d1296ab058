//! The device state: the whole VM as the backend's own opaque stream
//! (VHOST_USER_SET_DEVICE_STATE_FD), for a VMM that puts it into its migration stream as it is.
//!
//! A save captures one instant. A load leaves the VM RESTORING with every vCPU's registers staged;
//! each vCPU must then say RESTORE_DONE.

use std::cell::Cell;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use vhost::vhost_user::message::VhostTransferStateDirection as Direction;

use crate::connection::Connection;
use crate::error::{DeviceStateError, Feature};
use crate::sys::{io, poll, set_nonblocking};
use crate::{Deadline, Error, Frontend};
use vhost_user_timer_protocol::{MAX_STREAM, Phase};

impl Frontend {
    /// Saves the VM as the backend's device state, at most 4 MiB. Not in NEW, and not while a
    /// restore is open.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceState`] if the backend refuses, or sends more than 4 MiB;
    /// [`Error::MissingFeature`] if it has no device state; [`Error::TimedOut`]; or as the
    /// handshake.
    pub fn save_device_state(&self, deadline: impl Into<Deadline>) -> Result<Vec<u8>, Error> {
        let deadline = deadline.into();
        self.needs_device_state()?;
        self.session.exchange(deadline, |connection, one_message| {
            let (ours, theirs) = std::io::pipe().map_err(pipe_failed)?;
            let other = connection
                .transfer_device_state(Direction::SAVE, theirs.into(), one_message)
                .map_err(or_refused(DeviceStateError::SaveRefused))?;
            let state = self.read(other.unwrap_or(ours.into()), deadline)?;
            self.check(connection, deadline)
                .map_err(or_refused(DeviceStateError::SaveRefused))?;
            Ok(state)
        })
    }

    /// Loads a device state: the VM is then RESTORING, in a new epoch, with every vCPU's
    /// registers staged. In NEW and PAUSED.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceState`] if the backend refuses, and then the VM is as it was;
    /// [`Error::MissingFeature`] if it has no device state; [`Error::TimedOut`]; or as the
    /// handshake.
    pub fn load_device_state(
        &self,
        state: &[u8],
        deadline: impl Into<Deadline>,
    ) -> Result<(), Error> {
        let deadline = deadline.into();
        self.needs_device_state()?;
        let before = Cell::new(None);
        self.session.exchange(deadline, |connection, one_message| {
            // After a reconnect, the epoch tells whether the load was already done.
            if self.session.negotiated.has_config() {
                let info = connection.config(one_message)?;
                let first = before.replace(Some(info.epoch)).unwrap_or(info.epoch);
                if info.phase == Phase::Restoring && info.epoch > first {
                    return Ok(());
                }
            }
            let (theirs, ours) = std::io::pipe().map_err(pipe_failed)?;
            let other = connection
                .transfer_device_state(Direction::LOAD, theirs.into(), one_message)
                .map_err(or_refused(DeviceStateError::LoadRefused))?;
            self.write(other.unwrap_or(ours.into()), state, deadline)?;
            self.check(connection, deadline)
                .map_err(or_refused(DeviceStateError::LoadRefused))
        })?;
        self.learn_epoch()
    }

    /// Makes the backend write its device state to a descriptor, such as a pipe's, and does not
    /// wait for that. If the backend wants another descriptor used, to be read, it is returned.
    /// Call [`check_device_state`](Self::check_device_state) at the end of the stream.
    ///
    /// # Errors
    ///
    /// As [`save_device_state`](Self::save_device_state); a lost connection is
    /// [`Error::Disconnected`] in any case.
    pub fn begin_device_state_save(
        &self,
        to: impl Into<OwnedFd>,
    ) -> Result<Option<OwnedFd>, Error> {
        self.begin(Direction::SAVE, to.into())
    }

    /// Makes the backend read its device state from a descriptor, and does not wait for that. If
    /// the backend wants another descriptor used, to be written, it is returned. Closing the write
    /// end ends the stream; then call [`check_device_state`](Self::check_device_state). Nothing is
    /// loaded before.
    ///
    /// # Errors
    ///
    /// As [`load_device_state`](Self::load_device_state); a lost connection is
    /// [`Error::Disconnected`] in any case.
    pub fn begin_device_state_load(
        &self,
        from: impl Into<OwnedFd>,
    ) -> Result<Option<OwnedFd>, Error> {
        self.begin(Direction::LOAD, from.into())
    }

    /// Waits until the transfer that was begun is done, for
    /// [`Options::timeout`](super::Options::timeout) at most.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceState`] if the transfer failed; [`Error::Disconnected`] if the connection was
    /// lost, and the transfer with it. A load may have been done even so: then the VM is RESTORING
    /// in a new epoch.
    pub fn check_device_state(&self) -> Result<(), Error> {
        self.needs_device_state()?;
        self.check(&self.session.connection(), Deadline::NEVER)
            .map_err(or_refused(DeviceStateError::TransferRefused))?;
        self.learn_epoch()
    }

    fn begin(&self, direction: Direction, fd: OwnedFd) -> Result<Option<OwnedFd>, Error> {
        self.needs_device_state()?;
        let deadline = self.session.timeout.into();
        self.session
            .connection()
            .transfer_device_state(direction, fd, deadline)
            .map_err(or_refused(DeviceStateError::TransferRefused))
    }

    fn check(&self, connection: &Connection, deadline: Deadline) -> Result<(), Error> {
        // A load may remove the anchor.
        self.session.history.counter_changes();
        connection.check_device_state(deadline.or(self.session.timeout))
    }

    fn needs_device_state(&self) -> Result<(), Error> {
        if self.session.negotiated.has_device_state() {
            Ok(())
        } else {
            Err(Error::MissingFeature(Feature::DeviceState))
        }
    }

    /// Reads the epoch: a load opens one, and no answer names it.
    fn learn_epoch(&self) -> Result<(), Error> {
        let info = match self.session.negotiated.has_config() {
            true => self.config()?,
            false => self.queue().info(self.session.timeout)?,
        };
        self.session.history.learn_info(&info);
        Ok(())
    }

    /// Reads to the end.
    fn read(&self, from: OwnedFd, deadline: Deadline) -> Result<Vec<u8>, Error> {
        let from = nonblocking(from)?;
        let mut state = Vec::new();
        loop {
            let room = (MAX_STREAM + 1 - state.len()) as u64;
            match (&from).take(room).read_to_end(&mut state) {
                Ok(_) if state.len() > MAX_STREAM => {
                    return Err(Error::DeviceState(DeviceStateError::TooLong));
                }
                Ok(_) => return Ok(state),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait_for(&from, PollFlags::IN, deadline)?;
                }
                Err(source) => return Err(pipe_failed(source)),
            }
        }
    }

    /// Writes everything and closes the descriptor. If the backend stops reading early,
    /// CHECK_DEVICE_STATE reports why.
    fn write(&self, to: OwnedFd, mut state: &[u8], deadline: Deadline) -> Result<(), Error> {
        let to = nonblocking(to)?;
        while !state.is_empty() {
            match (&to).write(state) {
                Ok(written) => state = &state[written..],
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => self.wait_for(&to, PollFlags::OUT, deadline)?,
                    ErrorKind::BrokenPipe => break,
                    _ => return Err(pipe_failed(error)),
                },
            }
        }
        Ok(())
    }

    fn wait_for(&self, fd: &File, ready: PollFlags, deadline: Deadline) -> Result<(), Error> {
        let shutdown = &self.session.watch.shutdown;
        let mut fds = [
            PollFd::new(fd, ready),
            PollFd::from_borrowed_fd(shutdown.as_fd(), PollFlags::IN),
        ];
        poll(&mut fds, deadline)?;
        if !fds[1].revents().is_empty() {
            Err(Error::ShutDown)
        } else if fds[0].revents().is_empty() {
            Err(Error::TimedOut {
                what: "the device state's transfer",
            })
        } else {
            Ok(())
        }
    }
}

/// Replaces the backend's refusal of a message.
fn or_refused(refused: DeviceStateError) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Control { source, .. } if source.is_refusal() => Error::DeviceState(refused),
        error => error,
    }
}

fn pipe_failed(source: std::io::Error) -> Error {
    io("transfer the device state")(source)
}

fn nonblocking(fd: OwnedFd) -> Result<File, Error> {
    set_nonblocking(&fd).map_err(io("transfer the device state"))?;
    Ok(fd.into())
}

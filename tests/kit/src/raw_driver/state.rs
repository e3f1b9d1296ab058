//! Device state, by `vhost`'s `Frontend`, through a pipe.

use std::io::{ErrorKind, PipeReader, PipeWriter, Read, Write, pipe};

use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

/// Starts a save. Returns the end to read.
///
/// # Panics
///
/// If it is refused.
pub fn start_save(control: &Frontend) -> PipeReader {
    let (reader, writer) = pipe().expect("a pipe");
    let returned = control.set_device_state_fd(Direction::SAVE, Phase::STOPPED, writer.into());
    assert!(
        returned.expect("SET_DEVICE_STATE_FD").is_none(),
        "our own pipe is used"
    );
    reader
}

/// Starts a load. Returns the end to write.
///
/// # Panics
///
/// If it is refused.
pub fn start_load(control: &Frontend) -> PipeWriter {
    let (reader, writer) = pipe().expect("a pipe");
    let returned = control.set_device_state_fd(Direction::LOAD, Phase::STOPPED, reader.into());
    assert!(
        returned.expect("SET_DEVICE_STATE_FD").is_none(),
        "our own pipe is used"
    );
    writer
}

/// Saves the device's state.
///
/// # Panics
///
/// If that fails.
pub fn save(control: &Frontend) -> Vec<u8> {
    let mut stream = Vec::new();
    start_save(control)
        .read_to_end(&mut stream)
        .expect("the stream");
    control.check_device_state().expect("CHECK_DEVICE_STATE");
    stream
}

/// Loads these bytes. Returns whether the backend accepted them.
///
/// # Panics
///
/// If the transfer does not start.
pub fn load(control: &Frontend, bytes: &[u8]) -> bool {
    let mut writer = start_load(control);
    match writer.write_all(bytes) {
        Ok(()) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::BrokenPipe),
    }
    drop(writer);
    control.check_device_state().is_ok()
}

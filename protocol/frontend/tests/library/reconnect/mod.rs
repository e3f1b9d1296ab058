//! A backend that goes away and comes back.

mod outage;
mod replay;

use crate::LONG;
use crate::SHORT;
use crate::fake::model::Rig;
use crate::fake::model::VCPUS;
use std::time::Duration;
use vhost_user_timer_frontend::Frontend;
use vhost_user_timer_frontend::Operation;
use vhost_user_timer_frontend::Options;
use vhost_user_timer_frontend::Phase;
use vhost_user_timer_frontend::Reconnect;
use vhost_user_timer_frontend::RestoreOptions;

pub(super) fn policy() -> Reconnect {
    Reconnect::default()
        .patience(LONG)
        .delays(SHORT, Duration::from_millis(10))
}

pub(crate) fn options() -> Options {
    Options::default().reconnect(policy())
}

/// Lets the frontend learn that a restore is open, as it is.
pub(super) fn tell(frontend: &Frontend, rig: &Rig, phase: Phase, done: &[u32]) {
    if phase == Phase::Restoring {
        let begin = Operation::restore_begin(VCPUS, RestoreOptions::default());
        frontend.queue().perform(&begin, LONG).unwrap();
    }
    rig.set(phase, done);
    rig.vm.lock().unwrap().log.clear();
}

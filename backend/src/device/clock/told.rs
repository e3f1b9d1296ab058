//! What the log says of a guest's requests: at debug each alarm that is set and each refusal with
//! its reason, at trace every request with its answer.

use log::LevelFilter;
use vhost_user_timer_model::rtc::Request;
use vhost_user_timer_model::rtc::wire::Status;

/// Whether the log says anything of requests. One load.
#[inline]
pub(super) fn is_wanted() -> bool {
    log::max_level() >= LevelFilter::Debug
}

/// Says what became of a request, which had room for this many bytes of a response.
#[cold]
pub(super) fn tell(request: &Request, room: usize, response: &[u8]) {
    let Some(status) = response.first().copied().and_then(Status::from_code) else {
        return;
    };
    let name = status.name();
    log::trace!("{request}: answered {name}, {} bytes", response.len());
    if status != Status::Ok {
        let why = request.fault(room).unwrap_or(status.meaning());
        log::debug!("{request} is refused: {name}: {why}");
    } else if request.sets_alarm() {
        log::debug!("{request}: done");
    }
}

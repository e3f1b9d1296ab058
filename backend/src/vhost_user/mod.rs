//! The vhost-user protocol, once for all devices.

pub(crate) mod dirty_log;
pub(crate) mod link;
pub(crate) mod relay;
pub(crate) mod transfer;
pub(crate) mod vring;

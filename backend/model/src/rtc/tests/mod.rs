//! Tests of the virtio-rtc device.
//!
//! [`rig`] holds a device, and clocks that a test turns by hand. The sentences of virtio 1.4
//! §5.23.6 that a device must meet are tests by section: [`requests`], [`capabilities`], [`reads`],
//! [`crosses`] and [`alarms`]. [`keeping`] is what outlives a process or a host. [`properties`] are
//! random lives, compared with a naive model.

mod alarms;
mod capabilities;
mod crosses;
mod keeping;
mod properties;
mod reads;
mod requests;
mod rig;

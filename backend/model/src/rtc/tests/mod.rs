//! Tests of the virtio-rtc device.
//!
//! [`rig`] is the bench: a device, and clocks that a test turns by hand. On it stand the
//! sentences of virtio 1.4 §5.23.6 that a device must meet, each as a test of its name, by
//! section: [`requests`], [`capabilities`], [`reads`], [`crosses`] and [`alarms`]; [`keeping`]
//! is what outlives a process or a host, and [`properties`] are random lives, told alike by a
//! naive model.

mod alarms;
mod capabilities;
mod crosses;
mod keeping;
mod properties;
mod reads;
mod requests;
mod rig;

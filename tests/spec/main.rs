//! The protocol over its socket: the released binary, driven by hand.

mod control_channel;
mod descriptor_layouts;
mod device_state;
mod interop_virtio_driver;
mod time_page;
mod wire_counters;
mod wire_events;
mod wire_phases;
mod wire_registers;
mod wire_requests;
mod wire_restore;

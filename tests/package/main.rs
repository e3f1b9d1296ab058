//! The Debian package, in copies of Debian roots: one with nothing but apt, and one with what a
//! host of VMs has (systemd, AppArmor, man, libvirt). `.ci/deb` makes it of the programs that are
//! built.

mod bare;
mod description;
mod domains;
mod host;
mod root;

//! The integration tests of vhost-user-timer; each is a binary of a theme, in the folder of its
//! name.

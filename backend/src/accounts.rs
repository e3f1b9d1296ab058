//! Users and groups that the command line names: by name, or by number.

use std::fmt;

use nix::errno::Errno;
use nix::unistd;

/// Why there is no such user or group.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccountError {
    /// No user has the name.
    #[error("this host has no user of this name; name another one, or pass a uid")]
    NoSuchUser,
    /// No group has the name.
    #[error("this host has no group of this name; name another one (getent group), or pass a gid")]
    NoSuchGroup,
    /// The number is no uid or gid.
    #[error("a uid or gid is a number from 0 to 4294967294")]
    OutOfRange,
    /// The host cannot say.
    #[error("finding this name on the host failed; pass the number")]
    Lookup(#[source] Errno),
}

/// A user of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// As it was named.
    name: String,
    uid: u32,
}

/// A group of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// As it was named.
    name: String,
    gid: u32,
}

impl User {
    /// The user of this name or uid.
    ///
    /// # Errors
    ///
    /// [`AccountError`] where there is none.
    pub fn parse(name: &str) -> Result<Self, AccountError> {
        let found = || Ok(unistd::User::from_name(name)?.map(|user| user.uid.as_raw()));
        Ok(User {
            name: name.to_owned(),
            uid: id(name, found)?.ok_or(AccountError::NoSuchUser)?,
        })
    }

    /// The user's number.
    pub fn uid(&self) -> u32 {
        self.uid
    }
}

impl Group {
    /// The group of this name or gid.
    ///
    /// # Errors
    ///
    /// [`AccountError`] where there is none.
    pub fn parse(name: &str) -> Result<Self, AccountError> {
        let found = || Ok(unistd::Group::from_name(name)?.map(|group| group.gid.as_raw()));
        Ok(Group {
            name: name.to_owned(),
            gid: id(name, found)?.ok_or(AccountError::NoSuchGroup)?,
        })
    }

    /// The group's number.
    pub fn gid(&self) -> u32 {
        self.gid
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// The number that a text of digits is; otherwise the one that the host has `found` for a name. The
/// largest one means "unchanged" to chown(2), and nobody.
fn id(
    text: &str,
    found: impl FnOnce() -> nix::Result<Option<u32>>,
) -> Result<Option<u32>, AccountError> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return found().map_err(AccountError::Lookup);
    }
    match text.parse() {
        Ok(u32::MAX) | Err(_) => Err(AccountError::OutOfRange),
        Ok(number) => Ok(Some(number)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_or_a_group_has_a_name_or_a_number() {
        assert_eq!(User::parse("root").unwrap().uid(), 0);
        assert_eq!(Group::parse("root").unwrap().gid(), 0);
        // Also one without an entry on this host.
        assert_eq!(User::parse("4294967294").unwrap().uid(), u32::MAX - 1);
        assert_eq!(Group::parse("4294967294").unwrap().gid(), u32::MAX - 1);
        assert_eq!(Group::parse("0").unwrap().to_string(), "0");
    }

    #[test]
    fn what_no_account_can_be_is_refused() {
        for name in ["", "no such account", "-1", "0x0"] {
            assert_eq!(User::parse(name), Err(AccountError::NoSuchUser), "{name}");
            assert_eq!(Group::parse(name), Err(AccountError::NoSuchGroup), "{name}");
        }
        for number in ["4294967295", "4294967296"] {
            assert_eq!(User::parse(number), Err(AccountError::OutOfRange));
            assert_eq!(Group::parse(number), Err(AccountError::OutOfRange));
        }
    }
}

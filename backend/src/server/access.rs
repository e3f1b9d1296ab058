//! Who can open a socket at a path: its group and its mode.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::fs::{AtFlags, Gid, chownat};

use crate::accounts::{Group, User};
use crate::sys::peer_credentials;

/// What a socket's owner needs. Without a group nobody else gets more.
const OWNER: u32 = 0o600;

/// The mode with a group.
const OWNER_AND_GROUP: u32 = 0o660;

/// The mode of a socket at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketMode(u32);

/// Why a text is no [`SocketMode`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModeError {
    /// It is not octal, or has other bits than those of owner, group and others.
    #[error("a mode is three octal digits, such as 660, with or without a 0 before them")]
    NotAMode,
    /// The owner could not connect.
    #[error("the socket's owner needs reading and writing; use 600, 660 or 666")]
    NotTheOwners,
    /// It gives someone a right with which nobody can connect.
    #[error(
        "connecting needs the write permission, without which the others are of no use; use 600, 660 or 666"
    )]
    NoWrite,
}

impl SocketMode {
    /// From octal digits.
    ///
    /// # Errors
    ///
    /// [`ModeError`] where a frontend could not connect as the mode suggests.
    pub fn parse(text: &str) -> Result<Self, ModeError> {
        let digits = text.strip_prefix("0o").unwrap_or(text);
        let octal = digits.bytes().all(|digit| matches!(digit, b'0'..=b'7'));
        let mode = u32::from_str_radix(digits, 8).map_err(|_| ModeError::NotAMode)?;
        if !octal || mode > 0o777 {
            return Err(ModeError::NotAMode);
        }
        if mode & OWNER != OWNER {
            return Err(ModeError::NotTheOwners);
        }
        let useless = |class: u32| class != 0 && class & 0o2 == 0;
        if useless(mode >> 3 & 0o7) || useless(mode & 0o7) {
            return Err(ModeError::NoWrite);
        }
        Ok(SocketMode(mode))
    }
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// The group and the mode that sockets at a path get, and whose frontends are served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Otherwise that of the process.
    pub group: Option<Group>,
    /// Otherwise 0600, or 0660 with a group.
    pub mode: Option<SocketMode>,
    /// The users whose frontends are served, also on sockets that the launcher made. Otherwise all.
    pub users: Vec<User>,
}

/// Why a frontend is turned away.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("process {pid} is of uid {uid}, and --allow-uid allows {allowed}")]
pub struct Stranger {
    /// The process that connected, or made the socket pair; 0 where it is of a foreign namespace.
    pid: i32,
    /// Its user.
    uid: u32,
    /// The users that are served.
    allowed: String,
}

/// Why a socket does not get its group or mode.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// It does not get its group.
    #[error(
        "giving it the group {group} failed; the user of this process must be a member of that \
         group, or root"
    )]
    Group {
        /// As it was named.
        group: String,
        /// Why.
        source: io::Error,
    },
    /// It does not get its mode.
    #[error("giving it the mode {mode} failed")]
    Mode {
        /// The mode.
        mode: SocketMode,
        /// Why.
        source: io::Error,
    },
}

impl Access {
    fn mode(&self) -> SocketMode {
        self.mode.unwrap_or(SocketMode(match self.group {
            Some(_) => OWNER_AND_GROUP,
            None => OWNER,
        }))
    }

    /// Checks that a frontend's user is one whose frontends are served: the effective user at
    /// connect(2), or of the process that made a socket pair (SO_PEERCRED, unix(7)).
    pub(super) fn admit(&self, frontend: &UnixStream) -> io::Result<Result<(), Stranger>> {
        if self.users.is_empty() {
            return Ok(Ok(()));
        }
        let peer = peer_credentials(frontend)?;
        if self.users.iter().any(|user| user.uid() == peer.uid()) {
            return Ok(Ok(()));
        }
        let allowed: Vec<_> = self.users.iter().map(User::to_string).collect();
        Ok(Err(Stranger {
            pid: peer.pid(),
            uid: peer.uid(),
            allowed: allowed.join(", "),
        }))
    }

    /// Has the socket be its owner's alone once it is bound: its file gets the socket's own mode,
    /// less the umask (Linux, net/unix/af_unix.c, `unix_bind_bsd`).
    pub(super) fn before_binding(socket: impl AsFd) -> io::Result<()> {
        Ok(rustix::fs::fchmod(socket, OWNER.into())?)
    }

    /// Gives the file of a bound socket its group, and then its mode. The file is a descriptor of
    /// its own (O_PATH), since somebody may have replaced the path by another file.
    pub(super) fn open_up(&self, file: &File) -> Result<(), AccessError> {
        if let Some(group) = &self.group {
            let gid = Some(Gid::from_raw(group.gid()));
            chownat(file, c"", None, gid, AtFlags::EMPTY_PATH).map_err(|source| {
                let (group, source) = (group.to_string(), source.into());
                AccessError::Group { group, source }
            })?;
        }
        let mode = self.mode();
        fs::set_permissions(path_of(file), PermissionsExt::from_mode(mode.0))
            .map_err(|source| AccessError::Mode { mode, source })
    }
}

/// A path that names the file of a descriptor, whatever became of the file's own path.
pub(super) fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_octal() {
        for text in ["660", "0660", "0o660"] {
            let mode = SocketMode::parse(text).unwrap();
            assert_eq!(mode.to_string(), "0660", "{text}");
        }
        for bad in ["", "0o", "+660", "-1", "rw", "680", "1660", "0x1b0"] {
            assert_eq!(SocketMode::parse(bad), Err(ModeError::NotAMode), "{bad}");
        }
    }

    #[test]
    fn a_mode_with_which_a_frontend_cannot_connect_is_refused() {
        for bad in ["0", "060", "400", "200", "066"] {
            assert_eq!(
                SocketMode::parse(bad),
                Err(ModeError::NotTheOwners),
                "{bad}"
            );
        }
        for bad in ["640", "750", "755", "664"] {
            assert_eq!(SocketMode::parse(bad), Err(ModeError::NoWrite), "{bad}");
        }
        for good in ["600", "620", "660", "662", "666", "700", "770", "777"] {
            assert!(SocketMode::parse(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn without_options_a_socket_is_its_owners_and_with_a_group_the_groups_too() {
        assert_eq!(Access::default().mode().to_string(), "0600");
        let group = Group::parse("0").ok();
        let access = Access {
            group,
            ..Access::default()
        };
        assert_eq!(access.mode().to_string(), "0660");
        let mode = SocketMode::parse("666").ok();
        let access = Access { mode, ..access };
        assert_eq!(access.mode().to_string(), "0666");
    }
}

//! Where each device's frontends come from, as the launcher says, before anything is opened.

use std::ffi::OsStr;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use crate::args::Args;
use crate::server::{Access, LISTEN_FDS, Passed, Socket, SocketError};
use crate::sys::folder_of;

/// Where one device's frontends come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A socket that this process makes at a path.
    Path(PathBuf),
    /// A descriptor that the launcher passes.
    Descriptor {
        /// What names it: an option, or a service manager's variable.
        named_by: &'static str,
        /// Its number.
        fd: RawFd,
    },
}

impl Place {
    fn of(path: Option<&PathBuf>, named_by: &'static str, fd: Option<RawFd>) -> Option<Self> {
        match (path, fd) {
            (Some(path), _) => Some(Place::Path(path.clone())),
            (None, Some(fd)) => Some(Place::Descriptor { named_by, fd }),
            (None, None) => None,
        }
    }

    /// The place that an option names, or else the descriptor that a service manager passed.
    fn or_passed(
        named: Option<Self>,
        device: &'static str,
        passed: Option<RawFd>,
    ) -> Result<Option<Self>, PlacesError> {
        let named_by = LISTEN_FDS;
        let passed = passed.map(|fd| Place::Descriptor { named_by, fd });
        match (named, passed) {
            (Some(_), Some(_)) => Err(PlacesError::Twice(device)),
            (named, passed) => Ok(named.or(passed)),
        }
    }

    /// Listens at the path, with this group and mode, or adopts the descriptor. Frontends of the
    /// named users are served.
    ///
    /// # Errors
    ///
    /// [`SocketError`] where there is no such socket, or the system refuses.
    pub fn open(&self, access: &Access) -> Result<Socket, SocketError> {
        match self {
            Place::Path(path) => Socket::bind(path, access),
            Place::Descriptor { named_by, fd } => Socket::from_fd(named_by, *fd, access),
        }
    }
}

/// The places of both devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// The timer device's.
    pub timer: Option<Place>,
    /// The clock device's.
    pub clock: Option<Place>,
}

/// Why the places do not fit together, or other options do not fit them.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacesError {
    /// A device has two sockets.
    #[error(
        "the {0} device's socket is named by an option, and a service manager passes one as well \
         (LISTEN_FDS); leave one of them out"
    )]
    Twice(&'static str),
    /// Both devices have one descriptor.
    #[error("{timer} and {clock} name the same descriptor; each device needs its own")]
    OneDescriptor {
        /// What names it for the timer device.
        timer: &'static str,
        /// What names it for the clock device.
        clock: &'static str,
    },
    /// Both devices have one socket, by two descriptors.
    #[error(
        "{timer} {timer_fd} and {clock} {clock_fd} are the same socket; each device needs its own"
    )]
    OneSocket {
        /// What names the timer device's descriptor.
        timer: &'static str,
        /// Its number.
        timer_fd: RawFd,
        /// What names the clock device's descriptor.
        clock: &'static str,
        /// Its number.
        clock_fd: RawFd,
    },
    /// Two options name one path.
    #[error(
        "{first} {} and {second} {} are the same path; each needs its own",
        first_path.display(),
        second_path.display()
    )]
    OnePath {
        /// The one.
        first: &'static str,
        /// Its path.
        first_path: PathBuf,
        /// The other.
        second: &'static str,
        /// Its path.
        second_path: PathBuf,
    },
    /// A path as some programs name a socket without one.
    #[error(
        "{option} {}: an abstract socket has no mode that keeps others out; name a path, or ./{} \
         for a file of this name",
        path.display(),
        path.display()
    )]
    Abstract {
        /// The option.
        option: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// The descriptor of the log.
    #[error("{0} 2: this is standard error, where the log goes; pass another descriptor")]
    StandardError(&'static str),
    /// An option of the clock device, which there is not.
    #[error(
        "{0} is for the guest's clock, which has no socket; add --rtc-socket-path or --rtc-fd, or \
         leave the option out"
    )]
    NoClock(&'static str),
    /// An option of sockets that this process makes, of which there is none.
    #[error(
        "{0} is for sockets that this process makes, and the launcher makes all of them; add \
         --socket-path or --rtc-socket-path, or have the launcher set it"
    )]
    NoPath(&'static str),
}

impl Places {
    /// The places that the options name, and those that a service manager passed.
    ///
    /// # Errors
    ///
    /// [`PlacesError::Twice`] where both name one device's.
    pub fn of(args: &Args, passed: Passed) -> Result<Self, PlacesError> {
        let timer = Place::of(args.socket_path.as_ref(), "--fd", args.fd);
        let clock = Place::of(args.rtc_socket_path.as_ref(), "--rtc-fd", args.rtc_fd);
        Ok(Places {
            timer: Place::or_passed(timer, "timer", passed.timer)?,
            clock: Place::or_passed(clock, "clock", passed.clock)?,
        })
    }

    /// Whether there is no socket at all.
    pub fn are_none(&self) -> bool {
        self.timer.is_none() && self.clock.is_none()
    }

    /// Checks that each device has a socket of its own, and that each option of sockets and of the
    /// clock has something to be for.
    ///
    /// # Errors
    ///
    /// [`PlacesError`] for the first one that has not.
    pub fn check(&self, args: &Args) -> Result<(), PlacesError> {
        if let (Some(timer), Some(clock)) = (&self.timer, &self.clock) {
            are_two(timer, clock)?;
        }
        for place in [&self.timer, &self.clock].into_iter().flatten() {
            if let Place::Descriptor { named_by, fd: 2 } = place {
                return Err(PlacesError::StandardError(named_by));
            }
        }
        check_paths(args)?;
        if self.clock.is_none() {
            refuse(
                "--rtc-clock",
                args.rtc_clock.is_some(),
                PlacesError::NoClock,
            )?;
            let offset = args.rtc_counter_offset.is_some();
            refuse("--rtc-counter-offset", offset, PlacesError::NoClock)?;
        }
        let mut places = [&self.timer, &self.clock].into_iter().flatten();
        if !places.any(|place| matches!(place, Place::Path(_))) {
            let group = args.socket_group.is_some();
            refuse("--socket-group", group, PlacesError::NoPath)?;
            refuse(
                "--socket-mode",
                args.socket_mode.is_some(),
                PlacesError::NoPath,
            )?;
        }
        Ok(())
    }
}

fn refuse(
    option: &'static str,
    given: bool,
    why: fn(&'static str) -> PlacesError,
) -> Result<(), PlacesError> {
    if given { Err(why(option)) } else { Ok(()) }
}

/// Whether two paths are one: the same name in the same folder, however that is written.
fn are_one(a: &Path, b: &Path) -> bool {
    fn resolved(path: &Path) -> Option<(PathBuf, &OsStr)> {
        Some((folder_of(path).canonicalize().ok()?, path.file_name()?))
    }
    a == b || resolved(a).is_some_and(|a| resolved(b) == Some(a))
}

/// Refuses a path that two options name, and an abstract socket.
fn check_paths(args: &Args) -> Result<(), PlacesError> {
    let sockets = [
        ("--socket-path", &args.socket_path),
        ("--rtc-socket-path", &args.rtc_socket_path),
    ];
    for (option, path) in sockets {
        let path = path.clone().unwrap_or_default();
        if path.as_os_str().as_encoded_bytes().starts_with(b"@") {
            return Err(PlacesError::Abstract { option, path });
        }
    }
    let files = [
        ("--state-file", &args.state_file),
        ("--pid-file", &args.pid_file),
    ];
    let all: Vec<_> = sockets
        .into_iter()
        .chain(files)
        .filter_map(|(option, path)| Some((option, path.as_ref()?)))
        .collect();
    for (index, (first, first_path)) in all.iter().enumerate() {
        for (second, second_path) in all.iter().skip(index + 1) {
            if are_one(first_path, second_path) {
                return Err(PlacesError::OnePath {
                    first,
                    first_path: PathBuf::clone(first_path),
                    second,
                    second_path: PathBuf::clone(second_path),
                });
            }
        }
    }
    Ok(())
}

/// Refuses one descriptor for both devices, and two of one socket.
fn are_two(timer: &Place, clock: &Place) -> Result<(), PlacesError> {
    let (
        Place::Descriptor {
            named_by: timer,
            fd: timer_fd,
        },
        Place::Descriptor {
            named_by: clock,
            fd: clock_fd,
        },
    ) = (timer, clock)
    else {
        return Ok(());
    };
    let (timer_fd, clock_fd) = (*timer_fd, *clock_fd);
    if timer_fd == clock_fd {
        return Err(PlacesError::OneDescriptor { timer, clock });
    }
    // `socket:[…]` of its inode.
    let socket = |fd| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok();
    if socket(timer_fd).is_some_and(|file| socket(clock_fd) == Some(file)) {
        return Err(PlacesError::OneSocket {
            timer,
            timer_fd,
            clock,
            clock_fd,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixStream;

    use clap::Parser;

    use super::*;

    fn check(args: &[&str]) -> Result<(), PlacesError> {
        let args = Args::parse_from([&["vhost-user-timer"], args].concat());
        Places::of(&args, Passed::default())?.check(&args)
    }

    #[test]
    fn one_path_is_one_however_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        std::fs::create_dir(folder.join("real")).unwrap();
        symlink("real", folder.join("link")).unwrap();
        let of = |timer: &str, clock: &str| {
            let timer = format!("--socket-path={}", folder.join(timer).display());
            let clock = format!("--rtc-socket-path={}", folder.join(clock).display());
            check(&[&timer, &clock])
        };
        for (timer, clock) in [
            ("real/s", "real/s"),
            ("real/s", "./real/s"),
            ("real/s", "real/../real/s"),
            ("real/s", "link/s"),
            ("no/folder/s", "no/folder/s"),
        ] {
            let refused = of(timer, clock).unwrap_err();
            assert!(
                matches!(refused, PlacesError::OnePath { .. }),
                "{timer} {clock}"
            );
        }
        assert!(are_one(Path::new("s"), Path::new("./s")));
        let socket = format!("--socket-path={}", folder.join("s").display());
        for option in ["--state-file", "--pid-file"] {
            let same = format!("{option}={}", folder.join("./s").display());
            let refused = check(&[&socket, &same]).unwrap_err();
            assert!(matches!(refused, PlacesError::OnePath { second, .. } if second == option));
        }
        assert_eq!(of("real/s", "real/t"), Ok(()));
        assert_eq!(of("real/s", "s"), Ok(()));
    }

    #[test]
    fn an_abstract_socket_and_standard_error_are_refused() {
        for (option, name) in [
            ("--socket-path=@vm1", "--socket-path"),
            ("--rtc-socket-path=@vm1", "--rtc-socket-path"),
        ] {
            let path = PathBuf::from("@vm1");
            let refused = PlacesError::Abstract { option: name, path };
            assert_eq!(check(&[option]), Err(refused));
        }
        assert_eq!(check(&["--socket-path=./@vm1"]), Ok(()));
        for (option, name) in [("--fd=2", "--fd"), ("--rtc-fd=2", "--rtc-fd")] {
            assert_eq!(check(&[option]), Err(PlacesError::StandardError(name)));
        }
    }

    #[test]
    fn two_descriptors_of_one_socket_are_one() {
        let (socket, peer) = UnixStream::pair().unwrap();
        let copy = socket.try_clone().unwrap();
        let of = |timer: &UnixStream, clock: &UnixStream| {
            let timer = format!("--fd={}", timer.as_raw_fd());
            check(&[&timer, &format!("--rtc-fd={}", clock.as_raw_fd())])
        };
        let refused = of(&socket, &socket).unwrap_err();
        assert!(matches!(refused, PlacesError::OneDescriptor { .. }));
        let refused = of(&socket, &copy).unwrap_err();
        assert!(matches!(refused, PlacesError::OneSocket { .. }));
        assert_eq!(of(&socket, &peer), Ok(()));
    }

    #[test]
    fn a_passed_socket_stands_for_its_device_unless_an_option_does() {
        let of = |args: &[&str], timer, clock| {
            let args = Args::parse_from([&["vhost-user-timer"], args].concat());
            let places = Places::of(&args, Passed { timer, clock })?;
            places.check(&args)?;
            Ok(places)
        };
        let places = of(&["--rtc-socket-path=/x"], Some(3), None).unwrap();
        let passed = Place::Descriptor {
            named_by: LISTEN_FDS,
            fd: 3,
        };
        assert_eq!(places.timer, Some(passed));
        assert!(of(&["--rtc-clock=utc"], None, Some(3)).is_ok());
        for (args, timer, clock, why) in [
            (["--fd=5"], Some(3), None, PlacesError::Twice("timer")),
            (["--rtc-fd=5"], None, Some(3), PlacesError::Twice("clock")),
            (
                ["--rtc-fd=3"],
                Some(3),
                None,
                PlacesError::OneDescriptor {
                    timer: LISTEN_FDS,
                    clock: "--rtc-fd",
                },
            ),
        ] {
            assert_eq!(of(&args, timer, clock), Err(why));
        }
        assert!(of(&[], None, None).unwrap().are_none());
    }

    #[test]
    fn an_option_without_the_socket_that_it_is_for_is_refused() {
        for option in ["--rtc-clock=utc", "--rtc-counter-offset=1"] {
            let name = option.split_once('=').unwrap().0;
            let refused = check(&["--fd=3", option]).unwrap_err();
            assert_eq!(refused, PlacesError::NoClock(name));
            assert_eq!(check(&["--rtc-fd=3", option]), Ok(()));
        }
        for option in ["--socket-group=0", "--socket-mode=660"] {
            let name = option.split_once('=').unwrap().0;
            let refused = check(&["--fd=3", "--rtc-fd=4", option]).unwrap_err();
            assert_eq!(refused, PlacesError::NoPath(name));
            assert_eq!(check(&["--fd=3", "--rtc-socket-path=/x", option]), Ok(()));
            assert_eq!(check(&["--socket-path=/x", option]), Ok(()));
        }
    }
}

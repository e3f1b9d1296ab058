//! Whether standard error is a stream to the journal (systemd.exec(5), `$JOURNAL_STREAM`).

use std::os::fd::AsFd;

use rustix::fs::fstat;

/// Names the device and the inode of the journal's stream.
const VARIABLE: &str = "JOURNAL_STREAM";

/// Whether stderr is the journal's. A process whose stderr was redirected still inherits the
/// variable, so it is the descriptor that decides.
pub(super) fn is_stderr() -> bool {
    let variable = std::env::var(VARIABLE).ok();
    variable.is_some_and(|stream| names(&stream, rustix::stdio::stderr()))
}

fn names(stream: &str, fd: impl AsFd) -> bool {
    let Some((device, inode)) = stream.split_once(':') else {
        return false;
    };
    let (Ok(device), Ok(inode)) = (device.parse::<u64>(), inode.parse::<u64>()) else {
        return false;
    };
    fstat(fd).is_ok_and(|found| (found.st_dev, found.st_ino) == (device, inode))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_stream_is_named_by_its_device_and_inode() {
        let (stream, other) = UnixStream::pair().unwrap();
        let found = fstat(&stream).unwrap();
        let name = format!("{}:{}", found.st_dev, found.st_ino);
        assert!(names(&name, &stream));
        assert!(!names(&name, &other));
        let swapped = format!("{}:{}", found.st_ino, found.st_dev);
        for wrong in ["", ":", "8", "8:", "-1:2", "8:x", &name[1..], &swapped] {
            assert!(!names(wrong, &stream), "{wrong}");
        }
    }
}

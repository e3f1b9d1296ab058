//! The time of a line, in UTC.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

/// RFC 3339, in UTC, to the second.
pub(super) fn push(line: &mut String, at: SystemTime) {
    const DAY: u64 = 24 * 60 * 60;
    let since_epoch = at.duration_since(SystemTime::UNIX_EPOCH);
    let since_epoch: Duration = since_epoch.unwrap_or_default();
    let (days, second) = (since_epoch.as_secs() / DAY, since_epoch.as_secs() % DAY);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    // Writing to a string does not fail.
    let _ = write!(
        line,
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"
    );
}

/// Year, month and day of the Gregorian calendar, from days since 1970-01-01.
///
/// Years begin in March here, so that a leap day is the last day of its year. An era is the 400
/// years, 146,097 days, after which the calendar repeats itself.
fn date(days: u64) -> (u64, u64, u64) {
    // Days from 0000-03-01 to 1970-01-01.
    const EPOCH: u64 = 719_468;
    let (era, day) = ((days + EPOCH) / 146_097, (days + EPOCH) % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // From March on, months have 31, 30, 31, 30, 31 days, again and again: 153 days for five.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year + next_year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_in_utc_to_the_second_and_none_is_before_1970() {
        let text = |at| {
            let mut line = String::new();
            push(&mut line, at);
            line
        };
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_727_633_999);
        assert_eq!(text(at), "2026-11-26T21:13:53Z");
        let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(text(before), "1970-01-01T00:00:00Z");
    }

    #[test]
    fn every_day_of_six_centuries_follows_the_one_before() {
        let leap = |year| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..600 * 365 {
            assert_eq!(date(days), (year, month, day), "day {days}");
            let last = match month {
                2 if leap(year) => 29,
                2 => 28,
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            (year, month, day) = match (month, day) {
                (12, 31) => (year + 1, 1, 1),
                (_, day) if day == last => (year, month + 1, 1),
                _ => (year, month, day + 1),
            };
        }
    }
}

use super::*;
use crate::VmOptions;
use vhost_user_timer_protocol::{Abi, CounterSource};

fn refusal() -> Refusal {
    Refusal {
        op: Op::Resume,
        vcpu: None,
        status: Status::Busy,
        detail: 0,
        epoch: 1,
        register: None,
    }
}

/// What a backend is that should count by CNTVCT.
fn monotonic(anchored: bool) -> OtherCounter {
    OtherCounter {
        expected: CounterSource::Cntvct,
        found: CounterSource::Monotonic,
        anchored,
    }
}

/// One error of each variant that leaves the queue as it is; the `match` in
/// [`Error::ends_queue`] has no wildcard, so a new variant is seen to.
fn that_leave_the_queue() -> Vec<Error> {
    let source = || io::Error::other("a cause");
    vec![
        Error::Connect {
            path: PathBuf::from("/run/timer.sock"),
            source: source(),
        },
        Error::Spawn {
            program: PathBuf::from("vhost-user-timer"),
            source: source(),
        },
        Error::BackendEnded {
            program: PathBuf::from("vhost-user-timer"),
            status: ExitStatus::default(),
        },
        Error::Io {
            what: "poll",
            source: source(),
        },
        Error::Control {
            message: "SET_OWNER",
            source: ControlError::new(vhost::Error::InvalidOperation),
        },
        Error::MissingFeature(Feature::Config),
        Error::MissingFeature(Feature::ResetDevice),
        Error::MissingFeature(Feature::DeviceState),
        Error::Config(ContentFault::Phase(9)),
        Error::InvalidArgument(InvalidArgument::QueueSize(3)),
        Error::SavedVm(SavedVmError::Magic),
        Error::QueueFull { queue: 1 },
        Error::TimedOut { what: "RESUME" },
        Error::Uncertain(refusal()),
        Error::DeviceState(DeviceStateError::SaveRefused),
        Error::Refused(refusal()),
        Error::Abandoned,
        Error::Apply(ApplyFailure {
            cause: std::sync::Arc::new(monotonic(true)),
        }),
        Error::Applying { op: Op::Pause },
        Error::Restore(RestoreFailure {
            vcpu: 3,
            cause: std::sync::Arc::new(Error::Disconnected),
        }),
    ]
}

/// Each [`Failure`] that a queue can end with.
fn failures() -> Vec<Failure> {
    let fault = Fault::EventLength { len: 3 };
    vec![
        Failure::Disconnected,
        Failure::ShutDown,
        Failure::StateLost(StateLoss::NotConfigured),
        Failure::MissingFeature(Feature::VirtioVersion1),
        Failure::MissingFeature(Feature::ProtocolFeatures),
        Failure::MissingFeature(Feature::Mq),
        Failure::MissingFeature(Feature::RequestQueues {
            wanted: 1,
            offered: 0,
        }),
        Failure::MissingFeature(Feature::SameAsBefore),
        Failure::Version(2),
        Failure::HostCounter(monotonic(false)),
        Failure::Protocol { queue: 1, fault },
    ]
}

#[test]
fn exactly_the_errors_that_a_queue_ends_with_say_so() {
    for failure in failures() {
        let error = Error::from(failure);
        assert!(error.ends_queue(), "{error:?}");
    }
    for error in that_leave_the_queue() {
        assert!(!error.ends_queue(), "{error:?}");
    }
}

#[test]
fn an_error_begins_in_lower_case_and_has_no_full_stop() {
    let arguments = [
        InvalidArgument::EventBuffers(3),
        InvalidArgument::RequestQueues(17),
        InvalidArgument::ReconnectDelays {
            first: std::time::Duration::from_secs(2),
            max: std::time::Duration::from_secs(1),
        },
        InvalidArgument::ReconnectStream,
        InvalidArgument::ReconnectWithoutState,
        InvalidArgument::WithoutConfirm,
        InvalidArgument::NeedsApply,
        InvalidArgument::InsideApply,
        InvalidArgument::Registers(17),
        InvalidArgument::MessageLength(1 << 20),
        InvalidArgument::ElapsedSince1970,
        InvalidArgument::SpentTicket,
        InvalidArgument::HostClock,
    ];
    let texts = failures().into_iter().map(Error::from);
    let texts = texts.chain(that_leave_the_queue());
    let texts = texts.chain(arguments.map(Error::from));
    for text in texts.map(|error| error.to_string()) {
        // The name of an operation or feature may come first.
        let begin = text.split(' ').next().unwrap();
        let name = begin.chars().all(|c| c.is_ascii_uppercase() || c == '_');
        let lower = begin.chars().next().is_some_and(|c| !c.is_uppercase());
        assert!(lower || name, "{text}");
        assert!(!text.ends_with('.'), "{text}");
    }
}

#[test]
fn a_vm_that_the_backend_does_not_have_is_named_beside_the_one_that_it_has() {
    let shape = |vcpus, frequency| VmShape {
        vcpus,
        abi: Abi::Arm64,
        frequency,
        options: VmOptions::KVM.one_offset(vcpus == 4),
    };
    let error = InvalidArgument::OtherVm {
        saved: shape(4, 1_000_000_000),
        backend: shape(8, 62_500_000),
    };
    assert_eq!(
        error.to_string(),
        "cannot restore a VM of 4 vCPUs, arm64, 1000000000 Hz, CONFIRM, ONE_OFFSET: \
         the backend has one of 8 vCPUs, arm64, 62500000 Hz, CONFIRM"
    );
}

#[test]
fn a_backend_that_counts_by_something_else_is_named_with_what_to_do() {
    let unknown = OtherCounter {
        found: CounterSource::NotTold,
        ..monotonic(false)
    };
    let texts = [monotonic(false), monotonic(true), unknown].map(|other| other.to_string());
    assert_eq!(
        texts,
        [
            "the backend counts by monotonic, so its offsets are not those of cntvct: \
             start it with --counter-source cntvct",
            "the backend's host counter is anchored (SET_COUNTER_ANCHOR), so its offsets are not \
             those of cntvct: start over with a VM that is not anchored",
            "the backend does not report what it counts by, so its offsets may not be those of \
             cntvct: use a backend that does, and start it with --counter-source cntvct",
        ]
    );
}

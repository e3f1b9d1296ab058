//! SPEC.md, "ARMED" and CONFIRM_RUN: between the decision and the guest.

mod of_restore;
mod of_resume;

/// The scenarios of all of it.
pub(crate) const SCENARIOS: [&[crate::scenarios::Scenario]; 2] =
    [of_restore::SCENARIOS, of_resume::SCENARIOS];

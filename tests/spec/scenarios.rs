//! The table at the head of each file: which sentences of SPEC.md each scenario proves, and where
//! it runs.

/// One scenario: its name, and the ids of the sentences that it proves.
pub(crate) type Scenario = (&'static str, &'static [&'static str]);

/// Declares a file's scenarios, and makes a test of each.
///
/// - `both`: runs on the model in this process and on the released backend behind its socket;
/// - `model`: on the model alone, where an instant must be exact to the tick;
/// - `binary`: on the backend alone: sockets, rings, logs, processes.
macro_rules! scenarios {
    ($(both { $($both:ident: $($both_id:literal)+;)* })?
     $(model { $($model:ident: $($model_id:literal)+;)* })?
     $(binary { $($binary:ident: $($binary_id:literal)+;)* })?) => {
        /// This file's scenarios, and the sentences that each proves.
        pub(crate) const SCENARIOS: &[$crate::scenarios::Scenario] = &[
            $($((stringify!($both), &[$($both_id),+]),)*)?
            $($((stringify!($model), &[$($model_id),+]),)*)?
            $($((stringify!($binary), &[$($binary_id),+]),)*)?
        ];

        mod on_the_model {
            $($(
                #[test]
                fn $both() {
                    super::$both($crate::world::World::Model);
                }
            )*)?
            $($(
                #[test]
                fn $model() {
                    super::$model($crate::world::World::Model);
                }
            )*)?
        }

        mod on_the_binary {
            $($(
                #[test]
                fn $both() {
                    super::$both($crate::world::World::Binary);
                }
            )*)?
            $($(
                #[test]
                fn $binary() {
                    super::$binary();
                }
            )*)?
        }
    };
}

//! Every sentence of SPEC.md has a scenario, and every scenario names sentences that there are.

use std::collections::{BTreeMap, BTreeSet};

const SPEC: &str = include_str!("../../protocol/SPEC.md");

/// The ids of this kind, `R` or `D`, in the order of the document.
fn ids(kind: char) -> Vec<&'static str> {
    let start = ['[', kind, '-'].into_iter().collect::<String>();
    SPEC.split(&start)
        .skip(1)
        .filter_map(|rest| rest.split_once(']'))
        .map(|(id, _)| id)
        .filter(|id| id.starts_with(|digit: char| digit.is_ascii_digit()))
        .collect()
}

#[test]
fn every_sentence_of_the_specification_has_a_scenario() {
    let mut scenarios: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, proved) in crate::files().concat() {
        for id in proved {
            scenarios.entry(id).or_default().push(name);
        }
    }
    let sentences: BTreeSet<_> = ids('R').into_iter().collect();
    let without: Vec<_> = ids('R')
        .into_iter()
        .filter(|id| !scenarios.contains_key(id))
        .collect();
    assert!(without.is_empty(), "no scenario proves {without:?}");
    let unknown: Vec<_> = scenarios
        .iter()
        .filter(|(id, _)| !sentences.contains(*id))
        .collect();
    assert!(unknown.is_empty(), "not in SPEC.md: {unknown:?}");
}

#[test]
fn an_id_is_given_once_and_bears_its_sections_number() {
    let mut seen = BTreeSet::new();
    let mut section = "";
    for line in SPEC.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            section = heading.split('.').next().unwrap_or_default();
        }
        for word in line.split('[').skip(1) {
            let Some((id, _)) = word.split_once(']') else {
                continue;
            };
            let Some(number) = id.strip_prefix("R-").or_else(|| id.strip_prefix("D-")) else {
                continue;
            };
            if number == "n.m" {
                continue;
            }
            assert!(seen.insert(number), "{id} is given twice");
            let of = number.split('.').next();
            assert_eq!(of, Some(section), "{id} is in section {section}");
        }
    }
    assert!(seen.len() > 200, "{} ids", seen.len());
}

#[test]
fn a_definition_is_the_exception() {
    // What no test of a backend can show: what the frontend does, and what follows from the rest.
    assert!(ids('D').len() <= 12, "{:?}", ids('D'));
}

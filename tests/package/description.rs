//! The description of the program for management software, by QEMU's schema and as libvirt reads
//! it.

use std::fs;

use serde_json::{Deserializer, Value, json};

use crate::root::Root;

const INSTALLED: &str = "/usr/share/vhost-user-timer/50-vhost-user-timer.json";

/// A definition of QEMU's `docs/interop/vhost-user.json`, which is JSON but for its comments and
/// its quotes.
fn definition(root: &Root, kind: &str, name: &str) -> Value {
    let source = root.environment.directory().with_file_name("source");
    let schema = source.join("source/docs/interop/vhost-user.json");
    let schema = fs::read_to_string(schema).expect("QEMU's schema");
    let lines = schema.lines().filter(|line| !line.starts_with('#'));
    let text: String = lines.map(|line| line.replace('\'', "\"") + "\n").collect();
    Deserializer::from_str(&text)
        .into_iter()
        .map(|definition| definition.expect("JSON"))
        .find(|definition: &Value| definition[kind] == name)
        .expect(name)
}

/// The names of the schema's types of backends.
fn types(root: &Root) -> Vec<Value> {
    let types = definition(root, "enum", "VHostUserBackendType");
    types["data"].as_array().expect("a list").clone()
}

#[test]
fn the_description_is_by_qemus_schema_but_for_its_type() {
    let Some(root) = Root::find("bare") else {
        return;
    };
    let description = root.run_installed(&format!("cat {INSTALLED}"));
    let description: Value = serde_json::from_str(&description).unwrap();
    let description = description.as_object().unwrap();
    let schema = definition(&root, "struct", "VhostUserBackend");
    let schema = schema["data"].as_object().unwrap();
    for (member, of_type) in schema {
        let Some(value) = description.get(member.trim_start_matches('*')) else {
            assert!(member.starts_with('*'), "{member} is missing");
            continue;
        };
        match of_type {
            Value::Array(_) => assert!(
                value.as_array().unwrap().iter().all(Value::is_string),
                "{value}"
            ),
            of_type => {
                assert!(of_type == "str" || member == "type", "{of_type}");
                assert!(value.is_string(), "{value}");
            }
        }
    }
    for member in description.keys() {
        let optional = format!("*{member}");
        assert!(
            schema.contains_key(member) || schema.contains_key(&optional),
            "{member}"
        );
    }
    // Once QEMU has a type that fits, this is to be changed.
    let types = types(&root);
    for missing in ["timer", "rtc"] {
        assert!(!types.contains(&json!(missing)), "{missing} in {types:?}");
    }
    assert_eq!(description["type"], "timer");
}

#[test]
fn the_description_names_a_program_of_the_package_with_the_same_type() {
    let Some(root) = Root::find("bare") else {
        return;
    };
    let printed = root.run_installed(&format!(
        r#"binary=$(sed -n 's/.*"binary": "\(.*\)".*/\1/p' {INSTALLED})
        dpkg --search "$binary" >/dev/null
        "$binary" --print-capabilities"#
    ));
    let capabilities: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(capabilities["type"], "timer");
}

/// Asks libvirt for the command line of a VM whose virtiofsd it has to find.
const VIRTIOFS: &str = r#"
cat >/tmp/vm.xml <<'XML'
<domain type='qemu'>
  <name>vm1</name>
  <memory unit='MiB'>256</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os><type arch='aarch64' machine='virt'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-aarch64</emulator>
    <filesystem type='mount'>
      <driver type='virtiofs'/><source dir='/srv'/><target dir='srv'/>
    </filesystem>
  </devices>
</domain>
XML
convert() { virsh -c 'qemu:///embed?root=/tmp/libvirt' domxml-to-native qemu-argv /tmp/vm.xml 2>&1 || true; }
"#;

#[test]
fn libvirt_starts_vms_with_virtiofs_beside_the_package() {
    let Some(root) = Root::find("host") else {
        return;
    };
    let printed = root
        .with_qemu()
        .run_installed(&format!("{VIRTIOFS}\nconvert | grep -o vhost-user-fs-pci"));
    assert_eq!(printed, "vhost-user-fs-pci\n");
}

#[test]
fn libvirt_starts_none_with_the_description_among_qemus() {
    let Some(root) = Root::find("host") else {
        return;
    };
    let printed = root.with_qemu().run_installed(&format!(
        "{VIRTIOFS}\ncp {INSTALLED} /usr/share/qemu/vhost-user\nconvert | grep error:"
    ));
    assert_eq!(
        printed,
        "error: internal error: unknown vhost-user type: 'timer'\n"
    );
}

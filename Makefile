# `make help` lists the targets. CI runs `make check`.

CARGO ?= cargo
PREFIX ?= /usr/local
export CARGO_TERM_COLOR ?= auto
export RUSTDOCFLAGS := -D warnings

# Relative to this folder for whatever cargo starts, too.
ifdef CARGO_TARGET_DIR
override CARGO_TARGET_DIR := $(shell realpath -m -- '$(CARGO_TARGET_DIR)')
export CARGO_TARGET_DIR
endif

# Where cargo builds; asked for once, by the first recipe that needs it.
TARGET = $(eval TARGET := $$(shell CARGO='$(CARGO)' .ci/target-dir))$(TARGET)
BACKEND = $(TARGET)/release/vhost-user-timer
MOCK = $(TARGET)/release/mock-frontend
MODEL = $(TARGET)/release/model-check
QEMU_DEMO = $(TARGET)/release/demo-qemu
KVM_DEMO = $(TARGET)/release/demo-kvm
BENCH = $(TARGET)/release/bench
# Its checks panic, and a release build aborts then.
HOSTILE = $(TARGET)/debug/hostile

.PHONY: help demo demo-qemu demo-kvm check demos released fmt clippy doc deny checkpatch test test-build hostile kvm kvm-qemu arm64 model bench bench-model build install uninstall deb test-deb test-systemd package release-check manual clean qemu-environment clean-cache

help:
	@echo 'make demo              save eight vCPUs with one backend and restore them with another, step by step'
	@echo 'make demo-qemu         a Linux guest in QEMU, with its clock from the backend; then its migration, as it sees it'
	@echo 'make demo-kvm          the last metre, on a real KVM: what the guest sees with and without it'
	@echo 'make check             everything that must hold: format, lints, docs, tests, KVM, AArch64, model check, demos'
	@echo 'make test              all tests but those on a real KVM'
	@echo 'make hostile           random attacks on the released backend, for a minute; HOSTILE_ARGS="--minutes 30", --help'
	@echo 'make kvm               the tests on a real KVM, for which Linux for AArch64 is emulated'
	@echo 'make kvm-qemu          QEMU with our device on a real KVM, in the same way; it is built at first'
	@echo 'make arm64             build for AArch64, and run the unit and protocol tests by emulation'
	@echo 'make model             the model check; MODEL_ARGS=--large for a longer one'
	@echo 'make bench             measure requests, restores and timers against their floors; BENCH_ARGS=--quick, --help'
	@echo 'make bench-model       measure the same operations within one process; BENCH_ARGS=GET_VM for some of them'
	@echo 'make install           install what was built, with manual pages, completions and units: PREFIX=/usr/local, DESTDIR='
	@echo 'make uninstall         remove it'
	@echo 'make package           build each crate that is published from its package alone'
	@echo 'make release-check     what must hold before a version gets its tag'
	@echo 'make deb               a Debian package, in debian where cargo builds'
	@echo 'make test-deb          install and purge it in Debian roots, and what libvirt makes of it'
	@echo 'make test-systemd      the systemd units, in an emulated machine whose first process is systemd'
	@echo 'make manual            renew the manual pages and completions in contrib, after a change of the options'
	@echo 'make qemu-environment  make what the tests with a real guest and those for AArch64 need, once'
	@echo 'make clean-cache       remove that'
	@echo 'make build             the backend and its tools, as released; the first step of an installation'

build:
	$(CARGO) build --release --locked --workspace

# Never builds: who installs need not have cargo.
install:
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' contrib/install

uninstall:
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' contrib/install --uninstall

# As PUBLISHED in tests/conventions/packages.rs, beside vhost-user-timer itself.
PUBLISHED := -protocol -counter -frontend -model -ctl -capi

# Needs Cargo 1.90 or newer, which finds the packages among each other.
package:
	$(CARGO) package --locked --package vhost-user-timer $(addprefix --package vhost-user-timer,$(PUBLISHED))

release-check:
	@.ci/release
	@$(MAKE) --no-print-directory check package

deb: released
	@.ci/deb

test-systemd: qemu-environment
	$(CARGO) test --locked --package vhost-user-timer-tests --test system

# In roots of the environment. Not a part of `make test`: it packs what that builds.
test-deb: released qemu-environment
	$(CARGO) test --locked --package vhost-user-timer-tests --test package

# Only what tests and demos start or load: link-time optimization is slow, program by program.
released:
	$(CARGO) build --release --locked --workspace --bin vhost-user-timer --bin vhost-user-timer-ctl --bin mock-frontend --bin model-check
	$(CARGO) build --release --locked --package vhost-user-timer-capi --lib

manual:
	$(CARGO) run --quiet --locked --package vhost-user-timer-manual

demo: released
	'$(MOCK)' demo --backend '$(BACKEND)' $(DEMO_ARGS)

demo-qemu: build qemu-environment
	'$(QEMU_DEMO)'

demo-kvm: qemu-environment
	$(CARGO) build --release --locked --package vhost-user-timer-tools --bin demo-kvm
	'$(KVM_DEMO)' "$$(tests/kvm/programs)"

# A part a target, timed; the list is in the script.
check:
	@MAKE='$(MAKE)' .ci/check

demos: released
	'$(MOCK)' demo --backend '$(BACKEND)' --via device-state --kill
	'$(MOCK)' demo --backend '$(BACKEND)'

# Where it cannot be made (77), the tests that need it are skipped, and `make check` ends with the
# reason. In CI that is an error.
qemu-environment:
	@tests/qemu/environment >/dev/null || { status=$$?; [ $$status -eq 77 ] && [ -z "$$CI" ]; }

fmt:
	$(CARGO) fmt --all --check

clippy:
	$(CARGO) clippy --locked --workspace --all-targets --all-features -- -D warnings
	$(CARGO) clippy --locked --package vhost-user-timer-tests --test kvm --test kvm-qemu --test kvm-qemu-inside --test package --test system -- -D warnings

doc:
	$(CARGO) doc --locked --workspace --all-features --no-deps

# The series for QEMU, by QEMU's own style.
checkpatch: qemu-environment
	@tests/qemu/checkpatch || { status=$$?; [ $$status -eq 77 ] && [ -z "$$CI" ]; }

deny:
	@.ci/deny

# The tests that measure run the backend as it is released: optimized and without failpoints.
test: released qemu-environment
	$(CARGO) test --locked --workspace --all-features

test-build:
	$(CARGO) test --locked --workspace --all-features --no-run

# The seed is the date's, and printed; a failure prints the command that repeats it.
hostile: released
	$(CARGO) build --locked --package vhost-user-timer-tools --bin hostile
	'$(HOSTILE)' $(HOSTILE_ARGS)

# A target of its own (`test = false` in tests/Cargo.toml), since it takes minutes. An AArch64 host
# with /dev/kvm is itself the machine for most of it, and needs the programs.
kvm: qemu-environment
ifeq ($(shell uname -m),aarch64)
	$(CARGO) build --release --locked --workspace --bin vhost-user-timer --bin vhost-user-timer-vmm --bin kvm-agent
endif
	$(CARGO) test --locked --package vhost-user-timer-tests --test kvm

# Not a part of `make check`: it builds another QEMU, and boots guests by an emulated KVM.
kvm-qemu: qemu-environment
	$(CARGO) test --locked --package vhost-user-timer-tests --test kvm-qemu -- --nocapture

# Under QEMU's user-mode emulator, with the compiler of the environment. Skipped where there is
# none.
arm64: qemu-environment
	@tests/qemu/arm64 || { status=$$?; [ $$status -eq 77 ] && [ -z "$$CI" ]; }

# Every interleaving, within limits; about a minute.
model: released
	'$(MODEL)' $(MODEL_ARGS)

# Ratios within one run; a quiet machine gives better ones. Writes bench/report.json and .html where
# cargo builds.
bench: build
	'$(BENCH)' $(BENCH_ARGS)

# Reports whether each operation has become slower since the last run.
bench-model:
	$(CARGO) bench --locked -p vhost-user-timer-tools --bench model -- $(BENCH_ARGS)

clean:
	$(CARGO) clean

clean-cache:
	tests/qemu/environment --remove
	.ci/deny --remove
	.ci/deb --remove

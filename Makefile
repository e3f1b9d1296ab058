# What there is to do here. `make check` is what CI runs.

CARGO ?= cargo
export CARGO_TERM_COLOR ?= auto
export RUSTDOCFLAGS := -D warnings

BACKEND := target/release/vhost-user-timer
MOCK := target/release/mock-frontend
MODEL := target/release/model-check
QEMU_DEMO := target/release/demo-qemu
BENCH := target/release/bench

.PHONY: help demo demo-qemu check demos released fmt clippy doc deny test test-build arm64 model bench bench-model build clean qemu-environment clean-cache

help:
	@echo 'make demo   eight vCPUs saved by one backend and restored by another, step by step'
	@echo 'make demo-qemu  a Linux guest under a stock QEMU, with its clock from the backend'
	@echo 'make check  everything that must hold: format, lints, docs, tests, model check, demos'
	@echo 'make arm64  the workspace built for AArch64, and its unit and protocol tests run there by emulation'
	@echo 'make model  the model check alone; MODEL_ARGS=--large for a longer one'
	@echo 'make bench  what requests, restores and timers cost beside their floors; BENCH_ARGS=--quick, --help'
	@echo 'make bench-model  the same operations within one process, closely; BENCH_ARGS=GET_VM for a part of them'
	@echo 'make qemu-environment  what the tests with a real guest need, made once; clean-cache removes it'
	@echo 'make build  the backend and its tools, as released, in target/release'

build:
	$(CARGO) build --release --locked --workspace

# What tests and demos start. Optimizing the other programs takes as long again.
released:
	$(CARGO) build --release --locked --workspace --bin vhost-user-timer --bin mock-frontend --bin model-check

demo: released
	$(MOCK) demo --backend $(BACKEND) $(DEMO_ARGS)

demo-qemu: build qemu-environment
	$(QEMU_DEMO)

# A part a target, timed; the list is in the script.
check:
	@MAKE='$(MAKE)' .ci/check

demos: released
	$(MOCK) demo --backend $(BACKEND) --via device-state --kill
	$(MOCK) demo --backend $(BACKEND)

# Where it cannot be made (77), the tests that need it are skipped, and `make check` ends with
# saying so; but not in CI.
qemu-environment:
	@tests/qemu/environment >/dev/null || { status=$$?; [ $$status -eq 77 ] && [ -z "$$CI" ]; }

fmt:
	$(CARGO) fmt --all --check

clippy:
	$(CARGO) clippy --locked --workspace --all-targets --all-features -- -D warnings

doc:
	$(CARGO) doc --locked --workspace --all-features --no-deps

deny:
	@.ci/deny

# The tests that measure run the backend as it is released: optimized and without failpoints.
test: released qemu-environment
	$(CARGO) test --locked --workspace --all-features

test-build:
	$(CARGO) test --locked --workspace --all-features --no-run

# Under QEMU's user-mode emulator, with the compiler of the environment. Skipped where there is none.
arm64: qemu-environment
	@tests/qemu/arm64 || { status=$$?; [ $$status -eq 77 ] && [ -z "$$CI" ]; }

# Every interleaving, within limits; about a minute.
model: released
	$(MODEL) $(MODEL_ARGS)

# Ratios of one run; quiet machines give better ones. Writes target/bench/report.json and report.html.
bench: build
	$(BENCH) $(BENCH_ARGS)

# Says of each operation whether it costs more than the last time, in target/criterion.
bench-model:
	$(CARGO) bench --locked -p vhost-user-timer-tools --bench model -- $(BENCH_ARGS)

clean:
	$(CARGO) clean

clean-cache:
	tests/qemu/environment --remove
	.ci/deny --remove

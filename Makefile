# Two commands do everything: `make demo` and `make test`. Both set up what they need in .venv, build and target folders.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
unexport PYTHONPATH PYTHONHOME

say = @printf '\033[1m==> %s\033[0m\n' "$(1)"

.PHONY: help
help:
	@printf 'make demo    compile the demo model, serve it, stream an answer\nmake test    build everything and pass the whole test suite\nmake test-gpu   the same for kernels of GPUs, without one\n'
	@printf 'make check   formatters, linters, type checker, sanitizers, fuzzing, planted bugs\nmake bench   measure, and write a dated report into artifacts/bench\nmake bench-control   the same for the scheduler alone\nmake bench-placements   the same for what placing costs, and the collectives that it finds\nmake bench-speculation   the same for speculative decoding\nmake bench-agent   the same for agents on a server\nmake bench-offload   the same for pages that come back from the second tier\n'
	@printf 'make wheel   one wheel with tscompile and tsruntime, in dist\nmake lock    solve requirements.in anew\nmake clean   remove what was built\n'

# ---- set-up --------------------------------------------------------------------------------------------------------

$(VENV)/.ready: requirements.lock requirements-uv.lock
	$(call say,Python packages into $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, found %d.%d: set PYTHON=" % sys.version_info[:2]) if sys.version_info < (3, 11) else None'
	@command -v cargo >/dev/null || { echo 'Rust is needed (cargo was not found on PATH)' >&2; exit 1; }
	@command -v c++ >/dev/null || { echo 'a C++20 compiler is needed (c++ was not found on PATH)' >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	@$(BIN)/uv pip install --require-hashes -r requirements.lock
	@touch $@

.PHONY: setup
setup: $(VENV)/.ready

.PHONY: lock
lock: $(VENV)/.ready
	$(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-emit-index-url --no-header --universal --python-version 3.11 requirements.in -o requirements.lock

# Cargo and CMake know what is out of date; a build of nothing takes about a second.
.PHONY: build
build: $(VENV)/.ready
	$(call say,tsruntime (Rust front and C++ engine) and tscompile into $(BIN))
	@$(BIN)/maturin develop --release --quiet

# ---- demo ----------------------------------------------------------------------------------------------------------

.PHONY: demo
demo: build
	$(call say,compile the demo model)
	@$(BIN)/tscompile build artifacts/demo -o artifacts/demo.tsp
	$(call say,serve it)
	@$(BIN)/python artifacts/demo/demo.py artifacts/demo.tsp

# ---- tests ---------------------------------------------------------------------------------------------------------

CMAKE_FLAGS = -G Ninja -DTS_TESTS=ON -DTS_PYTHON=$(CURDIR)/$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja

.PHONY: engine
engine: $(VENV)/.ready
	$(call say,the engine and its C++ tests)
	@$(BIN)/cmake -S . -B build/release $(CMAKE_FLAGS) --log-level=NOTICE
	@$(BIN)/cmake --build build/release -j $(JOBS)

# What takes this long hangs: it is ended and named.
STUCK_S := 300

.PHONY: test
test: build engine
	$(call say,C++ tests)
	@$(BIN)/ctest --test-dir build/release --output-on-failure -j $(JOBS) --timeout $(STUCK_S) --progress
	$(call say,Rust tests)
	@timeout 1200 cargo test --manifest-path tsruntime/Cargo.toml --workspace --locked --release --quiet
	$(call say,Python and end-to-end tests)
	@$(BIN)/python -m pytest tests --durations=15

# Kernels of device targets, without a device: those of real models compile and hold what they must; more cases in the interpreter.
.PHONY: test-gpu
test-gpu: engine
	$(call say,kernels of device targets)
	@$(BIN)/python tests/gpu/every_kernel.py
	@TS_TRITON_SEED=1000 TS_TRITON_CASES=30 $(BIN)/python -m pytest tests/gpu/test_triton_arithmetic.py
	@TRITON_INTERPRET=1 $(BIN)/python tests/gpu/interpreted_lease.py

# ---- checks --------------------------------------------------------------------------------------------------------

CXX_FILES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'tests/*.cpp' 'tests/*.h')

.PHONY: check lint sanitize fuzz planted simulate
check: lint planted simulate sanitize fuzz

lint: build engine
	$(call say,linters and type checker)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@$(BIN)/run-clang-tidy.py -quiet -clang-tidy-binary $(BIN)/clang-tidy -extra-arg=-Wno-unknown-warning-option -p build/release -j $(JOBS) 'csrc/.*\.cpp'
	@cargo fmt --manifest-path tsruntime/Cargo.toml --all --check
	@cargo clippy --manifest-path tsruntime/Cargo.toml --workspace --all-targets --locked --release --quiet -- -D warnings

sanitize: $(VENV)/.ready
	@for s in address,undefined thread; do \
	  printf '\033[1m==> C++ tests under -fsanitize=%s\033[0m\n' $$s; \
	  $(BIN)/cmake -S . -B build/$${s%%,*} $(CMAKE_FLAGS) -DTS_SANITIZE=$$s --log-level=NOTICE; \
	  $(BIN)/cmake --build build/$${s%%,*} -j $(JOBS); \
	  $(BIN)/ctest --test-dir build/$${s%%,*} --output-on-failure -j $(JOBS) --timeout $(STUCK_S) --progress; \
	done

planted: engine
	$(call say,bugs planted into the engine, for the simulator to catch)
	@$(BIN)/python tests/sim/planted.py

simulate: engine
	$(call say,worlds that make test does not reach)
	@TS_SIM_SEED=1000000 TS_SIM_STEPS=12000000 build/release/tests/sim_tests --gtest_brief=1

fuzz: sanitize
	$(call say,fuzz the plan loader)
	@build/address/tests/plan_fuzz

# ---- figures, wheel ------------------------------------------------------------------------------------------------

.PHONY: bench
bench: build
	@$(BIN)/python tests/bench/bench.py

.PHONY: bench-control
bench-control: engine
	@$(BIN)/python tests/bench/control.py

.PHONY: bench-collectives
bench-collectives: engine
	@$(BIN)/python tests/bench/collectives.py

.PHONY: bench-offload
bench-offload: build engine
	@$(BIN)/tscompile build artifacts/demo -o artifacts/demo.tsp
	@$(BIN)/python tests/bench/offload.py artifacts/demo.tsp

.PHONY: bench-placements
bench-placements: $(VENV)/.ready
	@$(BIN)/python tests/bench/placements.py

.PHONY: bench-speculation
bench-speculation: build engine
	@$(BIN)/python tests/bench/speculation.py

.PHONY: bench-agent
bench-agent: build
	@$(BIN)/python tests/bench/agent.py

.PHONY: wheel
wheel: $(VENV)/.ready
	@$(BIN)/maturin build --release --locked --out dist

.PHONY: clean
clean:
	rm -rf build dist tsruntime/target artifacts/*.tsp $(VENV)

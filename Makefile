# make run: install, then the default model and its speed.   make test: install, then the tests.
# Both work in .venv, since Debian's Python refuses to install outside a virtual environment.

PYTHON ?= python3
BIN := .venv/bin
FIND_HEADERS := import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
PYTEST := $(BIN)/python -m pytest -n auto --dist=worksteal
LOG := .venv/install.log
# $(call install,WHAT,PACKAGES): a line instead of pip's hundreds, which go to a file
define install
@echo "Installing $(1) (log: $(LOG)) ..."
@$(BIN)/pip install $(2) >$(LOG) 2>&1 || \
    { tail -n 25 $(LOG); echo "Installing $(1) failed; the whole log is $(LOG)."; exit 1; }
endef

run: .venv/run
	$(BIN)/python -m engine.run

test: .venv/test
	$(PYTEST)

test-slow: .venv/test
	$(PYTEST) -m slow

# The tests with the lowest versions that pyproject.toml allows, in an environment of their own, by
# the extension of .venv; on Python 3.11 or 3.12, as the lowest numpy has no wheel for later ones.
# Those of kernels are left out: GPU code is compiled by benchmarks/aot.py, which is for Triton 3.9.
LOWEST := build/lowest
test-lowest: .venv/test $(BIN)/uv
	$(BIN)/uv venv -q --clear --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install -q --python $(LOWEST)/bin/python --resolution lowest-direct \
	    -r pyproject.toml --extra test --extra heal
	$(PYTEST:$(BIN)/%=$(LOWEST)/bin/%) tests/commands tests/engine tests/formats $(PYTEST_ARGS)

# Exports in the engines that they are for: llama.cpp, vLLM, GPTQModel.
test-peers: .venv/test
	tests/formats/peers.sh

# The CPU extension under AddressSanitizer and UBSan, or under ThreadSanitizer, in a build of its own.
# First come bugs that it must report, then the tests; PYTEST_ARGS chooses among these.
sanitize-address: export ASAN_OPTIONS := detect_leaks=0:$(ASAN_OPTIONS)
sanitize-address: RUNTIME := libasan.so
sanitize-thread: export TSAN_OPTIONS := \
    ignore_noninstrumented_modules=1:die_after_fork=0:$(TSAN_OPTIONS)
sanitize-thread: RUNTIME := libtsan.so
PRELOADED = $(shell $(CXX) -print-file-name=$(RUNTIME)) $(shell $(CXX) -print-file-name=libstdc++.so)
SANITIZED = LD_PRELOAD="$(PRELOADED)" $(BIN)/python -P -m pytest --capture=sys \
    -o pythonpath="build/$@/lib tests benchmarks"
sanitize-address sanitize-thread: .venv/test
	SHALLOW_SANITIZE=$(@:sanitize-%=%) $(BIN)/python setup.py -q build \
	    --build-base build/$@ --build-lib build/$@/lib
	$(SANITIZED) tests/cpu/sanitizer_check.py
	$(SANITIZED) tests/cpu/test_angular.py \
	    $(wildcard tests/cpu/test_w4_cpu*.py tests/cpu/test_cpu_*.py) \
	    $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m slow tests/cpu/test_threads.py

# AVX-VNNI and AMX run by AVX-512 and its bfloat16 (csrc/cpu/emulate.h), in a build of its own: the
# tests of the CPU kernels and of the CPU runtime.
emulate-x86: .venv/test
	SHALLOW_EMULATE=1 $(BIN)/python setup.py -q build --build-base build/$@ --build-lib build/$@/lib
	PYTHONPATH=build/$@/lib $(BIN)/python -P -c "from engine.kernels.w4.cpu import isas; \
	    exit('amx' not in isas() and 'This processor has no AVX-512 with bfloat16 to emulate by.')"
	PYTHONSAFEPATH=1 $(PYTEST) -o pythonpath="build/$@/lib tests benchmarks" tests/cpu $(PYTEST_ARGS)

# 20,000 damaged files of every kind through their readers, from a new seed: ordinary and, without
# the bound of memory, under AddressSanitizer. FUZZ_ARGS="--seed N --count N" repeats one.
FUZZ := tests/fuzz/harness.py $(FUZZ_ARGS)
fuzz: .venv/test
	$(BIN)/python -P $(FUZZ)

fuzz-address: export ASAN_OPTIONS := detect_leaks=0:$(ASAN_OPTIONS)
fuzz-address: RUNTIME := libasan.so
fuzz-address: .venv/test
	SHALLOW_SANITIZE=address $(BIN)/python setup.py -q build \
	    --build-base build/sanitize-address --build-lib build/sanitize-address/lib
	LD_PRELOAD="$(PRELOADED)" PYTHONPATH=build/sanitize-address/lib $(BIN)/python -P $(FUZZ) \
	    --no-memory

# What takes too long for every change, in one command.
nightly: test-slow sanitize-address sanitize-thread fuzz-address \
    $(if $(shell grep -m1 -o avx512_bf16 /proc/cpuinfo 2>/dev/null),emulate-x86)

lint: $(BIN)/ruff $(BIN)/clang-format $(BIN)/mypy .venv/test  # mypy reads what is imported
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu')
	$(BIN)/mypy

.venv/run: $(SOURCES) | $(BIN)/pip
	$(call install,the engine and its dependencies,-e .)
	@touch $@

.venv/test: $(SOURCES) | $(BIN)/pip
	$(call install,the engine and what its tests need,-e '.[test]')
	@touch $@ .venv/run

$(BIN)/ruff $(BIN)/clang-format $(BIN)/mypy: | $(BIN)/pip
	$(call install,the linters,ruff 'clang-format==23.*' mypy)

$(BIN)/uv: | $(BIN)/pip
	$(call install,uv,uv)

$(BIN)/pip:
	@need() { echo "Shallow needs $$1."; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    need 'Python 3.11 or later: make PYTHON=python3.11'; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    need 'the venv module (Debian: apt install python3-venv)'; \
	$(PYTHON) -c '$(FIND_HEADERS)' 2>/dev/null || \
	    need 'the Python headers (Debian: apt install python3-dev)'; \
	command -v $(firstword $(CXX)) >/dev/null || \
	    need 'a C++ compiler (Debian: apt install g++)'
	$(PYTHON) -m venv .venv

.PHONY: run test test-slow test-lowest test-peers sanitize-address sanitize-thread emulate-x86 fuzz fuzz-address nightly lint

# The README's commands. Each target does its whole set-up on a Debian-like machine that has
# Python >= 3.10, a compiler and git. Variables: PYTHON, VENV, TORCH, TORCH_INDEX, JOBS.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
JOBS ?= $(shell nproc)
# The CUDA tier of `make build`: AUTO (where nvcc is found), ON or OFF; and for which GPUs.
SLUICE_CUDA ?= AUTO
SLUICE_CUDA_ARCHITECTURES ?=

export PATH := $(abspath $(VENV))/bin:$(PATH)
export PYTHON VENV TORCH TORCH_INDEX JOBS
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PART := .ci/part
CMAKE = cmake -Wno-deprecated -G Ninja -S . -DSLUICE_TESTS=ON -DSLUICE_PYTHON=OFF -DSLUICE_CUDA=OFF \
  -DSLUICE_WERROR=ON -Dpybind11_DIR=$$(python -m pybind11 --cmakedir)
CLANG = $(shell command -v clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++ 2>/dev/null | head -1)

.PHONY: demo build test lint cpp sanitize thread-safety emulated-models gpu-check python bench-smoke \
        test-long test-planted test-versions fuzz setup setup-demo setup-fuzz clean

demo: setup-demo
	@$(PART) build $(MAKE) --no-print-directory build
	@$(PART) demo sluice demo --out build/demo
	@.ci/summary

test: setup
	@$(PART) lint $(MAKE) --no-print-directory lint
	@$(PART) build $(MAKE) --no-print-directory build
	@$(PART) cpp $(MAKE) --no-print-directory cpp
	@$(PART) sanitize $(MAKE) --no-print-directory sanitize
	@$(PART) thread-safety $(MAKE) --no-print-directory thread-safety
	@$(PART) emulated $(MAKE) --no-print-directory emulated-models
	@$(PART) python $(MAKE) --no-print-directory python
	@.ci/summary

setup:
	@$(PART) setup .ci/setup test

setup-demo:
	@$(PART) setup .ci/setup demo

setup-fuzz:
	@$(PART) setup .ci/setup fuzz

# Editable: sources stay in the tree, the two modules go to site-packages.
build:
	@$(VENV)/bin/python -m pip install -q --no-build-isolation --no-deps -e . \
	  --config-settings=cmake.build-type=Release \
	  --config-settings=cmake.define.SLUICE_CUDA=$(SLUICE_CUDA) \
	  $(if $(SLUICE_CUDA_ARCHITECTURES),--config-settings='cmake.define.CMAKE_CUDA_ARCHITECTURES=$(SLUICE_CUDA_ARCHITECTURES)')

lint:
	@git ls-files '*.h' '*.cc' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror
	@ruff format --check . && ruff check .
	@pyright

cpp:
	@$(CMAKE) -B build/cpp >build/cpp.log && cmake --build build/cpp -j$(JOBS) >>build/cpp.log \
	  || { tail -40 build/cpp.log; exit 1; }
	@ctest --test-dir build/cpp --no-tests=error --output-on-failure -j$(JOBS)

sanitize:
	@$(CMAKE) -B build/asan -DSLUICE_SANITIZE=address -DCMAKE_BUILD_TYPE=Release >build/asan.log \
	  && cmake --build build/asan -j$(JOBS) >>build/asan.log || { tail -40 build/asan.log; exit 1; }
	@ctest --test-dir build/asan --no-tests=error --output-on-failure -j$(JOBS)
	@$(CMAKE) -B build/tsan -DSLUICE_SANITIZE=thread -DCMAKE_BUILD_TYPE=Release \
	  '-DSLUICE_TEST_LABELS=cache;transfer;engine;fake_cuda;threads' >build/tsan.log \
	  && cmake --build build/tsan -j$(JOBS) >>build/tsan.log || { tail -40 build/tsan.log; exit 1; }
	@ctest --test-dir build/tsan --no-tests=error --output-on-failure -j$(JOBS)

# Whole models on the CUDA emulation (tests/emulation): the modules are of `make cpp`.
MODULE = $(firstword $(wildcard build/cpp/tests/emulation/module/$(1)/_core*.so))
emulated-models:
	@if [ -z "$(call MODULE,fast)" ]; then echo "emulated models: not run, no CUDA headers were found"; \
	  test "$(SLUICE_CUDA)" != ON; exit; fi; \
	  SLUICE_NO_OPS=1 python tests/emulation/models.py $(call MODULE,checked) families && \
	  SLUICE_NO_OPS=1 python tests/emulation/models.py $(call MODULE,fast) covering && \
	  SLUICE_NO_OPS=1 python tests/emulation/models.py $(call MODULE,checked) covering && \
	  SLUICE_EMULATED_CORE=$(call MODULE,fast) SLUICE_NO_OPS=1 PYTHONPATH=tests \
	  SLUICE_NVTX_RECORDER=$(abspath $(wildcard build/cpp/tests/emulation/nvtx/*nvtx_recorder.so)) \
	  python -m pytest -p emulation.plugin -p no:faulthandler tests/emulation -p no:cacheprovider && \
	  SLUICE_EMULATED_CORE=$(call MODULE,fast) SLUICE_NO_OPS=1 PYTHONPATH=tests \
	  python -m pytest -p emulation.plugin -p no:faulthandler -m emulated \
	  tests/python/test_session*.py tests/python/hf -p no:cacheprovider && \
	  SLUICE_EMULATED_CORE=$(call MODULE,fast) SLUICE_GPU_TESTS=$(abspath build/cpp/tests/gpu/libsluice_gpu_tests.so) \
	  SLUICE_NO_OPS=1 python -m pytest tests/gpu --ignore tests/gpu/test_battery.py -p no:cacheprovider

# What only a GPU can say: STAGE=correct|bandwidth|rows|sanitize, all of them without; DRY_RUN=1 lists it.
STAGE ?= all
gpu-check:
	@$(PYTHON) tests/gpu/check.py $(STAGE) $(if $(DRY_RUN),--dry-run)

# As the emulation found them; without them the CUDA device is left out.
CUDA_HEADERS = $(addprefix -isystem ,$(shell sed -n 's/^SLUICE_CUDA_INCLUDE:PATH=//p' build/cpp/CMakeCache.txt))
thread-safety:
	@test -n "$(CLANG)" || { echo "thread-safety: no clang++ found; apt-get install clang"; exit 1; }
	@git ls-files 'csrc/*.cc' ':!csrc/bindings' $(if $(CUDA_HEADERS),,':!csrc/device/device_cuda.cc') | xargs -P$(JOBS) -n4 \
	  $(CLANG) -std=c++20 -fsyntax-only -Wthread-safety -Werror -Icsrc -I. $(CUDA_HEADERS)
	@echo "thread-safety: clean ($(notdir $(CLANG)))"

# Also the notebooks, the README's code, and every benchmark scenario in its smoke form.
python:
	@python -m pytest tests -m 'not long and not gpu' -p no:cacheprovider

bench-smoke:
	@python -m pytest tests/benchmarks

test-planted: setup
	@python tests/planted/run.py

# The whole battery, the soak tests, then the fuzzers.
test-long: setup build
	@python -m pytest tests -m 'not gpu'
	@$(MAKE) --no-print-directory fuzz

fuzz: setup-fuzz
	@cmake -G Ninja -S . -B build/fuzz -DSLUICE_FUZZ=ON -DSLUICE_PYTHON=OFF -DSLUICE_CUDA=OFF -DSLUICE_SANITIZE=fuzzer \
	  -DCMAKE_CXX_COMPILER=$(CLANG) >build/fuzz.log && cmake --build build/fuzz -j$(JOBS) >>build/fuzz.log
	@for f in build/fuzz/tests/fuzz/*_fuzz; do name=$$(basename $$f _fuzz); echo "$$f"; \
	  mkdir -p build/fuzz/found/$$name; $$f -max_total_time=300 -print_final_stats=1 \
	  -artifact_prefix=build/fuzz/ -dict=tests/fuzz/json.dict build/fuzz/found/$$name \
	  tests/fuzz/corpus/$$name || exit 1; done

test-versions: setup build
	@python tests/contract/versions.py

clean:
	rm -rf build dist

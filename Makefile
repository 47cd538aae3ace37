# Two commands: `make demo` and `make test`. Each sets up its own .venv from nothing but Python and pip.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CORE := $(wildcard csrc/CMakeLists.txt csrc/*/*.cmake csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.def csrc/*/*.in)
# Where there are a compiler and Python's headers, C++ that does not compile is an error, not a reason to go without.
HEADERS := $(wildcard $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('include'))")/Python.h)
BUILD_ENV := CMAKE_BUILD_PARALLEL_LEVEL=2 LOWBIT_REQUIRE_CORE=$(if $(HEADERS),$(if $(shell command -v $${CXX:-c++}),1,0),0)
# One thread a test process: two processes run side by side.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test lint slow coverage clean

demo: .venv/ready
	$(BIN)/lowbit quantize smollm2 --overwrite -o demo/smollm2-w4

test: .venv/ready lint
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What a nightly run adds: tests that take minutes or gigabytes, other programs, and coverage, which doubles the time of the suite.
slow: .venv/ready
	$(TEST_ENV) $(BIN)/python -m pytest -m "slow or peer"

coverage: .venv/ready
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup --hypothesis-profile=nightly --cov --cov-report=term

# Built without isolation: the tools' paths stay the same, so that a change of csrc compiles only what changed.
.venv/ready: pyproject.toml constraints.txt $(CORE)
	$(PYTHON) -m venv .venv
	$(PIP) nanobind scikit-build-core $(foreach tool,cmake ninja,$(if $(shell command -v $(tool)),,$(tool)))
	$(BUILD_ENV) $(PIP) --no-build-isolation --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready

clean:
	rm -rf .venv build demo .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis src/lowbit/_core.*.so

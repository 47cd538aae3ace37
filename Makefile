# Two commands: `make demo` and `make test`. Each sets up its own .venv from nothing but Python and pip.
PYTHON ?= python3
BIN := .venv/bin
# One thread a test process: two processes run side by side.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test lint slow clean

demo: .venv/ready
	$(BIN)/lowbit quantize smollm2 --overwrite -o demo/smollm2-w4

test: .venv/ready lint
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup --cov --cov-report=term

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: .venv/ready
	$(TEST_ENV) $(BIN)/python -m pytest -m "slow or peer"

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready

clean:
	rm -rf .venv demo .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis

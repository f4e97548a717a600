# `make demo` trains a small policy; `make test` is all that CI runs. Both work in .venv only.

PYTHON ?= python3
BIN := .venv/bin
EXTRAS := bench dev examples grpo rivals
# A worker on every core, each with one thread; one that has run dry takes from the others.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist worksteal

.PHONY: help demo test environment lint types tests interpreter portability format clean
.NOTPARALLEL:

help:
	@echo "make demo         train a small policy with GRPO and write a report (a few minutes on a CPU)"
	@echo "make test         lint, types, tests, interpreted kernels, portability, packaging"
	@echo "make environment  only create .venv"
	@echo "make format       format the code and fix what ruff can fix"
	@echo "make clean        remove .venv and all caches"

demo: environment
	$(BIN)/python -m rollfuse grpo

test: lint types tests interpreter portability
	@echo "== all checks passed =="

environment:
	@$(PYTHON) .ci/environment.py $(EXTRAS)

lint: environment
	@echo "== lint =="
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: environment
	@echo "== types =="
	$(BIN)/mypy
	$(BIN)/mypy examples

tests: environment
	@echo "== tests, PyTorch path =="
	$(PYTEST)

interpreter: environment
	@echo "== tests of the kernels, Triton's interpreter =="
	ROLLFUSE_BACKEND=interpret $(PYTEST) -m kernels

portability: environment
	@echo "== every kernel compiled for each target =="
	ROLLFUSE_BACKEND=cpu $(BIN)/python -m rollfuse.bench portability

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# make demo   watch K-FAC train beside SGD and AdamW (under a minute)
# make test   the whole test suite
# make check  what has to hold before a change lands: lint, types, imports, tests
# make bench  some scripts of docs/benchmarks.md (eight minutes, more on a busy machine); make bench-long has the others
# Each door makes its own virtual environment; Python >= 3.11 and make are enough.
PYTHON ?= python3
VENV ?= .venv
DATA ?= ~/.cache/kfac-torch
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check lint bench bench-long clean

demo: $(VENV)/.demo
	$(BIN)/kfac-torch demo

test: $(VENV)/.test
	$(BIN)/python -m pytest --doctest-modules -q

check: $(VENV)/.dev lint
	$(MAKE) test VENV=$(VENV)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# Some read MNIST, Fashion-MNIST and Tiny Shakespeare: make bench DATA=folder
bench: $(VENV)/.demo
	$(BIN)/python benchmarks/digits_autoencoder.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gram.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/capture_overhead.py --pairs 40
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step_cost.py --data-dir $(DATA)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sensitivity.py --data-dir $(DATA)

bench-long: bench
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/patch_moments.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/inverses.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ekfac.py --data-dir $(DATA)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/batch_growth.py --data-dir $(DATA)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/steps_to_target.py --data-dir $(DATA) --stop
	$(BIN)/python benchmarks/pictures.py

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kfac-torch needs Python >= 3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,test,dev]'
	touch $@

clean:
	rm -rf $(VENV) .ci-venv .pytest_cache .ruff_cache .hypothesis

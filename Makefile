# make demo   installs into .venv, trains on real text offline, evaluates, shows the result
# make test   runs the tests
# make wheel   builds a wheel into dist/, with the kernels for sparse inference compiled for this platform
# make eval-data   fetches the data of zero-shot tasks, for evaluation without a hub

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
CODE := nt_transformers recipes eval tests benchmarks
# A process for each core, with one thread; tests of a file share what it trained.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: install demo wheel eval-data test test-slow quality style clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo.sh

wheel: $(INSTALLED)
	NT_TRANSFORMERS_PREBUILT=1 $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

eval-data: $(INSTALLED)
	$(BIN)/python -m nt_transformers.evaluation.prepare --output data/eval

test: $(INSTALLED)
	$(TEST) -m "not slow"

test-slow: $(INSTALLED)
	$(TEST) -m slow

quality: $(INSTALLED)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

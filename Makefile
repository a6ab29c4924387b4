# All targets set up what they need; a fresh clone needs only Python 3.10 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Small tensors gain nothing from several threads, and tests run beside trials of their own.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: demo test test-all test-matrix lint typecheck wheel clean

demo: $(STAMP)
	$(BIN)/cgo demo

# A file's tests run in one process, two files at a time: fixtures of a module are made once.
test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile

test-all: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest

# Other versions of Python and torch, each in an environment of its own; takes gigabytes and an hour.
test-matrix:
	.ci/matrix

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the mapping of an editable install, so the wheel is what is checked.
typecheck: wheel
	rm -rf build/typecheck
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck dist/*.whl
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--python-executable ../../$(BIN)/python -p cgo

wheel: $(STAMP)
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null

# The constraints file pins torch to the CPU build; torch goes first so that nothing pulls another.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[demo,dev,nni,rl]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

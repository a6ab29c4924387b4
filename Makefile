# All targets set up what they need; a fresh clone needs only Python 3.10 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Small tensors gain nothing from several threads, and tests run beside trials of their own.
TEST_ENV := OMP_NUM_THREADS=1

# What a machine with a GPU needs, and an environment as bare as such a machine's to try it in.
BUNDLE ?= build/gpu-bundle
GPU_PYTHON ?= 3.12
GPU_TORCH ?= 2.11.0
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
REHEARSAL := build/rehearsal

.PHONY: demo test test-all test-matrix lint typecheck wheel gpu-bundle gpu-rehearsal clean

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

# Plans that are there and still fit are kept; the first time takes minutes of all processors.
gpu-bundle: wheel
	$(TEST_ENV) $(BIN)/python benchmarks/gpu_bundle.py --folder $(BUNDLE) --python $(GPU_PYTHON)

# Both stages at reduced size on the CPU: another Python and torch, nothing of this environment, no
# repository and no network. Takes gigabytes for torch and minutes.
gpu-rehearsal: wheel $(REHEARSAL)/.installed
	$(TEST_ENV) $(BIN)/python benchmarks/gpu_bundle.py --folder $(REHEARSAL)/bundle \
		--python $(GPU_PYTHON) --size reduced
	$(BIN)/python benchmarks/gpu_rehearsal.py --bundle $(REHEARSAL)/bundle \
		--python $(REHEARSAL)/environment/bin/python --log $(REHEARSAL)/log.txt \
		--record $(REHEARSAL)/figures.json

# What such a machine is expected to have; what it is not, the bundle carries.
$(REHEARSAL)/.installed: Makefile benchmarks/gpu_expected.txt
	rm -rf $(REHEARSAL)/environment
	$(PYTHON312) -m venv $(REHEARSAL)/environment
	$(REHEARSAL)/environment/bin/python -m pip install --quiet torch==$(GPU_TORCH)
	$(REHEARSAL)/environment/bin/python -m pip install --quiet -r benchmarks/gpu_expected.txt
	touch $@

# The constraints file pins torch to the CPU build; torch goes first so that nothing pulls another.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[demo,dev,nni,rl]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

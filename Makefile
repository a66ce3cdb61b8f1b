# facefast: `make train` and `make test` each work alone on a fresh machine. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A GPU without a compiler of CUDA 13 gets one from the package index; FACEFAST_CUDA=1 asks for it anywhere.
EXTRAS := $(shell if [ "$(FACEFAST_CUDA)" = 1 ] || { [ "$(FACEFAST_CUDA)" != 0 ] && command -v nvidia-smi >/dev/null && ! nvcc --version 2>/dev/null | grep -q 'release 13'; }; then echo dev,cuda; else echo dev; fi)
NATIVE := setup.py $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc' -o -name '*.json')

.PHONY: help setup train test faults faults-of-processes faults-of-files cluster-test lint format bench clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

$(VENV)/python: ; $(PYTHON) -c 'import sys; sys.exit("facefast needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	touch $@

# The build needs torch and DALI present, so what pyproject.toml asks for comes first and the package itself second.
$(VENV)/packages: $(VENV)/python pyproject.toml .ci/constraints.txt
	$(BIN)/python .ci/requirements.py $(EXTRAS) | $(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --requirement /dev/stdin
	touch $@

$(VENV)/built: $(VENV)/packages $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

setup: $(VENV)/built  ## .venv with everything installed and built; reused when nothing changed

train: setup  ## the default recipe: draws faces, trains, transfers, verifies (minutes on two cores)
	$(BIN)/python -m facefast.train --out runs/default $(ARGS)

# Every test runs on one thread, so the cores share the tests; few of them, since each process loads torch and DALI.
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
test: setup  ## the whole test suite
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

faults: setup  ## kills, damage and mutations in full, under 15 minutes on two cores; `test` tries a few of each
	$(MAKE) --jobs=2 --output-sync=target faults-of-processes faults-of-files

# Two halves beside each other: much of the first is waiting for processes to start and to end.
PROCESSES := tests/faults/test_kills.py tests/faults/test_ranks.py tests/faults/test_saves.py
FULL := FACEFAST_FAULTS=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rP
faults-of-processes: ; $(FULL) $(PROCESSES) $(ARGS)
faults-of-files: ; $(FULL) $(filter-out $(PROCESSES),$(wildcard tests/faults/test_*.py)) $(ARGS)

cluster-test: setup  ## a real two-node Slurm on this machine (as root), on which runs are submitted, stopped and lost
	$(BIN)/python tests/cluster/slurm_check.py

lint: setup  ## ruff, mypy, clang-format: checks only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

format: setup  ## rewrites the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

bench: setup  ## every benchmark: peers in turns, rows go to benchmarks/results; pytest-benchmark's to .benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-autosave --benchmark-group-by=group $(ARGS)

clean:  ## removes .venv and what was built
	rm -rf $(VENV) build dist facefast/*.so facefast.egg-info

# Three words to know: `make demo`, `make test`, `make check`. Each sets up what it needs in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CPU := constraints/cpu.txt
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check format tiny engines clean

# About two minutes on two cores: a byte-level GPT on four processes, then the proof of the same plan.
demo: $(STAMP)
	$(BIN)/plait train "examples/gpt.py:job" --devices 4 --plan dp=2,pp=2 --steps 120 --batch 16 --run-dir runs/demo
	$(BIN)/plait verify "examples/gpt.py:job?layers=4&width=64&length=32" --devices 4 --plan dp=2,pp=2 --steps 3 --batch 16

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The whole flow, once, in under a minute.
tiny: $(STAMP)
	$(BIN)/python -m pytest tests/test_tiny.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What reads the job files of `plait launch`, in environments of their own (about 2 GiB); the tests use them when they are there.
engines: $(STAMP)
	$(BIN)/python -m plait.environments make engines
	$(BIN)/python -m plait.environments make parallelcluster

# pip reads dependency groups from 25.1 on.
$(STAMP): pyproject.toml $(CPU)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	if $(BIN)/python -m pip install --quiet --dry-run --no-deps --requirement $(CPU) 2> /dev/null; \
		then $(BIN)/python -m pip install --quiet --editable . --group dev --constraint $(CPU); \
		else $(BIN)/python -m pip install --quiet --editable . --group dev; fi
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis

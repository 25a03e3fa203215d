# `make demo` and `make test` set up all they need in .venv, once; everything else is optional.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO_DIR ?= runs/demo
# More options for pip, such as another index.
PIP_FLAGS ?=
# Two processes share the tests, and each starts others: more threads would wait for one another.
TEST_THREADS ?= 1

INSTALL = $(RUN) -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable

.PHONY: install demo test benchmark quality style clean

install: $(VENV)/.for-tests

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[demo,train]'
	touch $@

# Apart: Transformers imports torchao wherever it is installed, which then logs what it misses.
$(VENV)/.for-tests: $(VENV)/.installed
	$(INSTALL) '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(RUN) scripts/demo.py --output_dir $(DEMO_DIR)

test: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	OMP_NUM_THREADS=$(TEST_THREADS) TRANSLUTION_TEST_THREADS=$(TEST_THREADS) $(RUN) -m pytest --numprocesses 2 --dist worksteal --quiet

benchmark: $(VENV)/.installed
	$(RUN) scripts/benchmark.py

quality: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

style: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) runs build dist *.egg-info

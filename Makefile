# `make demo` and `make test` set up all they need in .venv, once; everything else is optional.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO_DIR ?= runs/demo
# More options for pip, such as another index.
PIP_FLAGS ?=
# Two processes share the tests, and each starts others: more threads would wait for one another.
TEST_THREADS ?= 1

.PHONY: install demo test benchmark quality style clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[demo,train,test]'
	touch $@

demo: install
	$(RUN) scripts/demo.py --output_dir $(DEMO_DIR)

test: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	OMP_NUM_THREADS=$(TEST_THREADS) TRANSLUTION_TEST_THREADS=$(TEST_THREADS) $(RUN) -m pytest --numprocesses 2 --dist worksteal --quiet

benchmark: install
	$(RUN) scripts/benchmark.py

quality: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

style: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) runs build dist *.egg-info

# Two commands do all the set-up: `make quickstart` and `make test`. They install into the virtual environment that is
# active, or make `.venv` here.
VENV ?= $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),.venv)
PYTHON = $(VENV)/bin/python
STAMP = $(VENV)/.modernalbert-installed

.PHONY: install quickstart quickstart-pretraining test lint fix conformance benchmark

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -c constraints.txt -e ".[dev]"
	touch $(STAMP)

quickstart: install
	$(PYTHON) scripts/quickstart.py --output_dir runs/quickstart

quickstart-pretraining: install
	$(PYTHON) scripts/quickstart_pretraining.py --output_dir runs/quickstart-pretraining

test: lint
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -c tests/pytest.ini --rootdir tests -n auto tests

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

fix: install
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# transformers' own common model tests, on our classes and, side by side, on its ModernBERT.
conformance: install
	$(PYTHON) tests/conformance/run.py

benchmark: install
	$(PYTHON) benchmarks/speed.py --output runs/speed.json

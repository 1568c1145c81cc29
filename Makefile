# Everything is installed into .venv, from the versions in constraints.txt; nothing outside the checkout is touched.
.DEFAULT_GOAL := help
.PHONY: help demo test test-pages test-lowest test-torchsim lint format docs clean

VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
TORCHSIM := .venv-torchsim

# The first of these that runs and is new enough: a name on the PATH may be an older Python, or a shim for none.
PYTHON ?= $(shell for python in python3.12 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$python && break; done)

# uv installs in a fraction of pip's time; pip does it where uv cannot be had or does not reach the package index.
# Compiled as pip does it: the tests start a hundred processes, each of which may import 5 000 modules.
REQUIREMENTS = -c constraints.txt -e ".[$(EXTRAS)]"
INSTALL = if ! $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(REQUIREMENTS); then \
	$(BIN)/python -m pip install $(REQUIREMENTS); fi

# A file of tests stays in one process; tests/conftest.py has their order. One process more than cores, as tests also wait:
# for processes that they start, for sockets, for a browser.
WORKERS := $(shell $(PYTHON) -c 'import os; print(min((os.cpu_count() or 1) + 1, 4))')
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# What readers run: every block of README.md and docs/, the examples, and the pages as a site.
PAGES := tests/test_readme.py tests/test_examples.py tests/test_docs_site.py

help:
	@echo "make demo    install, then run the demo"
	@echo "make test    install, then lint, type checks, import contracts and tests"
	@echo "make test-pages"
	@echo "             every command of README.md and docs/, the examples, and the pages as a site"
	@echo "make test-lowest"
	@echo "             the same tests in part, with the lowest versions that pyproject.toml allows, in $(LOWEST)"
	@echo "make test-torchsim"
	@echo "             the tests of TorchSim with its latest version, beside which orb-models cannot be, in $(TORCHSIM)"
	@echo "make lint    all checks but the tests"
	@echo "make format  format and sort imports"
	@echo "make docs    build the pages of docs/ into site/"
	@echo "make clean   remove caches and builds; .venv stays"

demo: $(VENV)/.installed
	$(BIN)/ase-uq demo

# Each process would otherwise rewrite the assertions of all tests for itself.
test: lint
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest $(PARALLEL) --cov --cov-report=term $(addprefix --ignore=,$(PAGES))

test-pages: $(VENV)/.installed-dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest $(PARALLEL) $(PAGES)

# Old packages beside new ones that they need warn of what will be gone one day; that is no fault of ours.
test-lowest: $(VENV)/.installed-dev
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(BIN)/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct -e ".[all,dev]"
	$(LOWEST)/bin/pytest $(PARALLEL) -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning \
		tests/backends tests/cli/test_fit.py tests/cli/test_md.py tests/cli/test_score.py tests/io tests/test_predictor.py

# orb-models 0.7 needs nvalchemi-toolkit-ops below 0.4, torch-sim from 0.6.1 on needs 0.4 or newer.
test-torchsim: $(VENV)/.installed-dev
	test -x $(TORCHSIM)/bin/python || $(PYTHON) -m venv $(TORCHSIM)
	sed -e 's/^torch-sim-atomistic==.*/torch-sim-atomistic==0.6.2/' \
		-e 's/^nvalchemi-toolkit-ops==.*/nvalchemi-toolkit-ops==0.5.0/' constraints.txt > $(TORCHSIM)/constraints.txt
	$(BIN)/uv pip install --python $(TORCHSIM)/bin/python -c $(TORCHSIM)/constraints.txt -e ".[mace,torchsim,dev]"
	$(TORCHSIM)/bin/pytest -W ignore::DeprecationWarning tests/engines/test_torchsim.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build

clean:
	rm -rf dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -not -path "./$(VENV)*/*" -prune -exec rm -rf {} +

# The stamps: each is written when its step has succeeded, so that a second make installs nothing.
$(VENV)/.installed: EXTRAS := all
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	$(INSTALL)
	@touch $@

$(VENV)/.installed-dev: EXTRAS := all,dev
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	$(INSTALL)
	@touch $@ $(VENV)/.installed

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "ase_uq needs Python 3.12 or newer, and neither python3.12 nor python3 is one:" \
		"install it, or name it with 'make PYTHON=/path/to/python3.12 ...'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt uv || echo "uv cannot be had; pip installs instead."
	@touch $@
